"""A lake of ice with holes: from one corner to the opposite one, with or without slipping.

Cells are counted from 1, rows from the top. Said are the own cell and what lies around it:

    row 1 of 4 , column 2 of 4 . up edge , down ice , left ice , right hole .

The goal's cell looks like others, and the goal names it, so that any cell of ice could be the goal.
"""

from __future__ import annotations

from ctrlrl.envs.text.base import TextState, TextStep, matched
from ctrlrl.envs.text.cells import Cell, goal_at, steps_to
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError

_MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
"""Clockwise: one slips to the neighbours of a command."""
_LAYOUTS = {
    4: ("....", ".O..", "..O.", "O..."),
    8: ("........", "..O.....", "....O..O", ".O......", "...O..O.", ".O...O..", "....O...", ".O......"),
}
"""The fixed lakes; O is a hole."""
_DISCOUNT, _SWEEPS = 0.99, 150
"""Of the expert on slippery ice."""


class FrozenLake(Replayed):
    """From the top left to the bottom right; reward 1 there, and a hole ends the episode."""

    max_achieved = 1

    def __init__(
        self,
        size: int = 4,
        *,
        slippery: bool = False,
        fixed: bool = False,
        holes: float = 0.2,
        time_penalty: float = 0.0,
        invalid_penalty: float = 0.0,
        max_turns: int | None = None,
    ) -> None:
        """Make the lake.

        Args:
            size: rows, and columns; a fixed lake has 4 or 8.
            slippery: go where one wants, or to either side of that, each with probability 1/3.
            fixed: the same lake always, in place of one by the seed.
            holes: probability of each cell of a random lake; lakes that cannot be crossed are drawn anew.
            time_penalty: taken from the reward of each turn.
            invalid_penalty: taken, besides, where the answer is no command.
            max_turns: of an episode; None for 25 a row.

        Raises:
            UsageError: there is no such lake.
        """
        if size < 2 or (fixed and size not in _LAYOUTS):
            raise UsageError(f"a lake has 2 or more rows, and a fixed one 4 or 8: got size = {size}")
        if not 0 <= holes <= 0.5:
            raise UsageError(f"holes is a probability from 0 to 0.5, got {holes}")
        super().__init__(25 * size if max_turns is None else max_turns)
        self.size, self.slippery, self.fixed, self.holes = size, slippery, fixed, holes
        self.time_penalty, self.invalid_penalty = time_penalty, invalid_penalty
        self._cell: Cell = (1, 1)
        self._steps: dict[Cell, int] = {}
        self._worth: dict[Cell, float] = {}

    @property
    def lake(self) -> tuple[str, ...]:
        """The rows of this episode: `.` is ice from which the goal can be reached, all else is O."""
        cells = range(1, self.size + 1)
        return tuple("".join("." if (row, column) in self._steps else "O" for column in cells) for row in cells)

    def _begin(self) -> TextState:
        self._cell, self._worth = (1, 1), {}
        while True:
            if self.fixed:
                rows = _LAYOUTS[self.size]
            else:
                drawn = self._generator.random((self.size, self.size)) < self.holes
                rows = tuple("".join("O" if hole else "." for hole in row) for row in drawn.tolist())
            ice = {(r + 1, c + 1) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "."}
            self._steps = steps_to((self.size, self.size), ice | {(1, 1), (self.size, self.size)})
            if (1, 1) in self._steps:
                return self._look()

    def _answer(self, answer: str) -> TextStep:
        command = matched(answer, tuple(_MOVES))
        if command is None:
            return TextStep(self._look(), -self.time_penalty - self.invalid_penalty, valid=False)
        ways = self._ways(self._cell, command)
        self._cell = ways[int(self._generator.integers(len(ways)))] if self.slippery else ways[0]
        success, over = self._cell == (self.size, self.size), self._cell not in self._steps
        reward = success - self.time_penalty
        return TextStep(self._look(), reward, success or over, success=success if success or over else None)

    def reward_of(self, goal: str, state: TextState) -> tuple[float, bool]:
        reached = goal in state.achieved
        return reached - self.time_penalty, reached or not state.achieved  # a hole is no goal

    def expert(self) -> str:
        """The shortest way; where one slips, what dynamic programming finds best, with a discount of 0.99 a turn."""
        if not self._worth:
            self._worth = {cell: _DISCOUNT**steps for cell, steps in self._steps.items()}
            inner = [cell for cell, steps in self._steps.items() if steps]
            for _ in range(_SWEEPS if self.slippery else 0):
                for cell in inner:
                    self._worth[cell] = _DISCOUNT * max(self._mean_worth(cell, command) for command in _MOVES)
        return max(_MOVES, key=lambda command: self._mean_worth(self._cell, command))

    def _mean_worth(self, cell: Cell, command: str) -> float:
        ways = self._ways(cell, command)
        return sum(self._worth.get(way, 0.0) for way in ways) / len(ways)

    def _ways(self, cell: Cell, command: str) -> list[Cell]:
        """The cells where a command may lead, equally likely."""
        names = list(_MOVES)
        at = names.index(command)
        turns = (0, -1, 1) if self.slippery else (0,)
        return [self._beside(cell, names[(at + turn) % 4]) or cell for turn in turns]

    def _beside(self, cell: Cell, command: str) -> Cell | None:
        """The cell in that direction of one; None at the edge."""
        row, column = cell[0] + _MOVES[command][0], cell[1] + _MOVES[command][1]
        return (row, column) if 1 <= row <= self.size and 1 <= column <= self.size else None

    def _look(self) -> TextState:
        around = []
        for command in _MOVES:
            cell = self._beside(self._cell, command)
            around.append(f"{command} {'edge' if cell is None else 'ice' if cell in self._steps else 'hole'}")
        return TextState(
            f"row {self._cell[0]} of {self.size} , column {self._cell[1]} of {self.size} . {' , '.join(around)} .",
            tuple(_MOVES),
            goal_at((self.size, self.size)),
            (goal_at(self._cell),) if self._cell in self._steps else (),
        )
