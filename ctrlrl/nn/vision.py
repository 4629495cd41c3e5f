"""Images: how their dimensions are told apart, their random shift, and the convolution that reads them.

Shapes: B batch, K stacked frames, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlrl.errors import UsageError

FEATURES = 50
"""What a network reads of one image, as in DrQ and SAC-AE."""
WIDTHS = (16, 32, 32)
"""Filters of the convolutions."""
SMALLEST = 2 ** (len(WIDTHS) + 1) - 1
"""Height and width of the smallest image that leaves one pixel after them."""


def image_layout(shape: tuple[int, ...], name: str) -> str:
    """What the dimensions of an image are, a letter each: `hw`, `hwc`, `chw`, or with frames before, `khwc`, `kchw`.

    Of three dimensions the channels are the first or the last one, whichever is smaller than all others: (84, 84, 3) as
    Gymnasium has it, (3, 84, 84) as torch does, and (4, 84, 84) for four grey frames.

    Raises:
        UsageError: if that does not tell them apart, or the image has too many dimensions or too few pixels.
    """
    own = "or pass a network of your own: ctrlrl.train(..., encoder=lambda space: MyConvNet(space))"
    layout = "hw"
    if len(shape) > 2:
        frame = shape[-3:]
        smallest = [i for i, size in enumerate(frame) if size == min(frame)]
        if len(shape) > 4 or smallest not in ([0], [2]):
            raise UsageError(
                f"observation {name!r} of shape {shape} does not show which dimension the channels are: expected "
                "(H, W), (H, W, C) or (C, H, W), with frames before the last two or not, and C smaller than H and W. "
                f"Reshape it in a wrapper, {own}"
            )
        layout = "k" * (len(shape) - 3) + ("chw" if smallest == [0] else "hwc")
    height, width = shape[layout.index("h")], shape[layout.index("w")]
    if min(height, width) < SMALLEST:
        raise UsageError(
            f"observation {name!r} of shape {shape} is an image of {height} x {width} pixels; the convolution needs "
            f"{SMALLEST} x {SMALLEST}. Make it larger, {own}"
        )
    return layout


def random_shift(images: Tensor, shift: Tensor, pad: int, layout: str) -> Tensor:
    """DrQ's augmentation (arXiv:2004.13649): repeat the edge `pad` pixels outwards, and cut the old size out again.

    Args:
        images: (B, ...) in `layout`, of any dtype.
        shift: (B, 2) int64 in 0..2 `pad`: where the cut begins, down and to the right; `pad` leaves an image as it is.
            All frames of a stack are shifted alike.
    """
    down, right = 1 + layout.index("h"), 1 + layout.index("w")  # neighbours in every layout
    height, width = images.shape[down], images.shape[right]
    offset = shift - pad
    rows = (torch.arange(height, device=images.device) + offset[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) + offset[:, 1:]).clamp(0, width - 1)  # (B, W)
    # One gather of whole pixels over everything before the channels: four times faster than an index per dimension.
    planes = images[0].numel() // images.shape[down:].numel()
    plane = torch.arange(len(images) * planes, device=images.device).view(-1, planes, 1, 1)
    pixels = (plane * height + rows[:, None, :, None]) * width + columns[:, None, None, :]  # (B, planes, H, W)
    return images.reshape(pixels.numel(), -1).index_select(0, pixels.flatten()).view(images.shape)


class ChannelsLastConv(nn.Module):
    """A 3 x 3 convolution with stride 2, in the order of memory that is faster on a CPU.

    The order is that of the weight (O, 3, 3, I), which is plain to whatever works on its memory: fused Adam takes a
    `torch.channels_last` weight and moments that were saved and loaded for numbers in the same order.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = nn.init.orthogonal_(torch.empty(outputs, 3, 3, inputs), nn.init.calculate_gain("relu"))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(outputs))  # as DrQ and SAC-AE

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight.permute(0, 3, 1, 2), self.bias, stride=2)


class Convolution(nn.Module):
    """Images (B, ...) of one layout, uint8, to features (B, F), float32.

    Three 3 x 3 convolutions with stride 2 and a ReLU each, where DrQ has four, of which only the first has a stride:
    1.5 million multiplications for 48 x 48 pixels of 9 channels instead of 11.4. An update takes three forward passes
    and a backward one, which costs two: 1.9 GFLOP for 128 samples, or 1.3 with 3 channels.
    """

    def __init__(self, shape: tuple[int, ...], name: str) -> None:
        super().__init__()
        self.layout = layout = image_layout(shape, name)
        self._order = [1 + layout.index(axis) for axis in "kchw" if axis in layout]
        sizes = dict(zip(layout, shape, strict=True))
        channels = sizes.get("k", 1) * sizes.get("c", 1)
        layers: list[nn.Module] = []
        for width in WIDTHS:
            layers += [ChannelsLastConv(channels, width), nn.ReLU(inplace=True)]
            channels = width
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            self.out_features = self(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, *self._order)
        # (B, K, C, H, W) is brought into this order of memory here, in the type of which the copy is made anyway
        x = x.to(torch.float32, memory_format=torch.contiguous_format if "k" in self.layout else torch.preserve_format)
        x = x[:, None] if self.layout == "hw" else x.flatten(1, -3)
        out: Tensor = self.layers(x / 255 - 0.5)
        return out.flatten(1)


def projection(inputs: int) -> nn.Sequential:
    """What each network makes of the convolution's features (B, inputs) for itself: (B, FEATURES) in [-1, 1]."""
    return nn.Sequential(nn.Linear(inputs, FEATURES), nn.LayerNorm(FEATURES), nn.Tanh())
