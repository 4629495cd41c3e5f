"""Images and videos, decoded with PyAV into uint8 arrays (H, W, C)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.data.importers.rows import Array
from ctrlrl.errors import UsageError

DECODERS = ("av1", "libdav1d", "libaom-av1", "h264", "hevc", "mpeg4", "vp9", "libvpx-vp9")
_FORMATS = {1: "gray", 3: "rgb24", 4: "rgba"}
_IMAGES = {b"\x89PNG": "png", b"\xff\xd8\xff": "mjpeg"}
_SEEK_SECONDS = 4.0
"""Frames that are passed over for less than this are decoded: to look for a place in the file takes longer."""


def pixels(shape: tuple[int, ...], what: str) -> tuple[int, int, int]:
    """Height, width and channels.

    Raises:
        UsageError: it is no image that can be decoded.
    """
    if len(shape) != 3 or shape[2] not in _FORMATS or not all(0 < n <= 2**14 for n in shape):
        raise UsageError(
            f"{what} declares images {shape}; expected (height, width, 1, 3 or 4), of at most 16384 pixels"
        )
    return shape[0], shape[1], shape[2]


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    import av

    try:
        yield
    except (av.FFmpegError, OSError, ValueError, LookupError, TypeError, MemoryError) as error:
        raise UsageError(f"{what} cannot be decoded ({error}). The file is damaged: fetch it anew") from None


def _options(shape: tuple[int, int, int]) -> dict[str, str]:
    """Refuses what is far larger than declared; decoders count the margins of blocks, so there is some room."""
    return {"max_pixels": str(4 * (shape[0] + 64) * (shape[1] + 64))}


def _array(frame: Any, shape: tuple[int, int, int], what: str) -> Array:
    if (frame.height, frame.width) != shape[:2]:
        raise UsageError(f"{what} has {frame.height} x {frame.width} pixels, and declares {shape[0]} x {shape[1]}")
    array: Array = frame.to_ndarray(format=_FORMATS[shape[2]])
    return array.reshape(shape)


def decode_image(content: bytes, shape: tuple[int, int, int], what: str) -> Array:
    """A PNG or JPEG as uint8 of this shape."""
    import av

    name = next((name for magic, name in _IMAGES.items() if content.startswith(magic)), None)
    if name is None:
        raise UsageError(f"{what} is neither PNG nor JPEG")
    with _explained(what):
        codec: Any = av.CodecContext.create(name, "r")
        codec.options = _options(shape)
        frames = [*codec.decode(av.Packet(content)), *codec.decode(None)]
        if len(frames) != 1:
            raise UsageError(f"{what} is cut off")
        return _array(frames[0], shape, what)


class Video:
    """An MP4, of which frames are read in order of time; only one is held at a time.

    Raises:
        UsageError: it is none, or its frames are of another size than `shape`.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        import av

        self.path, self._shape = path, shape
        if not path.is_file():
            raise UsageError(f"there is no video {path}: fetch the videos, too")
        with _explained(str(path)):  # the format is given: others may refer to further files
            self._container: Any = av.open(str(path.resolve()), format="mp4")
        try:
            with _explained(str(path)):
                streams = self._container.streams.video
                if len(streams) != 1:
                    raise UsageError(f"{path} has {len(streams)} video streams; expected one")
                self._stream: Any = streams[0]
                context = self._stream.codec_context
                name = context.codec.name if context is not None else None
                if name not in DECODERS:
                    raise UsageError(
                        f"{path} is encoded as {name or 'nothing known'}; ctrlrl decodes AV1, H.264, HEVC, MPEG-4, VP9"
                    )
                if (context.height, context.width) != shape[:2]:
                    raise UsageError(
                        f"{path} has frames of {context.height} x {context.width} pixels, and {shape[0]} x {shape[1]} "
                        "are declared"
                    )
                context.options = _options(shape)
                if shape[0] * shape[1] < 2**16:
                    context.thread_count = 1  # small frames are decoded sooner than threads are started
            self.count: int = self._stream.frames
        except BaseException:
            self.close()
            raise
        self._frames: Iterator[Any] | None = None
        self._ahead: Any = None

    def frames(self, times: Array, tolerance: float) -> Array:
        """The frames shown at these times.

        Args:
            times: (n,) seconds, ascending.
            tolerance: by how many seconds a frame may be off.
        """
        out = np.empty((len(times), *self._shape), np.uint8)
        if len(times):
            self._go_to(float(times[0]), tolerance)
        for i, time in enumerate(times.tolist()):
            with _explained(f"{self.path}, at {time:.3f} s"):
                while (frame := self._peek()) is not None and frame.time < time - tolerance:
                    self._ahead = None
                found = f"there is one at {frame.time:.4f} s" if frame else "the video ends before"
                if frame is None or frame.time > time + tolerance:
                    raise UsageError(
                        f"{self.path} has no frame at {time:.4f} s (within {tolerance:.4f} s): {found}. Frames are "
                        "missing, or the timestamps are not those of the video"
                    )
                if frame.is_corrupt:
                    raise UsageError(f"{self.path} is damaged at {time:.3f} s")
                out[i] = _array(frame, self._shape, str(self.path))
                self._ahead = None
        return out

    def _peek(self) -> Any:
        """The next frame, or None at the end."""
        if self._ahead is None:
            if self._frames is None:
                self._frames = self._container.decode(self._stream)
            self._ahead = next(self._frames, None)
            if self._ahead is not None and self._ahead.time is None:
                raise UsageError(f"{self.path} has a frame without a time")
        return self._ahead

    def _go_to(self, time: float, tolerance: float) -> None:
        with _explained(f"{self.path}, at {time:.3f} s"):
            now = self._peek() if self._frames is not None else None
            at = 0.0 if self._frames is None else now.time if now is not None else float("inf")
            if at - tolerance <= time < at + _SEEK_SECONDS:
                return
            self._container.seek(int(time / self._stream.time_base), stream=self._stream)
            self._frames, self._ahead = None, None

    def close(self) -> None:
        """Close the file."""
        self._frames, self._ahead = None, None
        self._container.close()
