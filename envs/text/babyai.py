"""Levels of BabyAI (Chevalier-Boisvert et al. 2019) in words, after BabyAI-Text of GLAM (Carta et al. 2023).

The agent sees a square of 7 by 7 cells before it, itself in the middle of the nearest row, and not through walls and
closed doors. Said are the nearest walls in front, left and right, every object that is seen, nearest first, and what is
carried. All is lower case, with blanks around commas and full stops, so that words can be tokens:

    you see a wall 2 steps forward , a red ball 1 step forward and 2 steps right . you carry a blue key .

What differs from BabyAI-Text: rewards do not fall with time, positions that are beside the agent have no "0 steps
forward", and the mission is the goal, no part of what is seen.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ctrlrl.envs.text.babyai_expert import BabyAIExpert
from ctrlrl.envs.text.base import TextState, TextStep, imported, matched
from ctrlrl.envs.text.replayed import Replayed
from ctrlrl.errors import UsageError, nearest

COMMANDS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
"""In the order of minigrid's actions."""
_FORWARD, _DONE = 2, 6
_DOORS = ("open", "closed", "locked")


class BabyAI(Replayed):
    """One level; reward 1 for success.

    What changes nothing (to go forward against a wall) is a valid answer, and takes a turn.
    """

    max_achieved = 2  # the level's own goal, and what is in front

    def __init__(
        self,
        level: str = "BabyAI-GoToLocalS5N2-v0",
        *,
        admissible: bool = False,
        terse: bool = False,
        time_penalty: float = 0.0,
        invalid_penalty: float = 0.0,
        max_turns: int | None = None,
    ) -> None:
        """Make the level.

        Args:
            level: minigrid's ID.
            admissible: offer only the commands that change something.
            terse: say `red ball 1 forward 2 right` in place of sentences, about half as many words.
            time_penalty: taken from the reward of each turn.
            invalid_penalty: taken, besides, where the answer is no command.
            max_turns: of an episode; None for minigrid's limit for one instruction, and 64 where that is less.

        Raises:
            UsageError: minigrid is not installed, or has no such level.
        """
        self._env = _level(level)
        if max_turns is None:
            rooms = self._env.num_rows * self._env.num_cols
            max_turns = max(64, self._env.max_steps or self._env.room_size**2 * rooms)
        super().__init__(max_turns)
        self.level, self.admissible, self.terse = level, admissible, terse
        self.time_penalty, self.invalid_penalty = time_penalty, invalid_penalty
        self._actions: list[int] = []
        self._names: Counter[str] = Counter()
        self._shown = TextState("")
        self._expert: BabyAIExpert | None = None

    def _begin(self) -> TextState:
        self._env.np_random = self._generator
        with _quiet():
            image = self._env.reset()[0]["image"]
        self._env.max_steps = self.max_turns  # its own limit may be shorter, and its reward is negative beyond
        self._actions = []
        self._names = Counter(self._name(cell) for cell in self._env.grid.grid if cell is not None)
        self._shown = self._look(image, success=False)
        return self._shown

    def _answer(self, answer: str) -> TextStep:
        command = matched(answer, self._shown.commands)
        if command is None:
            return TextStep(self._shown, -self.time_penalty - self.invalid_penalty, valid=False)
        self._actions.append(COMMANDS.index(command))
        obs, reward, terminated, _, _ = self._env.step(self._actions[-1])
        success = bool(terminated and reward > 0)
        self._shown = self._look(obs["image"], success)
        return TextStep(
            self._shown, success - self.time_penalty, bool(terminated), success=success if terminated else None
        )

    def reward_of(self, goal: str, state: TextState) -> tuple[float, bool]:
        reached = goal in state.achieved
        return reached - self.time_penalty, reached

    def expert(self) -> str | None:
        """What minigrid's bot does; None where it does not know how to go on."""
        if self._expert is None:
            self._expert = BabyAIExpert(_level(self.level))
        with _quiet():
            action = self._expert.advise(self._begun, self._actions)
        if action != _DONE:
            return None if action is None else COMMANDS[action]
        # The goal was reached before anything was done, which the level notices with the next action.
        front = self._front()
        stays = front is not None and not front.can_overlap()
        return next(
            command
            for command in ("go forward", "pick up", "toggle", "turn left")
            if command in self._shown.commands and (stays or command != "go forward")
        )

    def close(self) -> None:
        self._env.close()

    def _front(self) -> Any:
        """The object before the agent, or None."""
        return self._env.grid.get(*self._env.front_pos)

    def _look(self, image: Any, success: bool) -> TextState:
        goal = " ".join(self._env.mission.lower().replace(",", " , ").split())
        achieved = {goal} if success else set()
        front, instruction = self._front(), self._env.instrs
        if type(instruction).__name__ == "GoToInstr" and instruction.desc.loc is None and front is not None:
            name = self._name(front)
            if front.type in ("ball", "box", "key", "door"):
                achieved.add(f"go to {'a' if self._names[name] > 1 else 'the'} {name}")
        return TextState(
            described(image, self._env.carrying, self.terse),
            COMMANDS if not self.admissible else tuple(COMMANDS[i] for i in range(6) if self._changes(i)),
            goal,
            tuple(sorted(achieved)),
        )

    def _name(self, cell: Any) -> str:
        """Of an object, with its colour where the level's instruction names one."""
        coloured = getattr(getattr(self._env.instrs, "desc", None), "color", None) is not None
        return f"{cell.color} {cell.type}" if coloured else cell.type

    def _changes(self, action: int) -> bool:
        """Whether an action changes something, by the rules of minigrid."""
        front, carried = self._front(), self._env.carrying
        if action == _FORWARD:
            return front is None or front.can_overlap()
        if action == 3:
            return carried is None and front is not None and front.can_pickup()
        if action == 4:
            return carried is not None and front is None
        if action == 5:
            if front is None or front.type not in ("door", "box"):
                return False
            fits = carried is not None and carried.type == "key" and carried.color == front.color
            return front.type == "box" or not front.is_locked or fits
        return True


