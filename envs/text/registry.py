"""Which text environments there are: `text/NAME`, and `text/textarena:ID` and `text/gem:ID` for those of packages.

Importing this file imports no environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ctrlrl.envs.text.base import TextEnv, TextTask
from ctrlrl.errors import UsageError, nearest

_PREFIX = "text/"
_KINDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text", "None": "nothing"}
"""By the names in annotations."""


def _made(place: str, **kwargs: Any) -> TextEnv:
    """The environment of a class, `file:Class`, of this folder.

    Raises:
        UsageError: it has no such argument, or the value is of another kind.
    """
    module, _, name = place.partition(":")
    make: Callable[..., TextEnv] = getattr(importlib.import_module(f"ctrlrl.envs.text.{module}"), name)
    known = {key: str(p.annotation).split(" | ") for key, p in inspect.signature(make).parameters.items()}
    for key, value in kwargs.items():
        if key not in known:
            raise UsageError(f"{name} has no argument {key!r}.{nearest(key, known)} It has: {', '.join(known)}")
        kind = "None" if value is None else type(value).__name__
        if kind not in known[key] and not (kind == "int" and "float" in known[key]):
            kinds = " or ".join(_KINDS[kind] for kind in known[key])
            raise UsageError(f"{name}: argument {key} takes {kinds}, got {value!r}")
    return make(**kwargs)


def _babyai(level: str, summary: str) -> TextTask:
    return TextTask(partial(_made, "babyai:BabyAI"), "minigrid", summary, {"level": f"BabyAI-{level}-v0"})


TEXT_TASKS: dict[str, TextTask] = {
    "text/BabyAI-GoToLocalS5N2": _babyai("GoToLocalS5N2", "go to an object among 2 others, a room of 3 by 3"),
    "text/BabyAI-GoToLocalS8N3": _babyai("GoToLocalS8N3", "go to an object among 3 others, a room of 6 by 6"),
    "text/BabyAI-GoToLocal": _babyai("GoToLocal", "go to an object among 8 others, a room of 6 by 6"),
    "text/BabyAI-GoToRedBallNoDists": _babyai("GoToRedBallNoDists", "go to the only object, a room of 6 by 6"),
    "text/BabyAI-PickupLoc": _babyai("PickupLoc", "pick up an object that may be named by where it was"),
    "text/FrozenLake": TextTask(partial(_made, "frozen_lake:FrozenLake"), summary="cross a frozen lake with holes"),
    "text/Maze": TextTask(partial(_made, "maze:Maze"), summary="find the way in a maze, knowing where one is"),
    "text/MazePartial": TextTask(
        partial(_made, "maze:Maze"), summary="find the way in a maze, seeing walls only", kwargs={"observed": "partial"}
    ),
    "text/GuessNumber": TextTask(partial(_made, "guess:GuessNumber"), summary="guess a number of 16 by hints"),
    "text/Calculator": TextTask(partial(_made, "calculator:Calculator"), summary="answer with a calculator's help"),
}
_PACKAGES: dict[str, tuple[TextTask, str]] = {
    "text/textarena:": (TextTask(partial(_made, "bridges:TextArena"), "textarena"), "textarena"),
    "text/gem:": (TextTask(partial(_made, "bridges:Gem"), "gem"), "gem-llm"),
}
"""By how the ID begins: what makes the game named after it, and what pip installs for it."""


def is_text_task(env: object) -> bool:
    """Whether `env` is the ID of a text environment, known or not: it begins with `text/`."""
    return isinstance(env, str) and env.startswith(_PREFIX)


def make_text_env(env_id: str, kwargs: Mapping[str, Any] | None = None) -> TextEnv:
    """The environment of an ID.

    Args:
        env_id: of `TEXT_TASKS`, or `text/BabyAI-LEVEL`, `text/textarena:ID`, `text/gem:ID`.
        kwargs: arguments of its class, from the user.

    Raises:
        UsageError: there is none, it does not take these arguments, or its package is not installed.
    """
    task = TEXT_TASKS.get(env_id)
    package = task.package if task else ""
    arguments: dict[str, Any] = dict(task.kwargs) if task else {}
    prefix = next((prefix for prefix in _PACKAGES if env_id.startswith(prefix)), None)
    if prefix:
        (task, package), arguments = _PACKAGES[prefix], {"game": env_id.removeprefix(prefix)}
    elif task is None and env_id.startswith("text/BabyAI-"):
        task = _babyai(env_id.removeprefix("text/BabyAI-"), "")
        package, arguments = task.package, dict(task.kwargs)
    if task is None:
        raise UsageError(
            f"there is no text environment {env_id!r}.{nearest(env_id, TEXT_TASKS)} There are: "
            f"{', '.join(TEXT_TASKS)}, and by packages {', '.join(name + 'ID' for name in _PACKAGES)}"
        )
    if task.package and importlib.util.find_spec(task.package) is None:
        raise UsageError(f"{env_id} needs a package that is not installed: pip install {package}")
    made: TextEnv = task.make(**{**arguments, **(kwargs or {})})
    return made
