"""`ctrlrl language make-lm --env ID --out DIR`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.config import JsonObject, LanguageConfig
from ctrlrl.errors import UsageError, nearest
from ctrlrl.language.tiny_config import TinyConfig

COMMANDS = {
    "make-lm": "a tiny causal language model, trained by imitation of a scripted demonstrator",
    "export": "a run's language model as a folder of transformers, or its adapter as one of peft",
}


_TOLD = ("form", "history", "prompt_tokens", "goal_tokens", "candidate_tokens", "max_candidates")
"""What a tiny model and its training must have alike."""


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<7}  {text}" for name, text in COMMANDS.items())
        print(f"usage: ctrlrl language COMMAND ...\n\n{lines}\n\nctrlrl language COMMAND --help lists its options.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"no command 'language {name}'.{nearest(name, COMMANDS)} There are: {', '.join(COMMANDS)}")
    return _make_lm(rest) if name == "make-lm" else _export(rest)


@dataclass(frozen=True, kw_only=True)
class MakeLM(TinyConfig):
    """Make a tiny causal language model for a text environment, as a folder that transformers reads.

    Its tokenizer has a token for each word of the task. It learns from a scripted demonstrator's episodes.
    """

    env: str
    """Text environment with a demonstrator: text/BabyAI-GoToLocalS5N2."""
    out: str
    """Folder of the model; must not hold anything yet."""
    env_kwargs: JsonObject = field(default_factory=dict)
    """Arguments of the environment, as JSON."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """How prompts are made; trainings from the model must make them alike."""


def _make_lm(arguments: Sequence[str]) -> int:
    options = parse(MakeLM, arguments, "language make-lm")
    from ctrlrl.envs.text.registry import make_text_env
    from ctrlrl.language.make_lm import make_lm

    figures = make_lm(
        lambda: make_text_env(options.env, dict(options.env_kwargs)),
        options.out,
        options,
        language=options.language,
        say=print,
    )
    right, task = f"{figures['accuracy']:.1%}", f"{options.env}{_arguments_of(options)}"
    print(
        f"{options.out}: {figures['parameters']:,} weights, {figures['words']} words, right in {right} of the turns. "
        f"Train it: ctrlrl train ppo --env {task} --language.model {options.out}"
    )
    if figures["unknown"]:
        print(
            f"{figures['unknown']:.0%} of the turns of other episodes have words that it does not know: more "
            "--episodes, or, where these are numbers, --digits"
        )
    return 0


def _arguments_of(options: MakeLM) -> str:
    """Those of the environment, and of how it is told, as they are typed."""
    words = f" --env-kwargs {shlex.quote(json.dumps(options.env_kwargs))}" if options.env_kwargs else ""
    for name in _TOLD:
        if (value := getattr(options.language, name)) != getattr(LanguageConfig(), name):
            words += f" --language.{name.replace('_', '-')} {value}"
    return words


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's language model as an ordinary folder, with its tokenizer; an adapter is merged into the weights."""

    run: Positional[str]
    """Run folder."""
    out: str
    """Folder of the model; must not hold anything yet."""
    checkpoint: str = "best"
    """best, last, or a checkpoint's name."""
    adapter: bool = False
    """Write the LoRA adapter alone, as peft reads it."""


def _export(arguments: Sequence[str]) -> int:
    options = parse(Export, arguments, "language export")
    from ctrlrl.training.export_language import export_language  # imports torch: only now

    export_language(options.run, options.out, checkpoint=options.checkpoint, adapter=options.adapter)
    print(f"{options.out}: the {'adapter' if options.adapter else 'model'} of {options.run}")
    return 0
