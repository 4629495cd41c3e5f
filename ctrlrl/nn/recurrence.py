"""A recurrent layer between encoder and trunk: what a policy or a critic remembers of its episode.

Shapes: L steps, N sequences, F features, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""`h` (N, H), and for an LSTM `c` (N, H); zeros at the start of an episode."""


class Recurrence(nn.Module):
    """A GRU or LSTM cell, one step at a time: where an episode starts, its state starts anew."""

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.out_features = hidden
        self.cell = nn.LSTMCell(inputs, hidden) if kind == "lstm" else nn.GRUCell(inputs, hidden)
        for name, parameter in self.cell.named_parameters():  # as in recurrent PPOs: orthogonal, without bias
            if "weight" in name:
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)

    def initial(self, n: int) -> State:
        """The state of `n` sequences at the start of an episode."""
        zeros = torch.zeros(n, self.out_features, device=self.cell.weight_hh.device)
        return {"h": zeros, "c": zeros.clone()} if isinstance(self.cell, nn.LSTMCell) else {"h": zeros}

    def forward(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """One step: features (N, F) and the state before to outputs (N, H) and the state after."""
        if isinstance(self.cell, nn.LSTMCell):
            h, c = self.cell(features, (state["h"], state["c"]))
            return h, {"h": h, "c": c}
        h = self.cell(features, state["h"])
        return h, {"h": h}

    def unroll(self, features: Tensor, state: State, start: Tensor) -> tuple[Tensor, list[State], list[State]]:
        """L steps: features (L, N, F), the state before the first, and `start` (L, N), true where an episode begins.

        Returns outputs (L, N, H), and L states each before a step, set back where an episode begins, and after it.
        """
        outputs, before, after = [], [], []
        for x, begins in zip(features.unbind(0), start.unbind(0), strict=True):
            keep = (~begins)[:, None]
            before.append({name: value * keep for name, value in state.items()})
            out, state = self(x, before[-1])
            outputs.append(out)
            after.append(state)
        return torch.stack(outputs), before, after
