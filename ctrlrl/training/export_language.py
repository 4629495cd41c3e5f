"""The language model of a run, as other programs read it."""

from __future__ import annotations

from pathlib import Path

from ctrlrl.errors import UsageError
from ctrlrl.nn.actor import TokenHead
from ctrlrl.training.loading import load


def export_language(run: str | Path, out: str | Path, *, checkpoint: str = "best", adapter: bool = False) -> None:
    """Write the policy's model and its tokenizer as a folder of transformers; with `adapter` its adapter, as peft does.

    Raises:
        UsageError: the run has no language model, or no adapter; or the folder holds something.
    """
    from ctrlrl.language.model import LanguageModel, load_tokenizer
    from ctrlrl.language.prompts import note_manner

    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not empty: choose another --out; nothing was overwritten")
    loaded = load(run, checkpoint=checkpoint)
    models = [module for module in loaded.policy.modules() if isinstance(module, LanguageModel)]
    if not models:
        raise UsageError(f"{loaded.path} has no language model; `ctrlrl export` writes its policy as a bundle")
    if adapter and not models[0].adapted:
        raise UsageError(f"{loaded.path} trained all weights and has no adapter: leave --adapter out")
    path.mkdir(parents=True, exist_ok=True)
    models[0].save(path, adapter=adapter)
    load_tokenizer(loaded.config.language).save_pretrained(path)
    head = getattr(loaded.policy, "head", None)
    note_manner(path, loaded.config.language, tokens=isinstance(head, TokenHead))
