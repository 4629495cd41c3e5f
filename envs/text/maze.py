"""A maze of two joined Ts above a third one, after the mazes of LMRL-Gym (Abdulhai et al. 2023), with a layout of ours.

Cells are counted from 0, with the walls around; a start is any cell but the goal. What is said:

    you are in row 4 column 5 . walls up , down .        fully observed
    walls up , down .                                    partially observed

The goal names its cell in both. Rewards are as in LMRL-Gym: -1 for a step, -4 for what is no command, 0 at the goal.
"""

from __future__ import annotations

from ctrlrl.envs.text.base import TextState, TextStep, matched
from ctrlrl.envs.text.cells import Cell, goal_at, steps_to
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError

LAYOUT = (
    "#############",
    "#.....#.....#",
    "###.#####.###",
    "###.#####.###",
    "#...........#",
    "######.######",
    "######.######",
    "#...........#",
    "#############",
)
GOAL: Cell = (7, 11)
_MOVES = {"move up": (-1, 0), "move down": (1, 0), "move left": (0, -1), "move right": (0, 1)}
_FREE = {(r, c) for r, row in enumerate(LAYOUT) for c, cell in enumerate(row) if cell == "."}


class Maze(Replayed):
    """From a random cell to the goal; a step against a wall is a turn that changes nothing."""

    max_achieved = 1

    def __init__(self, observed: str = "full", *, random_goal: bool = False, max_turns: int = 100) -> None:
        """Make the maze.

        Args:
            observed: `full` with the own cell, `partial` with the walls around it only.
            random_goal: another goal in each episode, in place of the bottom right.
            max_turns: of an episode.

        Raises:
            UsageError: `observed` is neither.
        """
        if observed not in ("full", "partial"):
            raise UsageError(f"observed is full or partial, got {observed!r}")
        super().__init__(max_turns)
        self.observed, self.random_goal = observed, random_goal
        self._cell = self._goal = GOAL
        self._steps: dict[Cell, int] = {}

    @property
    def distance(self) -> int:
        """Steps to the goal from here."""
        return self._steps[self._cell]

    def _begin(self) -> TextState:
        free = sorted(_FREE)
        self._goal = free[int(self._generator.integers(len(free)))] if self.random_goal else GOAL
        free.remove(self._goal)
        self._cell = free[int(self._generator.integers(len(free)))]
        self._steps = steps_to(self._goal, _FREE)
        return self._look()

    def _answer(self, answer: str) -> TextStep:
        command = matched(answer, tuple(_MOVES))
        if command is None:
            return TextStep(self._look(), -4.0, valid=False)
        self._cell = self._after(command)
        reached = self._cell == self._goal
        return TextStep(self._look(), 0.0 if reached else -1.0, reached, success=True if reached else None)

    def reward_of(self, goal: str, state: TextState) -> tuple[float, bool]:
        """As if the answer had been valid."""
        reached = goal in state.achieved
        return 0.0 if reached else -1.0, reached

    def expert(self) -> str:
        """A shortest way; it knows the own cell always."""
        return min(_MOVES, key=lambda command: self._steps[self._after(command)])

    def _after(self, command: str) -> Cell:
        cell = (self._cell[0] + _MOVES[command][0], self._cell[1] + _MOVES[command][1])
        return cell if cell in _FREE else self._cell

    def _look(self) -> TextState:
        walls = [command.removeprefix("move ") for command in _MOVES if self._after(command) == self._cell]
        around = f"walls {' , '.join(walls)} ." if walls else "no walls ."
        own = f"you are in row {self._cell[0]} column {self._cell[1]} . " if self.observed == "full" else ""
        return TextState(own + around, tuple(_MOVES), goal_at(self._goal), (goal_at(self._cell),))
