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
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlrl.config import LanguageConfig
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctrlrl.language.prefixes import Prefixes

LAST = [-1]
"""Of a model's layers, whose states it is to give: those of the others take memory."""
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
        words: of them those that the tokenizer knows, which answers are made of; the first ones.
        adapted: whether there is an adapter.
    """

    def __init__(self, causal: Any, *, adapter: Any = None) -> None:
        super().__init__()
        self.causal, self.adapted = causal, adapter is not None
        self._is_plain = False
        self._adapter = [adapter]  # in a list: its weights are in the model
        config = causal.config
        self.hidden_size, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.words = self.vocabulary
        self.longest = int(getattr(config, "max_position_embeddings", 10**9) or 10**9)
        nn.Module.train(self, False)
        named = self.named_parameters(remove_duplicate=False)  # a tied output has two names
        self._frozen = frozenset(name for name, value in named if not value.requires_grad)
        self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_back_frozen)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """A copy has its own of what is trained, and shares what is frozen."""
        if self._frozen:
            memo.update({id(p): p for name, p in self.named_parameters(remove_duplicate=False) if name in self._frozen})
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def train(self, mode: bool = True) -> LanguageModel:
        """It stays in evaluation mode."""
        return self

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Without the adapter: the model as it was before."""
        layers = [m for m in self.causal.modules() if hasattr(m, "_disable_adapters")] if self.adapted else []
        for layer in layers:
            layer._disable_adapters = True
        self._is_plain = True
        try:
            yield
        finally:
            self._is_plain = False
            for layer in layers:
                layer._disable_adapters = False

    def stamp(self) -> tuple[object, ...]:
        """Another one where weights have changed in place or were replaced, and without the adapter."""
        return self._is_plain, *((p.data_ptr(), p._version) for p in self.parameters())

    def save(self, folder: Path, *, adapter: bool = False) -> None:
        """Write an ordinary folder of transformers, an adapter merged into the weights; with `adapter` one of peft, of
        the adapter alone."""
        if adapter:
            self._adapter[0].save_pretrained(folder)
            return
        merged = copy.deepcopy(self._adapter[0]).merge_and_unload() if self.adapted else self.causal
        merged.save_pretrained(folder)

    def read(
        self, ids: Tensor, *, cache: bool = False, before: tuple[Tensor, Any] | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Prompts (B, L), padded on the left: log-probabilities (B, V) of the next token at temperature 1, as logits,
        the last token's features (B, H), and a cache of what was read, if asked. Of what stands `before` them, ids
        (B, S) with -1 anywhere, the cache is given, and goes on."""
        said, past = before or (ids[:, :0], None)
        there = torch.cat([said, ids], -1) >= 0
        there = _not_empty(there, there.shape[1])
        out = self.causal(
            input_ids=ids.clamp(min=0).long(),
            attention_mask=there.long(),
            position_ids=(there.long().cumsum(-1) - 1).clamp(min=0)[:, said.shape[1] :],
            cache=past,
            use_cache=cache,
            output_hidden_states=LAST,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.hidden_states[-1][:, -1].float(), out.cache if cache else None

    @staticmethod
    def cache_of(layers: list[tuple[Tensor, Tensor]]) -> Any:
        """A cache of keys and values (B, heads, L, width) of each layer."""
        return require_transformers().DynamicCache(layers)

    @staticmethod
    def may_be_cut(cache: Any) -> bool:
        """Whether a cache has keys and values of all tokens in each layer, not those of a window, or a state."""
        whole = require_transformers().cache_utils.DynamicLayer
        return all(type(layer) is whole for layer in cache.layers)

    def go_on(self, ids: Tensor, prompt: Tensor, cache: Any, *, logits: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens (B, C), padded on the right, after prompts (B, L) that were read: logits (B, C, V) of the token after
        each, or without `logits` of the last column's alone, (B, 1, V), and features (B, C, H)."""
        before, there = prompt >= 0, ids >= 0
        start = before.long().sum(-1, keepdim=True)
        out = self.causal(
            input_ids=ids.clamp(min=0).long(),
            attention_mask=torch.cat([before, there], -1).long(),
            position_ids=start + torch.arange(ids.shape[1], device=ids.device),
            cache=cache,
            use_cache=True,
            output_hidden_states=LAST,
            logits_to_keep=0 if logits else 1,
        )
        return out.logits.float(), out.hidden_states[-1].float()

    def answer(self, ids: Tensor, tokens: Tensor, *, logits: bool) -> tuple[Tensor | None, Tensor]:
        """Prompts (B, L) and answers (B, C) after them, read together: logits (B, C, V) by which each token was chosen,
        if asked, and features (B, C, H) before each."""
        there = _not_empty(torch.cat([ids, tokens], -1) >= 0, ids.shape[1])
        out = self.causal(
            input_ids=torch.cat([ids, tokens], -1)[:, :-1].clamp(min=0).long(),
            attention_mask=there[:, :-1].long(),
            position_ids=(there.long().cumsum(-1) - 1).clamp(min=0)[:, :-1],
            use_cache=False,
            output_hidden_states=LAST,
            logits_to_keep=tokens.shape[1] if logits else 1,
        )
        return out.logits.float() if logits else None, out.hidden_states[-1][:, -tokens.shape[1] :].float()

    def token_log_prob(self, ids: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Of answers (B, C) after prompts (B, L): each token's log-probability, and the entropy there; (B, C) each, 0
        where there is no token."""
        width = tokens.shape[1]
        tokens = tokens[:, : max(1, int((tokens >= 0).sum(-1).max()))]  # as far as the longest goes
        logits, _ = self.answer(ids, tokens, logits=True)
        assert logits is not None
        there = tokens >= 0
        chosen = logits[there][:, : self.words] / temperature  # (M, V), of what there is
        total = chosen.logsumexp(-1)
        log_prob = chosen.gather(-1, tokens[there].long()[:, None])[:, 0] - total
        entropy = total - (chosen.softmax(-1) * chosen).sum(-1)
        missing = (0, width - tokens.shape[1])
        each = torch.zeros(there.shape, device=tokens.device)
        return (
            F.pad(each.masked_scatter(there, log_prob), missing),
            F.pad(each.masked_scatter(there, entropy), missing),
        )

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        *,
        length: int,
        ends: tuple[int, ...],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        memory: float = math.inf,
        kept: Prefixes | None = None,
    ) -> Tensor:
        """Write answers.

        A prompt that stands in several rows is read once. What has ended is no longer computed.

        Args:
            prompt: (B, L); where there is none, nothing is written.
            length: tokens of an answer at most, C.
            ends: the tokens that end it, any of them, which is part of it.
            temperature: that logits are divided by.
            generator: of the draws; None: the likeliest token each time.
            memory: bytes that keys, values and logits may take; as many rows at a time as fit, but at least one.
            kept: of the rows' prompts before, where they are the same rows; of these, within the same memory.

        Returns:
            (B, C) int64, -1 after the end.
        """
        out = torch.full((len(prompt), length), -1, dtype=torch.long, device=prompt.device)
        asked = (prompt >= 0).any(-1).nonzero().squeeze(-1)
        if not len(asked):  # all wait
            return out
        at_once = max(1, int(min(memory / self.bytes_of_row(prompt.shape[1] + length), len(prompt))))
        if kept is not None and len(asked) > at_once:
            kept.clear()  # there is room for no more than what is written
            kept = None
        for rows in asked.split(at_once):  # type: ignore[no-untyped-call]
            different, of_prompt = torch.unique(prompt[rows], dim=0, return_inverse=True)
            if kept is None:
                logits, _, cache = self.read(different, cache=True)
            else:
                room = memory - len(rows) * self.bytes_of_row(prompt.shape[1] + length)
                most = self.most_kept(prompt.shape[1], room)
                logits, cache = kept.read(self, different, rows, of_prompt, total=len(prompt), most=most)
            cache.batch_select_indices(of_prompt)
            out[rows] = self._generate(prompt[rows], logits[of_prompt], cache, length, ends, temperature, generator)
            del logits, cache  # before the next ones are made
        return out

    def bytes_of_row(self, tokens: int) -> int:
        """What a row of so many tokens takes while it is read and written: keys and values of each layer, logits three
        times, and what one layer makes in between, 24 times its units and twice those between its two products: more
        than Llamas of 64 to 512 units took for up to 400 tokens (`scripts/bench_memory.py`)."""
        c = self.causal.config
        between = int(getattr(c, "intermediate_size", None) or 4 * self.hidden_size)
        of_layer = (24 * self.hidden_size + 2 * between) * self._bytes
        return (self._bytes_of_token + of_layer) * tokens + 3 * 4 * self.vocabulary

    def most_kept(self, tokens: int, memory: float) -> int:
        """Of how many prompts of so many tokens keys and values may be kept: twice, since new ones are made while the
        former are there."""
        return int(min(max(memory, 0) / (2 * self._bytes_of_token * tokens), 10**9))

    @property
    def _bytes(self) -> int:
        return int(next(self.causal.parameters()).element_size())

    @property
    def _bytes_of_token(self) -> int:
        """Of its keys and values in all layers."""
        c = self.causal.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return 2 * int(c.num_hidden_layers) * int(heads) * int(width) * self._bytes

    def _generate(
        self,
        prompt: Tensor,
        logits: Tensor,
        cache: Any,
        length: int,
        ends: tuple[int, ...],
        temperature: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        out = torch.full((len(prompt), length), -1, dtype=torch.long, device=prompt.device)
        rows = torch.arange(len(prompt), device=prompt.device)  # that are written still
        said = prompt  # what each of them has read and written
        last = torch.tensor(ends, device=prompt.device)
        for i in range(length):
            token = _draw(logits[:, : self.words] / temperature, generator)
            out[rows, i] = token
            going = (~torch.isin(token, last)).nonzero().squeeze(-1)
            if i == length - 1 or not len(going):
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, said, token = rows[going], said[going], token[going]
            logits = self.go_on(token[:, None], said, cache)[0][:, -1]
            said = torch.cat([said, token[:, None]], -1)
        return out

    def score(
        self,
        prompt: Tensor,
        candidates: Tensor,
        exists: Tensor | None,
        temperature: float = 1.0,
        *,
        kept: Prefixes | None = None,
        memory: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        """How likely each candidate follows, with one cache for all of a prompt.

        Args:
            prompt: (B, L).
            candidates: (B, n, C).
            exists: (B, n) bool; None: all of them.
            temperature: that logits are divided by.
            kept: of the rows' prompts before, where they are the same rows; in what is left of the memory.
            memory: bytes that candidates with their prompts may take where there is no gradient; as many candidates at
                a time as fit, but at least one.

        Returns:
            log-probabilities of each token (B, n, C), 0 where there is none, and which tokens there are (B, n, C).
        """
        which, of_prompt, ids = _existing(candidates, exists)
        if not len(which):  # all wait
            nothing = torch.zeros(candidates.shape, device=ids.device)
            return nothing, nothing.bool()
        # Logits of all tokens of a candidate, in `bytes_of_row` of one.
        one = self.bytes_of_row(prompt.shape[1] + ids.shape[1]) + 3 * 4 * self.vocabulary * (ids.shape[1] - 1)
        at_once = len(ids) if torch.is_grad_enabled() else max(1, int(min(memory / one, len(ids))))
        if kept is not None and len(ids) > at_once:
            kept.clear()  # there is room for no more than what is scored
            kept = None
        if kept is not None:
            rows, most = (
                torch.arange(len(prompt), device=ids.device),
                self.most_kept(prompt.shape[1], memory - len(ids) * one),
            )
            first, cache = kept.read(self, prompt, rows, rows, total=len(prompt), most=most)
            log_prob = self._scored(ids, of_prompt, prompt, first, cache, temperature)
        else:
            parts = []
            for part, of in zip(ids.split(at_once), of_prompt.split(at_once), strict=True):  # type: ignore[no-untyped-call]
                begin, end = int(of[0]), int(of[-1]) + 1  # the prompts of these candidates
                first, _, cache = self.read(prompt[begin:end], cache=True)
                parts.append(self._scored(part, of - begin, prompt[begin:end], first, cache, temperature))
                del first, cache  # before the next ones are made
            log_prob = torch.cat(parts)
        count, n, length = candidates.shape
        scores = log_prob.new_zeros(count * n, length).index_copy(0, which, log_prob)
        there = torch.zeros(count * n, length, dtype=torch.bool, device=ids.device).index_copy(0, which, ids >= 0)
        return scores.view(count, n, length), there.view(count, n, length)

    def _scored(
        self, ids: Tensor, of_prompt: Tensor, prompt: Tensor, first: Tensor, cache: Any, temperature: float
    ) -> Tensor:
        """Log-probabilities (M, C) of candidates (M, C), of the prompts that `of_prompt` (M,) names: of their first
        token by what follows the prompts, (B, V), of those after it by the cache, which is used up."""
        cache.batch_select_indices(of_prompt)
        logits, _ = self.go_on(ids, prompt[of_prompt], cache)
        token = ids.clamp(min=0)
        each = [
            _log_prob(first / temperature, of_prompt, token[:, 0])[:, None],
            _log_prob(logits[:, :-1] / temperature, None, token[:, 1:]),
        ]
        return torch.cat(each, -1) * (ids >= 0)

    def features(self, prompt: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        """Features of each candidate's last token after the prompt (B, n, H), zeros where there is no candidate.
        Arguments as those of `score`."""
        which, of_prompt, ids = _existing(candidates, exists)
        if not len(which):
            return torch.zeros(*candidates.shape[:2], self.hidden_size, device=ids.device)
        _, _, cache = self.read(prompt, cache=True)
        cache.batch_select_indices(of_prompt)
        _, features = self.go_on(ids, prompt[of_prompt], cache, logits=False)
        last = ((ids >= 0).sum(-1) - 1).clamp(min=0)
        at_last = features[torch.arange(len(ids), device=ids.device), last]
        rows, n, _ = candidates.shape
        return at_last.new_zeros(rows * n, at_last.shape[-1]).index_copy(0, which, at_last).view(rows, n, -1)


def _existing(candidates: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the M candidates that there are: their places among all (M,), whose prompt's they are (M,), ids (M, C)."""
    there = (candidates >= 0).any(-1)
    real = there if exists is None else exists & there
    which = real.flatten().nonzero().squeeze(-1)
    return which, which // candidates.shape[1], candidates.flatten(0, 1)[which].long()


def _log_prob(logits: Tensor, rows: Tensor | None, token: Tensor) -> Tensor:
    """Log-probabilities of `token` (..., ) by logits (..., V), of `rows` where given; no second (..., V) is made."""
    total = logits.logsumexp(-1)
    if rows is not None:
        return logits[rows, token] - total[rows]
    return logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - total


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Tokens (B,) by logits (B, V): the largest, of the logits plus Gumbel noise where there is a generator."""
    if generator is None:
        return logits.argmax(-1)
    wait = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - wait.clamp_(min=torch.finfo(wait.dtype).tiny).log_()).argmax(-1)


def _not_empty(there: Tensor, length: int) -> Tensor:
    """Which tokens (B, L) to look at, of prompts of `length`: of one that is empty, as of an environment that waits,
    its last place, since attention to nothing is not a number."""
    last = torch.zeros_like(there)
    last[:, length - 1] = ~there[:, :length].any(-1)
    return there | last


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    assert isinstance(module, LanguageModel)
    for name in module._frozen:
        state.pop(prefix + name, None)


def _put_back_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    assert isinstance(module, LanguageModel)
    parameters = dict(module.named_parameters(remove_duplicate=False))
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


def ends_of(tokenizer: Any, model: str | None) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those of the model's `generation_config.json`, or else of its
    `config.json`, which name what ends a turn of a conversation."""
    said: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if model is not None:
        transformers, more = require_transformers(), None
        for kind in (transformers.GenerationConfig, transformers.AutoConfig):
            with contextlib.suppress(OSError, ValueError):  # a folder without one
                more = kind.from_pretrained(model).eos_token_id
                break
        said += [] if more is None else [more] if isinstance(more, int) else more
    return tuple(dict.fromkeys(said))


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


def tiny_llama(vocabulary: int, hidden: int, layers: int, heads: int, context: int, **tokens: int) -> Any:
    """A Llama of transformers with random weights, by torch's generator; `tokens` as its configuration takes them."""
    transformers = require_transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens},
    )
    return transformers.LlamaForCausalLM(config)


def _with_adapter(causal: Any, config: LanguageConfig) -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError(f"language.lora_rank needs peft: {_EXTRA}") from None
    names: list[str] | str | None = list(config.lora_targets) or None
    if names == ["all-linear"]:
        names = "all-linear"  # peft's word for every linear layer
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
    for name, value in sorted(model.named_parameters(remove_duplicate=False)):
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
