"""A language model for a training: the text environments it acts in, and the networks it stands for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.errors import UsageError
from ctrlrl.language.backbone import LanguageBackbone
from ctrlrl.language.model import LanguageModel, digest_of, ends_of, load_model, load_tokenizer
from ctrlrl.language.text_vector import TextVector
from ctrlrl.nn.policy import Policy


def _tokenizer(path: str | None) -> Any:
    """That of a model, read once as long as its file is the same."""
    file = Path(path or "") / "tokenizer.json"
    return _read_tokenizer(path, file.stat().st_mtime_ns if file.is_file() else None)


@functools.lru_cache(1)
def _read_tokenizer(path: str | None, changed: int | None) -> Any:
    return load_tokenizer(LanguageConfig(model=path))


def text_environments(
    env_id: str,
    config: LanguageConfig,
    *,
    num_envs: int,
    env_kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
    achieved: bool = False,
) -> TextVector:
    """`num_envs` text environments for the model that `config` names; `achieved` as `TextVector` takes it.

    Raises:
        UsageError: there is no such environment or tokenizer, or the environment does not take these arguments.
    """
    tokenizer = _tokenizer(config.model)
    envs = [make_text_env(env_id, dict(env_kwargs)) for _ in range(num_envs)]
    return TextVector(envs, tokenizer, config, name=env_id, device=device, achieved=achieved)


def backbone(config: LanguageConfig) -> LanguageBackbone:
    """The networks of an agent whose policy is the model that `config` names.

    Raises:
        UsageError: there is no such model.
    """
    model = load_model(config)
    tokenizer = _tokenizer(config.model)
    require_fits(config, model.longest)
    model.words = min(model.vocabulary, len(tokenizer))
    return LanguageBackbone(model, config, word_starts(tokenizer, model.vocabulary), ends_of(tokenizer, config.model))


def digests(config: LanguageConfig, policy: Policy) -> dict[str, str]:
    """By what a run knows its model again: hashes of the weights of `policy` that are frozen, and of the tokenizer's
    words."""
    model = next(module for module in policy.modules() if isinstance(module, LanguageModel))
    return {"frozen": digest_of(model), "tokenizer": words_digest(config)}


def words_digest(config: LanguageConfig) -> str:
    """A hash of the words of the model's tokenizer, and of their ids."""
    words = json.dumps(_tokenizer(config.model).get_vocab(), sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


def differing(config: LanguageConfig, policy: Policy, before: dict[str, str]) -> list[str]:
    """In what the model of `policy` is another one than the one of these `digests`."""
    return [what for what, value in digests(config, policy).items() if before.get(what, value) != value]


def require_fits(config: LanguageConfig, longest: int) -> None:
    """Raise UsageError unless a model that reads `longest` tokens can read the longest prompt and its answer."""
    total = config.goal_tokens + config.prompt_tokens + config.candidate_tokens
    if total > longest:
        raise UsageError(
            f"the model reads {longest:,} tokens; language.goal_tokens, prompt_tokens and candidate_tokens are "
            f"{config.goal_tokens} + {config.prompt_tokens} + {config.candidate_tokens} = {total:,}"
        )


def word_starts(tokenizer: Any, size: int) -> torch.Tensor:
    """Which of `size` tokens begin a word (V,), bool: those that stand for a blank before them, or, where words are
    tokens, all."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    marks = tuple(piece is not None and piece.startswith(("Ġ", "▁", " ")) for piece in pieces)
    begins = torch.tensor(marks) if any(marks) else torch.ones(len(pieces), dtype=torch.bool)
    return torch.cat([begins, torch.zeros(size - len(begins), dtype=torch.bool)])
