"""Causal language models: what they make of token ids, with or without a LoRA adapter.

Shapes: B rows, L tokens of a prompt, n candidates of C tokens each, H units, V tokens of the vocabulary.
Ids are int64 (or int32) with -1 where there is no token: a model's padding token may be one that also means something
(SmolLM2 pads with the token that ends a text). Prompts are padded on the left, what follows them on the right, so that
the two always touch. Positions count tokens, not columns, which GPT-2 needs and Llama does not mind.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctrlrl.config import LanguageConfig
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXTRA = "pip install 'ctrlrl[language]'"


class LanguageModel(nn.Module):
    """A causal model of `transformers`, in evaluation mode throughout: dropout would make a policy another one in the
    update than it was when it acted. Its state has what is trained; what is frozen is in the model's own folder.

    Args:
        causal: the model, with its adapter injected if it has one.
        adapter: the model of peft around it, if so.

    Attributes:
        hidden_size: H.
        vocabulary: V.
        adapted: whether there is an adapter.
    """

    def __init__(self, causal: Any, *, adapter: Any = None) -> None:
        super().__init__()
        self.causal, self.adapted = causal, adapter is not None
        self._adapter = [adapter]  # in a list: its weights are in the model
        config = causal.config
        self.hidden_size, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.longest = int(getattr(config, "max_position_embeddings", 10**9) or 10**9)
        nn.Module.train(self, False)
        self._frozen = frozenset(name for name, value in self.named_parameters() if not value.requires_grad)
        self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_back_frozen)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> LanguageModel:
        """It stays in evaluation mode."""
        return self

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Without the adapter: the model as it was before."""
        layers = [m for m in self.causal.modules() if hasattr(m, "_disable_adapters")] if self.adapted else []
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def save(self, folder: Path, *, adapter: bool = False) -> None:
        """Write an ordinary folder of transformers, an adapter merged into the weights; with `adapter` one of peft, of
        the adapter alone."""
        if adapter:
            self._adapter[0].save_pretrained(folder)
            return
        merged = copy.deepcopy(self._adapter[0]).merge_and_unload() if self.adapted else self.causal
        merged.save_pretrained(folder)

    def read(self, ids: Tensor, *, cache: bool = False) -> tuple[Tensor, Tensor, Any]:
        """Prompts (B, L), padded on the left: log-probabilities (B, V) of the next token at temperature 1, as logits,
        the last token's features (B, H), and a cache of what was read, if asked."""
        there = ids >= 0
        out = self.causal(
            input_ids=ids.clamp(min=0).long(),
            attention_mask=there.long(),
            position_ids=(there.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=cache,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.hidden_states[-1][:, -1].float(), out.past_key_values if cache else None

    def go_on(self, ids: Tensor, prompt: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any]:
        """Tokens (B, C), padded on the right, after prompts (B, L) that were read: logits (B, C, V) of the token after
        each, features (B, C, H), and the cache, with these tokens in it."""
        before, there = prompt >= 0, ids >= 0
        start = before.long().sum(-1, keepdim=True)
        out = self.causal(
            input_ids=ids.clamp(min=0).long(),
            attention_mask=torch.cat([before, there], -1).long(),
            position_ids=start + torch.arange(ids.shape[1], device=ids.device),
            cache=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        return out.logits.float(), out.hidden_states[-1].float(), out.past_key_values

    def score(
        self, prompt: Tensor, candidates: Tensor, exists: Tensor | None, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How likely each candidate follows, with one cache for all of a prompt.

        Args:
            prompt: (B, L).
            candidates: (B, n, C).
            exists: (B, n) bool; None: all of them.
            temperature: that logits are divided by.

        Returns:
            log-probabilities of each token (B, n, C), 0 where there is none; features of each candidate's last token
            (B, n, H), zeros where there is no candidate; and which tokens there are (B, n, C).
        """
        rows, n, length = candidates.shape
        there = candidates >= 0
        real = there.any(-1) if exists is None else exists & there.any(-1)
        which = real.flatten().nonzero().squeeze(-1)  # (M,)
        of_prompt, ids = which // n, candidates.flatten(0, 1)[which].long()
        first, _, cache = self.read(prompt, cache=True)
        cache.batch_select_indices(of_prompt)
        logits, features, _ = self.go_on(ids, prompt[of_prompt], cache)
        before_each = torch.cat([first[of_prompt][:, None], logits[:, :-1]], 1) / temperature  # (M, C, V)
        token = ids.clamp(min=0)
        log_prob = before_each.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        log_prob = log_prob * (ids >= 0)
        last = ((ids >= 0).sum(-1) - 1).clamp(min=0)
        at_last = features[torch.arange(len(ids), device=ids.device), last]
        scores = log_prob.new_zeros(rows * n, length).index_copy(0, which, log_prob)
        ends = at_last.new_zeros(rows * n, at_last.shape[-1]).index_copy(0, which, at_last)
        return scores.view(rows, n, length), ends.view(rows, n, -1), there & real.unsqueeze(-1)


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    assert isinstance(module, LanguageModel)
    for name in module._frozen:
        state.pop(prefix + name, None)


def _put_back_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    assert isinstance(module, LanguageModel)
    parameters = dict(module.named_parameters())
    for name in module._frozen:
        state.setdefault(prefix + name, parameters[name].detach())


def load_tokenizer(config: LanguageConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.model`.

    Raises:
        UsageError: transformers is missing, or there is no tokenizer.
    """
    transformers = require_transformers()
    path = _folder(config)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer at {path}: {' '.join(str(error).split())[:300]}") from None
    return tokenizer


def load_model(config: LanguageConfig) -> LanguageModel:
    """The language model that `config` names, with an adapter where it asks for one.

    Raises:
        UsageError: transformers or peft is missing, there is no causal model, or nothing that could be adapted.
    """
    transformers = require_transformers()
    path = _folder(config)
    try:
        causal = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"no causal language model at {path}: {' '.join(str(error).split())[:300]}") from None
    if not config.lora_rank:
        return LanguageModel(causal)
    adapter = _with_adapter(causal, config)
    return LanguageModel(adapter.get_base_model(), adapter=adapter)


def _with_adapter(causal: Any, config: LanguageConfig) -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(f"language.lora_rank needs peft: {_EXTRA}") from None
    names = list(config.lora_targets) or None
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(causal, settings)
    except ValueError as error:
        raise UsageError(f"language.lora_targets {names}: {error}") from None


def digest_of(model: LanguageModel) -> str:
    """A hash of the weights that are frozen, by which a run knows the model it was trained on."""
    sha = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if name in model._frozen:
            sha.update(name.encode() + value.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return sha.hexdigest()


def _folder(config: LanguageConfig) -> str:
    if config.model is None:
        raise UsageError(
            "a text environment is for a language model: --language.model DIR, a folder of transformers; "
            "`ctrlrl language make-lm` makes a tiny one"
        )
    path = Path(config.model)
    if not path.is_dir() and (path.is_absolute() or config.model.startswith(".")):
        raise UsageError(f"no folder {config.model} (language.model)")
    return config.model


def require_transformers() -> Any:
    """The package.

    Raises:
        UsageError: it is missing.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError(f"language models need transformers: {_EXTRA}") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading and writing weights, which takes no time
    return transformers
