"""N text environments under the contract of vector environments: what is said becomes token ids, once.

Shapes: N rows, n candidates. An observation is a dict of int32 ids, -1 where there is no token: `goal` and `prompt`,
each padded on its left, and where one is chosen `candidates` (n, C), padded on the right, and `candidate_mask` (n,). An
action is the index of a candidate, or an answer's ids (C,), -1 after its end. Ids are what is stored and learned from,
of an answer those that were written.

The goal stands first, so that another goal can be put in its place: what follows does not depend on it. Goals that hold
after a step are no part of what is observed: `Step.achieved` has them, as the ids that `goal` would have.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.base import TextEnv, TextState
from ctrlrl.envs.vector import EnvState, Step, VectorEnv, VectorGoals, derive_seeds, require_as_many, seed_per_env
from ctrlrl.errors import UsageError
from ctrlrl.language.model import ends_of
from ctrlrl.language.prompts import ChatPrompts, Prompts
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs

_SAID = 4096
"""Texts whose ids are remembered."""


class TextVector(VectorEnv):
    """Text environments stepped one after the other, for a model that chooses among commands or answers freely.

    Figures of an episode: `episode/turns`, `episode/valid`, the share of answers that meant something, `episode/cut`,
    the share of prompts of which the oldest tokens were left out, `episode/unknown`, that of prompts with a word that
    the model does not know, and of free answers `episode/tokens`, their mean length, and `episode/unended`, the share
    of those that were cut at `candidate_tokens`, without an end.

    In groups (`language.group_size`) each group is given tasks of its own, the same for its members, whose episodes
    begin together: who has finished sees an empty prompt and waits, in rows that are no transitions.

    Args:
        envs: the environments.
        tokenizer: of the model.
        config: how long texts may be, and how much of the past a prompt tells.
        name: what a user types to get it.
        device: where the tensors lie.
        achieved: whether steps say which goals hold after them, where the environments know goals.

    Attributes:
        transcript: of each row, what was shown and answered in the episode so far.

    Raises:
        UsageError: the environments offer no commands to choose among, or do not make up whole groups.
    """

    def __init__(
        self,
        envs: Sequence[TextEnv],
        tokenizer: Any,
        config: LanguageConfig,
        *,
        name: str,
        device: torch.device | str = "cpu",
        achieved: bool = False,
    ) -> None:
        self._envs, self._tokenizer, self._config = list(envs), tokenizer, config
        self.name, self.num_envs, self.device = name, len(self._envs), torch.device(device)
        size, c = len(tokenizer), config
        self._prompts = ChatPrompts(tokenizer, c.model) if c.chat else Prompts()

        def ids(*shape: int) -> gym.spaces.Box:
            return gym.spaces.Box(-1, size - 1, shape, np.int32)

        offers = bool(self._envs[0].reset(0).commands)
        self._free = c.form == "tokens" or (c.form == "auto" and not offers)
        self._ends = ends_of(tokenizer, c.model)
        begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]  # as its model has read every text
        self._bos = () if c.chat or not begins else (int(tokenizer.bos_token_id),)
        if not self._free and not offers:
            raise UsageError(f"{name} takes any text for an answer and offers no candidates: --language.form tokens")
        if self._free and not self._ends:
            raise UsageError(
                f"the tokenizer of {c.model} has no token that ends a text (eos_token), which free answers need: set "
                "one in its folder"
            )
        entries: dict[str, gym.Space[Any]] = {"goal": ids(c.goal_tokens), "prompt": ids(c.prompt_tokens)}
        if not self._free:
            entries["candidates"] = ids(c.max_candidates, c.candidate_tokens)
            entries["candidate_mask"] = gym.spaces.Box(0, 1, (c.max_candidates,), np.int8)
        self.observation_space = gym.spaces.Dict(entries)
        self.action_space = (
            TokenSpace(size, c.candidate_tokens) if self._free else gym.spaces.Discrete(c.max_candidates)
        )
        if c.group_size > 1:
            if self.num_envs % c.group_size:
                raise UsageError(
                    f"{self.num_envs} environments make up no groups of {c.group_size}: --num-envs a multiple of it"
                )
            self.task_groups, self.may_be_invalid = (c.group_size, self._envs[0].max_turns), True
        self._clock, self._seed = 0, 0  # of groups: turns since all began, and what their tasks are drawn from
        self._waits = np.zeros(self.num_envs, np.bool_)
        self.goals = _goals_of(self._envs[0]) if achieved else None
        self._states: list[TextState] = []
        self.transcript: list[list[tuple[str, str]]] = [[] for _ in self._envs]
        self._counts = np.zeros(
            (self.num_envs, 6), np.int64
        )  # turns, valid answers, cut prompts, tokens, unended, unknown
        self._first_said: list[str | None] = [None] * self.num_envs
        self._ids = functools.lru_cache(_SAID)(self._tokenized)

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        seeds = seed_per_env(seed, self.num_envs)
        if self.task_groups:
            self._seed = self._seed + 1 if seeds[0] is None else seeds[0]
            self._begin_together()
        else:
            self._states = [env.reset(one) for env, one in zip(self._envs, seeds, strict=True)]
        self.transcript = [[] for _ in self._envs]
        self._counts[:] = 0
        self._first_said = [None] * self.num_envs
        return self._to_act_on()

    def step(self, action: Tensor) -> Step:
        n = self.num_envs
        answers = action.cpu().tolist()
        reward, flags, acted = np.zeros(n, np.float32), np.zeros((2, n), np.bool_), ~self._waits
        figures = {name: np.full(n, np.nan, np.float32) for name in ("success", *_FIGURES)}
        finals: list[TextState] = []
        told: dict[int, list[tuple[str, str]]] = {}  # of what ended
        anchor = torch.tensor([self._number(s) for s in self._states]) if self.task_groups else None
        for row, env in enumerate(self._envs):
            shown = self._states[row]
            if self._waits[row]:
                finals.append(shown)
                continue
            answer, length, whole = self._as_said(row, answers[row])
            step = env.step(answer)
            self.transcript[row].append((shown.observation, answer))
            self._counts[row] += 1, step.valid, 0, length, not whole, 0
            reward[row], flags[:, row] = step.reward, (step.terminated, step.truncated)
            finals.append(step.state)
            self._states[row] = step.state
            if step.terminated or step.truncated:
                told[row] = self.transcript[row]
                turns, valid, cut, written, unended, unknown = self._counts[row].tolist()
                figures["success"][row] = np.nan if step.success is None else step.success
                of_answers = (written / turns, unended / turns) if self._free else (np.nan, np.nan)
                means = (turns, valid / turns, cut / turns, *of_answers, unknown / turns)
                for name, value in zip(_FIGURES, means, strict=True):
                    figures[name][row] = value
                if self._first_said[row] is None:
                    self._first_said[row] = _as_text(told[row], step.state, step.reward)
                self.transcript[row], self._counts[row] = [], 0
                if self.task_groups:
                    self._states[row], self._waits[row] = _WAITING, True
                else:
                    self._states[row] = env.reset()
        if self.task_groups:
            self._clock += 1
            if self._clock == self.task_groups[1]:
                self._begin_together()
        obs = self._to_act_on()
        ended = torch.from_numpy(flags.any(0))
        final_obs: dict[str, Tensor] = obs
        if bool(ended.any()):
            final_obs = {name: value.clone() for name, value in obs.items()}
            rows = ended.nonzero().squeeze(-1).tolist()
            last = self._told([finals[i] for i in rows], [told[i] for i in rows])
            for name, value in final_obs.items():
                value[rows] = last[name]
        return Step(
            obs=obs,
            action=action.to(self.device),
            reward=torch.from_numpy(reward).to(self.device),
            terminated=torch.from_numpy(flags[0].copy()).to(self.device),
            truncated=torch.from_numpy(flags[1].copy()).to(self.device),
            final_obs=final_obs,
            valid=torch.from_numpy(acted).to(self.device),
            log={name: torch.from_numpy(value).to(self.device) for name, value in figures.items()},
            achieved=None if self.goals is None else self._achieved(finals, self.goals.most),
            anchor=None if anchor is None else anchor.to(self.device),
        )

    def get_state(self) -> EnvState:
        json: list[dict[str, Any] | None] = [
            {
                "env": env.get_state(),
                "transcript": [list(turn) for turn in said],
                "counts": counts.tolist(),
                "group": [bool(waits), self._clock, self._seed],
            }
            for env, said, counts, waits in zip(self._envs, self.transcript, self._counts, self._waits, strict=True)
        ]
        return EnvState(json, [{} for _ in self._envs])

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        require_as_many(self, state)
        if self.task_groups and None in state.json:  # its group must begin with it, and all groups begin together
            return self.reset(seed), [f"{self.name} had crashed"] * self.num_envs
        self._states = []
        reasons: list[str | None] = []
        fresh_seeds = derive_seeds(seed, self.num_envs)
        for row, (env, saved, fresh) in enumerate(zip(self._envs, state.json, fresh_seeds, strict=True)):
            if saved is None:
                self._states.append(env.reset(fresh))
                self.transcript[row], self._counts[row] = [], 0
                reasons.append(f"{self.name} had crashed")
                continue
            self._states.append(env.set_state(saved["env"]))
            self.transcript[row] = [(said, answer) for said, answer in saved["transcript"]]
            self._counts[row] = 0
            self._counts[row, : len(saved["counts"])] = saved["counts"]  # runs of before counted no tokens
            self._waits[row], self._clock, self._seed = saved.get("group", (False, 0, 0))
            if self._waits[row]:
                self._states[row] = _WAITING
            reasons.append(None)
        counts = self._counts.copy()
        obs: Obs = self._to_act_on()
        self._counts = counts  # these prompts were counted before
        return obs, reasons

    def transcripts(self) -> list[str | None]:
        return list(self._first_said)

    def render(self) -> NoReturn:
        raise UsageError(f"{self.name} speaks text, of which there are no pictures")

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _begin_together(self) -> None:
        """Begin an episode in every environment, of the same task in those of a group."""
        assert self.task_groups is not None
        size, _ = self.task_groups
        *seeds, self._seed = derive_seeds(self._seed, self.num_envs // size + 1)
        self._states = [env.reset(seeds[row // size]) for row, env in enumerate(self._envs)]
        self._clock, self._waits[:] = 0, False

    def _as_said(self, row: int, action: Any) -> tuple[str, int, bool]:
        """The text that an action is, how many tokens were written, and whether the last one is an end."""
        if self._free:
            written = [token for token in action if token >= 0]
            whole = bool(written) and written[-1] in self._ends
            text: str = self._tokenizer.decode(written[:-1] if whole else written, skip_special_tokens=True)
            return text.strip(), len(written), whole
        commands = self._states[row].commands
        if not 0 <= action < len(commands):
            raise UsageError(f"{self.name}: no candidate {action}; environment {row} offers {len(commands)}")
        return commands[action], 0, True

    def _to_act_on(self) -> dict[str, Tensor]:
        """The observations of all rows.

        Raises:
            UsageError: an environment offers no commands to choose among.
        """
        if not self._free and any(not s.commands and s is not _WAITING for s in self._states):
            raise UsageError(
                f"{self.name} takes any text for an answer here, and offers no candidates: --language.form tokens"
            )
        return self._told(self._states, self.transcript, acting=True)

    def _told(
        self, states: Sequence[TextState], transcripts: Sequence[list[tuple[str, str]]], *, acting: bool = False
    ) -> dict[str, Tensor]:
        """The observations of rows with these states and pasts; of what is acted on, cut prompts are counted."""
        c, n = self._config, len(states)
        out: dict[str, np.ndarray[Any, Any]] = {
            "goal": np.full((n, c.goal_tokens), -1, np.int32),
            "prompt": np.full((n, c.prompt_tokens), -1, np.int32),
        }
        if not self._free:
            out["candidates"] = np.full((n, c.max_candidates, c.candidate_tokens), -1, np.int32)
            out["candidate_mask"] = np.zeros((n, c.max_candidates), np.int8)
        for row, (state, past) in enumerate(zip(states, transcripts, strict=True)):
            if state is _WAITING:
                if not self._free:
                    out["candidate_mask"][row, 0] = 1  # there must be something to choose; it is not read
                continue
            goal = self._goal(state.goal)
            prompt = self._ids(self._prompts.prompt(state.goal, state.observation, past, c.history))
            if acting and len(prompt) > c.prompt_tokens:
                self._counts[row, 2] += 1
            if acting and self._tokenizer.unk_token_id in (*goal[len(self._bos) :], *prompt):
                self._counts[row, 5] += 1
            _to_the_right(out["goal"][row], goal)
            _to_the_right(out["prompt"][row], prompt[-c.prompt_tokens :])
            if self._free:
                continue
            if len(state.commands) > c.max_candidates:
                raise UsageError(
                    f"{self.name} offers {len(state.commands)} commands: language.max_candidates must be as many"
                )
            for i, command in enumerate(state.commands):
                ids = self._ids(self._prompts.command(command))
                if len(ids) > c.candidate_tokens:
                    raise UsageError(
                        f"the command {command!r} has {len(ids)} tokens: language.candidate_tokens must be as many"
                    )
                if self._tokenizer.unk_token_id in ids:
                    raise UsageError(
                        f"the command {command!r} has words that the model does not know, so that it could not tell it "
                        "from others: make the model for this environment (ctrlrl language make-lm)"
                    )
                out["candidates"][row, i, : len(ids)] = ids
                out["candidate_mask"][row, i] = 1
        return {name: torch.from_numpy(value).to(self.device) for name, value in out.items()}

    def _achieved(self, states: Sequence[TextState], most: int) -> Tensor:
        """The goals (N, most, g) that hold in `states`.

        Raises:
            UsageError: goals could not be told apart, or there are more.
        """
        out = np.full((len(states), most, self._config.goal_tokens), -1, np.int32)
        for row, state in enumerate(states):
            if len(state.achieved) > most:
                raise UsageError(
                    f"{self.name}: {len(state.achieved)} goals hold at once, and its max_achieved says {most} at most"
                )
            for i, goal in enumerate(state.achieved):
                ids = self._goal(goal)
                if self._tokenizer.unk_token_id in ids[len(self._bos) :]:
                    raise UsageError(
                        f"the goal {goal!r} has words that the model does not know, so that hindsight would take it "
                        "for others: make the model anew (ctrlrl language make-lm), or leave out --buffer.hindsight"
                    )
                _to_the_right(out[row, i], ids)
        return torch.from_numpy(out).to(self.device)

    def _goal(self, goal: str) -> tuple[int, ...]:
        """Its ids.

        Raises:
            UsageError: there are too many.
        """
        ids = self._bos + (self._ids(self._prompts.goal(goal)) if goal else ())
        if len(ids) > self._config.goal_tokens:
            raise UsageError(f"the goal {goal!r} has {len(ids)} tokens: language.goal_tokens must be as many")
        return ids

    def _number(self, state: TextState) -> int:
        """Of what is shown, and offered if one chooses; another one for anything else."""
        text = "\0".join((state.observation, *(() if self._free else state.commands)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

    def _tokenized(self, text: str) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids)


_FIGURES = ("episode/turns", "episode/valid", "episode/cut", "episode/tokens", "episode/unended", "episode/unknown")
_WAITING = TextState("")
"""Of an environment whose episode is over and whose group goes on; known by being this one."""


def _goals_of(env: TextEnv) -> VectorGoals | None:
    """What of an observation are goals; None where the task has none that could be others."""
    if not env.max_achieved:
        return None
    (missed, _), (won, ends) = (env.reward_of("it", TextState("", achieved=(held,))) for held in ("another", "it"))

    def reward(achieved: Tensor, desired: Tensor) -> Tensor:
        return torch.where(_holds(achieved, desired), won, missed)

    return VectorGoals(desired="goal", reward=reward, reached=_holds if ends else None, most=env.max_achieved)


def _holds(achieved: Tensor, desired: Tensor) -> Tensor:
    """Whether the goals (M, g) are among those that hold (M, A, g); (M,) bool."""
    same = (achieved == desired[:, None]).all(-1) & (achieved >= 0).any(-1)
    return same.any(-1)


def _as_text(turns: Sequence[tuple[str, str]], last: TextState, reward: float) -> str:
    """An episode to be read."""
    lines = [f"goal: {last.goal}"] * bool(last.goal)
    for shown, answer in turns:
        lines += [shown, f"> {answer}"]
    return "\n".join([*lines, last.observation, f"(reward {reward:g})"])


def _to_the_right(row: np.ndarray[Any, Any], ids: Sequence[int]) -> None:
    if ids:
        row[len(row) - len(ids) :] = ids
