"""A language model in the roles of an agent's networks: policy over candidates or of free answers, critics, V.

Shapes: B rows, L tokens of goal and prompt together, n candidates (or an answer) of C tokens, K critics, H units; see
`model`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlrl.config import LanguageConfig
from ctrlrl.errors import UsageError
from ctrlrl.language.model import LanguageModel, tiny_llama
from ctrlrl.language.prefixes import Prefixes
from ctrlrl.nn.encoder import Encoder
from ctrlrl.nn.mlp import Backbone, CandidateNetwork, EnsembleMLP, TokenCritics, TokenNetwork, TokenValues
from ctrlrl.nn.recall import Recalling
from ctrlrl.tree import Obs

_LAYERS, _HEADS = 2, 4
"""Of a small encoder."""


class Tokens(Encoder):
    """The token ids of goal and prompt as one text (B, L), padded on the left by -1 as far as the longest needs."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        entries = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {}
        if "prompt" not in entries:
            raise UsageError(f"a language model reads the entries 'goal' and 'prompt'; the environment gives {space}")
        self.names = [name for name in ("goal", "prompt") if name in entries]
        self.out_features = sum(math.prod(entries[name].shape or ()) for name in self.names)

    def forward(self, obs: Obs) -> Tensor:
        assert isinstance(obs, dict)
        ids = torch.cat([obs[name] for name in self.names], -1).long()
        if len(self.names) > 1:  # each is padded on its left: what there is, in its order, to the right
            ids = ids.gather(-1, (ids >= 0).long().argsort(dim=-1, stable=True))
        longest = int((ids >= 0).sum(-1).max())
        return ids[:, -max(1, longest) :]