def described(image: Any, carried: Any, terse: bool) -> str:
    """What is seen, in words.

    Args:
        image: (7, 7, 3), minigrid's view: columns from the left, rows from the farthest, kind, colour and state.
        carried: the object that the agent carries, or None.
        terse: see `BabyAI`.
    """
    constants = imported("minigrid.core.constants", "minigrid")
    kinds, colours = constants.IDX_TO_OBJECT, constants.IDX_TO_COLOR
    cells = image.tolist()
    width, depth = len(cells), len(cells[0])
    middle, near = width // 2, depth - 1
    rays = (
        [(forward, 0) for forward in range(1, depth)],
        [(0, -side) for side in range(1, middle + 1)],
        [(0, side) for side in range(1, middle + 1)],
    )
    seen = []
    for ray in rays:
        wall = next((at for at in ray if kinds[cells[middle + at[1]][near - at[0]][0]] == "wall"), None)
        if wall is not None:
            seen.append((wall, "wall"))
    objects = []
    for column in range(width):
        for row in range(depth):
            kind, colour, state = cells[column][row]
            if kinds[kind] in ("unseen", "empty", "wall", "floor") or (column, row) == (middle, near):
                continue
            door = f"{_DOORS[state]} " if kinds[kind] == "door" else ""
            objects.append(((near - row, column - middle), f"{door}{colours[colour]} {kinds[kind]}"))
    seen += sorted(objects, key=lambda item: (item[0][0] + abs(item[0][1]), item[0], item[1]))
    if terse:
        parts = [f"{name} {_place(at, terse)}" for at, name in seen] or ["nothing"]
        return " , ".join(parts) + (f" . carry {carried.color} {carried.type}" if carried else "")
    parts = [f"{_article(name)} {name} {_place(at, terse)}" for at, name in seen] or ["nothing"]
    return f"you see {' , '.join(parts)} ." + (f" you carry a {carried.color} {carried.type} ." if carried else "")


def _place(at: tuple[int, int], terse: bool) -> str:
    """Where that is, from the agent: steps forward, and to the right or, negative, to the left."""
    forward, side = at
    ways = [(forward, "forward"), (abs(side), "left" if side < 0 else "right")]
    if terse:
        return " ".join(f"{count} {way}" for count, way in ways if count)
    return " and ".join(f"{count} step{'s' if count > 1 else ''} {way}" for count, way in ways if count)


def _article(name: str) -> str:
    return "an" if name.startswith("open") else "a"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what minigrid prints of the missions that it rejects."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _level(level: str) -> Any:
    """One of minigrid's environments, without Gymnasium's wrappers."""
    with _quiet():  # pygame greets
        imported("minigrid", "minigrid")
        gymnasium = imported("gymnasium", "gymnasium")
        known = [name for name in gymnasium.registry if name.startswith("BabyAI-")]
        if level not in known:
            raise UsageError(f"minigrid has no level {level!r} of BabyAI.{nearest(level, known)}")
        return gymnasium.make(level, disable_env_checker=True).unwrapped
