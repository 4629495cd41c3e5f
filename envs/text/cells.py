"""Cells of a grid, (row, column), and the ways between them."""

from __future__ import annotations

from collections.abc import Set

Cell = tuple[int, int]


def goal_at(cell: Cell) -> str:
    """The goal that a cell is, in words."""
    return f"go to row {cell[0]} column {cell[1]}"


def steps_to(goal: Cell, free: Set[Cell]) -> dict[Cell, int]:
    """The least number of steps to `goal` from each cell of `free` that is connected with it, `goal` itself 0."""
    steps, queue = {goal: 0}, [goal]
    for row, column in queue:  # grows as it is walked through
        for beside in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if beside in free and beside not in steps:
                steps[beside] = steps[row, column] + 1
                queue.append(beside)
    return steps
