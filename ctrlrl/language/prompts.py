"""What a language model is told: the goal, what was before, what is shown now, and where its answer goes.

The goal is a text of its own that stands first, so that another can be put in its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrlrl.config import LanguageConfig
from ctrlrl.errors import UsageError

_FILE = "ctrlrl.json"
"""In a model's folder: how what it learned from was told."""


class Prompts:
    """Plain text, for models of no kind of conversation."""

    def goal(self, goal: str) -> str:
        """How the goal stands at the beginning; nothing where there is none."""
        return f"goal : {goal}\n" if goal else ""

    def prompt(self, goal: str, observation: str, past: Sequence[tuple[str, str]], history: int) -> str:
        """What follows it: the last `history` of the turns before, what is shown now, and where the answer goes. It
        does not end in a blank: the answer begins with one, so that a word has the same tokens there as anywhere."""
        before = "".join(
            f"state : {shown}\naction :{self.command(answer)}\n" for shown, answer in latest(past, history)
        )
        return f"{before}state : {observation}\naction :"

    def command(self, command: str) -> str:
        """How a command is said after it."""
        return f" {command}"


class ChatPrompts(Prompts):
    """A conversation, by the template of an instructed model: the goal is what the system says, what is shown the
    user's, and answers are the assistant's.

    Args:
        tokenizer: that has the template.
        name: of the model, for messages.

    Raises:
        UsageError: it has none.
    """

    def __init__(self, tokenizer: Any, name: str | None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"the tokenizer of {name} has no chat template: leave language.chat out")
        self._tokenizer, self._name = tokenizer, name

    def goal(self, goal: str) -> str:
        return self._told([_said("system", goal)], answer=False) if goal else ""

    def prompt(self, goal: str, observation: str, past: Sequence[tuple[str, str]], history: int) -> str:
        first = [_said("system", goal)] if goal else []
        turns = [m for shown, a in latest(past, history) for m in (_said("user", shown), _said("assistant", a))]
        whole, begin = self._told([*first, *turns, _said("user", observation)], answer=True), self.goal(goal)
        if not whole.startswith(begin):
            raise UsageError(
                f"the chat template of {self._name} does not begin with what the system says: leave language.chat out"
            )
        return whole.removeprefix(begin)

    def command(self, command: str) -> str:
        return command

    def _told(self, messages: list[dict[str, str]], *, answer: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # whatever the template raises, of roles it does not know
            raise UsageError(
                f"the chat template of {self._name} refuses a system's, a user's and an assistant's messages: {error}; "
                "leave language.chat out"
            ) from None
        return text


def note_manner(folder: Path, config: LanguageConfig, *, tokens: bool) -> None:
    """Write into the folder of a model how it was told what it learned from, and whether it wrote its answers."""
    (folder / _FILE).write_text(json.dumps(_manner(config, tokens), indent=2) + "\n")


def other_manner(config: LanguageConfig, *, tokens: bool) -> str:
    """A remark where the model that `config` names has learned from what was told otherwise; else nothing, as of
    folders that do not say."""
    try:
        noted = json.loads((Path(config.model or "") / _FILE).read_text())
    except (OSError, ValueError):
        return ""
    if not isinstance(noted, dict):
        return ""
    differs = [(k, noted[k], now) for k, now in _manner(config, tokens).items() if k in noted and noted[k] != now]
    if not differs:
        return ""
    said = ", ".join(f"language.{name} {before} and here it is {now}" for name, before, now in differs)
    return f"{config.model} has learned with {said}, so that it begins with less than it knows"


def _manner(config: LanguageConfig, tokens: bool) -> dict[str, Any]:
    return {"form": "tokens" if tokens else "candidates", "history": config.history, "chat": config.chat}


def latest(past: Sequence[tuple[str, str]], history: int) -> Sequence[tuple[str, str]]:
    """The last `history` turns."""
    return past[-history:] if history else ()


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