class LanguagePolicy(CandidateNetwork, TokenNetwork, Recalling):
    """The policy: of each candidate the log-probability of its tokens after the prompt, summed, or their mean; or
    answers of its own. Where it acts turn after turn it reads what prompts begin with once."""

    starts_word: Tensor
    pretrained = True

    def __init__(
        self, model: LanguageModel, config: LanguageConfig, starts_word: Tensor, ends: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.model, self.temperature, self.normalize = model, config.temperature, config.normalize
        self.length, self._ends, self._memory = config.candidate_tokens, ends, config.generation_gib * 2**30
        self.register_buffer("starts_word", starts_word, persistent=False)

    def forward(self, features: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        log_prob, there = self.model.score(
            features, candidates, exists, self.temperature, kept=self.kept, memory=self._memory
        )
        total = log_prob.sum(-1)
        if self.normalize == "sum":
            return total
        counted = there
        if self.normalize == "word":
            counted = there & self.starts_word[candidates.clamp(min=0).long()]
            counted[..., 0] = there[..., 0]  # after a chat template's prompt there is no blank before it
        return total / counted.sum(-1).clamp(min=1)

    def generate(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.model.generate(
            features,
            length=self.length,
            ends=self._ends,
            temperature=self.temperature,
            generator=generator,
            memory=self._memory,
            kept=self.kept,
        )

    def nothing_kept(self) -> Prefixes:
        return Prefixes()

    def log_prob(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.token_log_prob(features, tokens, self.temperature)


class CandidateValues(CandidateNetwork):
    """K values of each candidate, (K, B, n): of the features of its last token after the prompt."""

    def __init__(self, reader: Reader, members: int, hidden: int) -> None:
        super().__init__()
        self.reader = reader
        self.heads = EnsembleMLP(members, (reader.hidden_size, hidden, 1))

    def forward(self, features: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        at_end = self.reader.at_candidates(features, candidates, exists)  # (B, n, H)
        values: Tensor = self.heads(at_end.flatten(0, 1)).squeeze(-1)
        return values.view(-1, *at_end.shape[:2])


class CandidateValue(CandidateNetwork):
    """One such value, (B, n)."""

    def __init__(self, reader: Reader, hidden: int) -> None:
        super().__init__()
        self.values = CandidateValues(reader, 1, hidden)

    def forward(self, features: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        out: Tensor = self.values(features, candidates, exists)
        return out.squeeze(0)


class PromptValues(TokenValues):
    """Values of prompts (B, L): of the features of the last token, (B, outputs); and of what was answered so far."""

    def __init__(self, reader: Reader, outputs: int, hidden: int) -> None:
        super().__init__()
        self.reader = reader
        self.head = EnsembleMLP(1, (reader.hidden_size, hidden, outputs))

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.head(self.reader.at_prompt(features))
        return out.squeeze(0)

    def along(self, features: Tensor, tokens: Tensor) -> Tensor:
        before = self.reader.along(features, tokens)  # (B, C, H)
        out: Tensor = self.head(before.flatten(0, 1))
        return out.view(before.shape[:2])


class WrittenValues(TokenCritics):
    """K values of each token of an answer, (K, B, C): of its features, after the prompt and the tokens before it."""

    def __init__(self, reader: Reader, members: int, hidden: int) -> None:
        super().__init__()
        self.reader = reader
        self.heads = EnsembleMLP(members, (reader.hidden_size, hidden, 1))

    def along(self, features: Tensor, tokens: Tensor) -> Tensor:
        at_tokens = self.reader.along(features, F.pad(tokens, (0, 1), value=-1))[:, 1:]  # (B, C, H), before the next
        out: Tensor = self.heads(at_tokens.flatten(0, 1)).squeeze(-1)
        return out.view(-1, *tokens.shape)


class Reader(nn.Module):
    """The features that critics read: of a model of their own, or of the policy's."""

    def __init__(self, model: LanguageModel, config: LanguageConfig) -> None:
        super().__init__()
        self._kind = config.critic
        self.own: LanguageModel | None = None
        if self._kind == "separate":
            self.own = copy.deepcopy(model)
        elif self._kind == "small":
            self.own = LanguageModel(tiny_llama(model.vocabulary, config.critic_hidden, _LAYERS, _HEADS, model.longest))
        self.hidden_size = (self.own or model).hidden_size
        self._policys = [model]  # in a list: it belongs to the policy

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """A copy, of target critics say, reads the same policy's model."""
        memo[id(self._policys[0])] = self._policys[0]
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def at_prompt(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, H)."""
        with self._reading() as model:
            return model.read(ids)[1]

    def at_candidates(self, ids: Tensor, candidates: Tensor, exists: Tensor | None) -> Tensor:
        """(B, L) and (B, n, C) to (B, n, H)."""
        with self._reading() as model:
            return model.features(ids, candidates, exists)

    def along(self, ids: Tensor, tokens: Tensor) -> Tensor:
        """(B, L) and answers (B, C) to (B, C, H), before each token."""
        with self._reading() as model:
            return model.answer(ids, tokens, logits=False)[1]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[LanguageModel]:
        if self.own is not None:
            yield self.own
            return
        model = self._policys[0]
        learns = self._kind == "joint" and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns), model.plain() if self._kind == "frozen" else contextlib.nullcontext():
            yield model


class LanguageBackbone(Backbone):
    """Makes an agent's networks from one language model, which the policy trains.

    Args:
        model: it.
        config: how it answers, and what critics read.
        starts_word: (V,) bool, which tokens begin a word.
        ends: the tokens that end an answer, each of them.
    """

    def __init__(
        self, model: LanguageModel, config: LanguageConfig, starts_word: Tensor, ends: tuple[int, ...]
    ) -> None:
        self.model, self.config, self.starts_word, self.ends = model, config, starts_word, ends

    def encoder(self, space: gym.Space[Any]) -> Encoder:
        return Tokens(space)

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        return LanguagePolicy(self.model, self.config, self.starts_word, self.ends)

    def critics(self, members: int, outputs: int, *, candidates: bool) -> nn.Module:
        if candidates:
            return CandidateValues(self._reader(), members, self.config.critic_hidden)
        raise UsageError("critics of a language model are of candidates; a text environment gives them")

    def token_critics(self, members: int) -> TokenCritics:
        return WrittenValues(self._reader(), members, self.config.critic_hidden)

    def value(self, outputs: int, *, candidates: bool) -> nn.Module:
        reader = Reader(self.model, self.config)
        if candidates:
            return CandidateValue(reader, self.config.critic_hidden)
        return PromptValues(reader, outputs, self.config.critic_hidden)

    def _reader(self) -> Reader:
        """Of critics, which a loss of their own trains."""
        if self.config.critic == "joint":
            raise UsageError(
                "language.critic joint is for ppo, whose one loss trains policy and critic: choose separate, small, "
                "shared or frozen"
            )
        return Reader(self.model, self.config)
