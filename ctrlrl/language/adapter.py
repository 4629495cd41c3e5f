"""A language model for a training: the text environments it acts in, and the networks it stands for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.language.backbone import LanguageBackbone
from ctrlrl.language.model import load_model, load_tokenizer
from ctrlrl.language.text_vector import TextVector


@functools.lru_cache(1)
def _tokenizer(path: str | None) -> Any:
    return load_tokenizer(LanguageConfig(model=path))


def text_environments(
    env_id: str,
    config: LanguageConfig,
    *,
    num_envs: int,
    env_kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> TextVector:
    """`num_envs` text environments for the model that `config` names.

    Raises:
        UsageError: there is no such environment or tokenizer, or the environment does not take these arguments.
    """
    tokenizer = _tokenizer(config.model)
    envs = [make_text_env(env_id, dict(env_kwargs)) for _ in range(num_envs)]
    return TextVector(envs, tokenizer, config, name=env_id, device=device)


def backbone(config: LanguageConfig) -> LanguageBackbone:
    """The networks of an agent whose policy is the model that `config` names.

    Raises:
        UsageError: there is no such model.
    """
    model = load_model(config)
    tokenizer = _tokenizer(config.model)
    return LanguageBackbone(model, config, word_starts(tokenizer, model.vocabulary))


def word_starts(tokenizer: Any, size: int) -> torch.Tensor:
    """Which of `size` tokens begin a word (V,), bool: those that stand for a blank before them, or, where words are
    tokens, all."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    marks = tuple(piece is not None and piece.startswith(("Ġ", "▁", " ")) for piece in pieces)
    begins = torch.tensor(marks) if any(marks) else torch.ones(len(pieces), dtype=torch.bool)
    return torch.cat([begins, torch.zeros(size - len(begins), dtype=torch.bool)])
