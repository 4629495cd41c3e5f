"""N text environments under the contract of vector environments: what is said becomes token ids, once.

Shapes: N rows, n candidates. An observation is a dict of int32 ids, -1 where there is no token: `goal` and `prompt`,
each padded on its left, `candidates` (n, C), padded on the right, and `candidate_mask` (n,). An action is the index of
a candidate. Ids are what is stored and learned from; no text is tokenized a second time.

The goal stands first, so that another goal can be put in its place: what follows does not depend on it. Goals that hold
after a step are no part of what is observed: `Step.achieved` has them, as the ids that `goal` would have.
"""

from __future__ import annotations

import functools
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
from ctrlrl.tree import Obs

_SAID = 4096
"""Texts whose ids are remembered."""


class TextVector(VectorEnv):
    """Text environments stepped one after the other, for a model that chooses among commands.

    Figures of an episode: `episode/turns`, `episode/valid`, the share of answers that meant something, and
    `episode/cut`, the share of prompts of which the oldest tokens were left out.

    Args:
        envs: the environments.
        tokenizer: of the model.
        config: how long texts may be, and how much of the past a prompt tells.
        name: what a user types to get it.
        device: where the tensors lie.
        achieved: whether steps say which goals hold after them, where the environments know goals.

    Attributes:
        transcript: of each row, what was shown and answered in the episode so far.
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

        def ids(*shape: int) -> gym.spaces.Box:
            return gym.spaces.Box(-1, size - 1, shape, np.int32)

        self.observation_space = gym.spaces.Dict(
            {
                "goal": ids(c.goal_tokens),
                "prompt": ids(c.prompt_tokens),
                "candidates": ids(c.max_candidates, c.candidate_tokens),
                "candidate_mask": gym.spaces.Box(0, 1, (c.max_candidates,), np.int8),
            }
        )
        self.action_space = gym.spaces.Discrete(c.max_candidates)
        self.goals = _goals_of(self._envs[0]) if achieved else None
        self._states: list[TextState] = []
        self.transcript: list[list[tuple[str, str]]] = [[] for _ in self._envs]
        self._counts = np.zeros((self.num_envs, 3), np.int64)  # turns, valid answers, prompts that were cut
        self._first_said: list[str | None] = [None] * self.num_envs
        self._ids = functools.lru_cache(_SAID)(self._tokenized)

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        seeds = seed_per_env(seed, self.num_envs)
        self._states = [env.reset(one) for env, one in zip(self._envs, seeds, strict=True)]
        self.transcript = [[] for _ in self._envs]
        self._counts[:] = 0
        self._first_said = [None] * self.num_envs
        return self._to_act_on()

    def step(self, action: Tensor) -> Step:
        n = self.num_envs
        choices = action.cpu().tolist()
        reward, flags = np.zeros(n, np.float32), np.zeros((2, n), np.bool_)
        figures = {name: np.full(n, np.nan, np.float32) for name in ("success", *_FIGURES)}
        finals: list[TextState] = []
        told: dict[int, list[tuple[str, str]]] = {}  # of what ended
        for row, env in enumerate(self._envs):
            shown = self._states[row]
            commands = shown.commands
            if not 0 <= choices[row] < len(commands):
                raise UsageError(f"{self.name}: no candidate {choices[row]}; environment {row} offers {len(commands)}")
            answer = commands[choices[row]]
            step = env.step(answer)
            self.transcript[row].append((shown.observation, answer))
            self._counts[row, :2] += 1, step.valid
            reward[row], flags[:, row] = step.reward, (step.terminated, step.truncated)
            finals.append(step.state)
            self._states[row] = step.state
            if step.terminated or step.truncated:
                told[row] = self.transcript[row]
                turns, valid, cut = self._counts[row].tolist()
                figures["success"][row] = np.nan if step.success is None else step.success
                for name, value in zip(_FIGURES, (turns, valid / turns, cut / turns), strict=True):
                    figures[name][row] = value
                if self._first_said[row] is None:
                    self._first_said[row] = _as_text(told[row], step.state, step.reward)
                self._states[row], self.transcript[row] = env.reset(), []
                self._counts[row] = 0
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
            action=torch.tensor(choices, device=self.device),
            reward=torch.from_numpy(reward).to(self.device),
            terminated=torch.from_numpy(flags[0].copy()).to(self.device),
            truncated=torch.from_numpy(flags[1].copy()).to(self.device),
            final_obs=final_obs,
            valid=torch.ones(n, dtype=torch.bool, device=self.device),
            log={name: torch.from_numpy(value).to(self.device) for name, value in figures.items()},
            achieved=None if self.goals is None else self._achieved(finals, self.goals.most),
        )

    def get_state(self) -> EnvState:
        json: list[dict[str, Any] | None] = [
            {"env": env.get_state(), "transcript": [list(turn) for turn in said], "counts": counts.tolist()}
            for env, said, counts in zip(self._envs, self.transcript, self._counts, strict=True)
        ]
        return EnvState(json, [{} for _ in self._envs])

    def set_state(self, state: EnvState, *, seed: int) -> tuple[Obs, list[str | None]]:
        require_as_many(self, state)
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
            self._counts[row] = saved["counts"]
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

    def expert_actions(self) -> Tensor:
        """What the scripted demonstrator of each environment would choose, (N,).

        Raises:
            UsageError: there is none.
        """
        answers = [env.expert() for env in self._envs]
        if any(answer is None for answer in answers):
            raise UsageError(f"{self.name} has no scripted demonstrator")
        return torch.tensor([s.commands.index(a) for s, a in zip(self._states, answers, strict=True)])

    def _to_act_on(self) -> dict[str, Tensor]:
        """The observations of all rows.

        Raises:
            UsageError: an environment offers no commands.
        """
        if any(not state.commands for state in self._states):
            raise UsageError(
                f"{self.name} takes any text for an answer, and a policy chooses among commands so far: take an "
                "environment that offers some"
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
            "candidates": np.full((n, c.max_candidates, c.candidate_tokens), -1, np.int32),
            "candidate_mask": np.zeros((n, c.max_candidates), np.int8),
        }
        for row, (state, past) in enumerate(zip(states, transcripts, strict=True)):
            goal = self._goal(state.goal) if state.goal else ()
            prompt = self._ids(prompt_text(state.observation, past, c.history))
            if acting and len(prompt) > c.prompt_tokens:
                self._counts[row, 2] += 1
            _to_the_right(out["goal"][row], goal)
            _to_the_right(out["prompt"][row], prompt[-c.prompt_tokens :])
            if len(state.commands) > c.max_candidates:
                raise UsageError(
                    f"{self.name} offers {len(state.commands)} commands: language.max_candidates must be as many"
                )
            for i, command in enumerate(state.commands):
                ids = self._ids(command_text(command))
                if len(ids) > c.candidate_tokens:
                    raise UsageError(
                        f"the command {command!r} has {len(ids)} tokens: language.candidate_tokens must be as many"
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
                if self._tokenizer.unk_token_id in ids:
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
        ids = self._ids(goal_text(goal))
        if len(ids) > self._config.goal_tokens:
            raise UsageError(f"the goal {goal!r} has {len(ids)} tokens: language.goal_tokens must be as many")
        return ids

    def _tokenized(self, text: str) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(ids)


_FIGURES = ("episode/turns", "episode/valid", "episode/cut")


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


def goal_text(goal: str) -> str:
    """How the goal stands at the beginning of a prompt."""
    return f"goal : {goal}\n"


def prompt_text(observation: str, past: Sequence[tuple[str, str]], history: int) -> str:
    """What follows it: the last `history` of the turns before, what is shown now, and where the answer goes. It does
    not end in a blank: the answer begins with one, so that a word has the same tokens there as anywhere."""
    recent = past[-history:] if history else ()
    before = "".join(f"state : {shown}\naction :{command_text(answer)}\n" for shown, answer in recent)
    return f"{before}state : {observation}\naction :"


def command_text(command: str) -> str:
    """How a command is said after it."""
    return f" {command}"


def _to_the_right(row: np.ndarray[Any, Any], ids: Sequence[int]) -> None:
    if ids:
        row[len(row) - len(ids) :] = ids
