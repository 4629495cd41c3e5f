"""Advantages by a critic, of single decisions; `group_advantages` has those without one.

Shapes: T control steps, N environments, D decisions (1 for a robot; the tokens of a turn for a language agent).
Decisions of a row follow each other as rows do: `reward` is earned by the decision it stands at, `discount` is what the
value after that decision is worth: 1 between the decisions of a row, gamma * (1 - terminated) after its last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Decisions:
    """What estimators look at, each (T, N, D)."""

    reward: Tensor
    discount: Tensor
    value: Tensor
    """V where the decision was made."""
    next_value: Tensor
    """V after it: of the next decision, or, where an episode was cut, of its true last observation. Where the discount
    is 0 it does not matter, but must be finite."""
    end: Tensor
    """bool: traces stop here, since what follows is another episode, or no transition."""
    mask: Tensor
    """bool: whether there is such a decision."""


def ends(ended: Tensor, valid: Tensor) -> Tensor:
    """Where traces stop, (T, N) bool: rows after which an episode is over, or whose successor is no transition.

    Args:
        ended: (T, N) bool, terminated or truncated.
        valid: (T, N) bool; what follows the last row counts as a transition.
    """
    return ended | ~torch.cat([valid[1:], torch.ones_like(valid[:1])])


def next_values(value: Tensor, last_value: Tensor, final_value: Tensor, cut: Tensor, mask: Tensor) -> Tensor:
    """V after each decision (T, N, D).

    Args:
        value: (T, N, D), at the decisions.
        last_value: (N,), where the rollout stops, of the observation to be acted on next.
        final_value: (T, N), of the true last observation of rows that were cut.
        cut: (T, N) bool, rows whose successor is another episode.
        mask: (T, N, D) bool; the decisions of a row come first.
    """
    after_row = torch.cat([value[1:, :, 0], last_value[None]])  # (T, N)
    after_row = torch.where(cut, final_value, after_row)
    within = torch.cat([value[:, :, 1:], after_row[..., None]], -1)
    more = torch.cat([mask[:, :, 1:], torch.zeros_like(mask[:, :, :1])], -1)  # another decision of the row follows
    return torch.where(more, within, after_row[..., None])


def gae(decisions: Decisions, trace: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eqs. 11 and 16).

    delta = r + discount * V' - V;  A = delta + lambda * discount * (1 - end) * A'. A time limit ends the trace but not
    the bootstrap, a termination ends both. `trace` is lambda; 0 where there is no decision.
    """
    d = decisions
    delta = d.reward + d.discount * d.next_value - d.value
    carried = trace * d.discount * ~d.end
    following = torch.zeros_like(delta[0, :, 0])
    whole = bool(d.mask.all())
    # One after the other, (N,) each, from the last on.
    deltas, traces, masks = (x.transpose(1, 2).flatten(0, 1).flip(0).unbind() for x in (delta, carried, d.mask))
    backwards = []
    for i in range(len(deltas)):
        here = torch.addcmul(deltas[i], traces[i], following)
        # past a decision that is not there: none in the row's rest, or a row that is no transition
        following = here if whole else torch.where(masks[i], here, following)
        backwards.append(following)
    rows, envs, each = delta.shape
    advantage = torch.stack(backwards).flip(0).view(rows, each, envs).transpose(1, 2)
    return advantage if whole else advantage * d.mask
