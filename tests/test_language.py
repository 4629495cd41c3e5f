"""A language model as policy and critic: that agents learn with it, and what runs make of it."""

from __future__ import annotations

import copy
import functools
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import transformers

import ctrlrl
from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.iql_discrete import IQLDiscrete
from ctrlrl.algorithms.iql_discrete_config import IQLDiscreteConfig
from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.algorithms.sac_discrete import SACDiscrete
from ctrlrl.algorithms.sac_discrete_config import SACDiscreteConfig
from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.make import make_env
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.errors import UsageError
from ctrlrl.language.backbone import LanguageBackbone
from ctrlrl.language.make_lm import make_lm
from ctrlrl.language.model import LanguageModel
from ctrlrl.language.tiny_config import TinyConfig
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.record import load_run
from ctrlrl.training.collect import RandomPolicy, collect
from ctrlrl.training.collector import Collector
from tests.language import SMALL, batch_of, echo, play, right_answers, tiny
from tests.runs import assert_same


def ppo(config: LanguageConfig = SMALL, **settings: Any) -> PPO:
    env = echo(config=config)
    numbers = {"lr": 1e-3, "minibatch_size": 32, "epochs": 2, "normalize_reward": False} | settings
    return PPO(env.observation_space, env.action_space, PPOConfig(**numbers), seed=1, network=tiny(config=config))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("critic", ["separate", "small", "shared", "joint"])
def test_the_first_ratio_is_one(temperature: float, critic: str) -> None:
    """Dropout, a temperature of acting alone, other padding in another batch, or a stale cache would move it."""
    config = LanguageConfig(**{**SMALL.to_dict(), "temperature": temperature, "critic": critic})
    agent, env = ppo(config), echo(config=config)
    obs = env.reset(0)
    policy = agent.policy
    extras = policy.act(obs, explore=False)[2]
    rollout = Rollout(env.observation_space, horizon=16, num_envs=4, extras=extras)
    rollout.begin(obs)
    collector = Collector(env, policy, obs, seed=0)
    assert collector is not None
    for _ in range(16):
        action, _, extras = policy.act(obs, explore=True)
        step = env.step(action)
        rollout.add(step, extras)
        obs = step.obs
    data, _ = agent.prepare(rollout)
    for rows in torch.arange(64).split(7):
        part = data.map(lambda x, rows=rows: x[rows])
        log_ratio = policy.distribution(part.obs).log_prob(part.decision) - part.log_prob
        assert float(log_ratio.detach().abs().max()) < 1e-4
    metrics, steps = agent.update(rollout)
    assert steps == 4 and float(metrics["kl"]) >= 0 and bool(torch.isfinite(torch.stack(list(metrics.values()))).all())


@pytest.mark.parametrize("critic", ["separate", "small", "shared"])
def test_critics_train_what_is_their_own_alone(critic: str) -> None:
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": critic})
    env = echo(config=config)
    agent = SACDiscrete(
        env.observation_space, env.action_space, SACDiscreteConfig(), seed=1, network=tiny(config=config)
    )
    own, theirs = list(agent.policy.parameters()), list(agent.critics.parameters())
    assert {id(p) for p in own}.isdisjoint(map(id, theirs))
    assert {id(p) for p in agent.target_critics.parameters()}.isdisjoint(map(id, theirs))
    heads = sum(p.numel() for name, p in agent.critics.named_parameters() if ".heads." in name)
    assert (sum(p.numel() for p in theirs) == heads) == (critic == "shared")
    agent.value(agent.critics, env.reset(0)).square().mean().backward()
    assert all(p.grad is None for p in own)
    assert sum(float(p.grad.abs().sum()) for p in theirs if p.grad is not None) > 0
    words = [p for name, p in agent.critics.named_parameters() if name.endswith("embed_tokens.weight")]
    assert bool(words) == (critic != "shared") and all(bool((p.grad != 0).any()) for p in words)  # through all layers


@pytest.mark.parametrize("critic", ["joint", "shared"])
def test_the_loss_of_ppos_critic_trains_the_policys_model_where_it_is_joint(critic: str) -> None:
    """As GLAM's does."""
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": critic})
    agent = ppo(config)
    assert agent.critic is not None
    assert {id(p) for p in agent.policy.parameters()}.isdisjoint(map(id, agent.critic.parameters()))
    agent.critic(echo(config=config).reset(0)).square().mean().backward()
    read = [p for name, p in agent.policy.named_parameters() if "lm_head" not in name]
    trained = [p.grad is not None and bool((p.grad != 0).any()) for p in read]
    assert all(trained) if critic == "joint" else not any(trained)


def test_critics_that_have_an_optimizer_of_their_own_cannot_be_joint() -> None:
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": "joint"})
    env = echo(config=config)
    for agent in (SACDiscrete, IQLDiscrete):
        with pytest.raises(UsageError, match=r"language\.critic joint is for ppo.*separate, small, shared or frozen"):
            agent(env.observation_space, env.action_space, network=tiny(config=config))


SETTINGS: dict[str, Any] = {"threads": 1, "video": False, "quiet": True, "eval_every": 0, "checkpoint_every": 10**6}


def test_before_learning_starts_a_language_model_acts_itself(tmp_path: Path) -> None:
    taken: list[tuple[Tensor, Tensor]] = []

    class Look(ctrlrl.Callback):
        def on_end(self, loop: Any) -> None:
            batch = loop.buffer.sample(1, 200, gamma=0.9)[0]
            taken.append((batch.action, loop.agent.policy.act(batch.obs, explore=False)[0]))

    config = LanguageConfig(**{**SMALL.to_dict(), "normalize": "token", "temperature": 1e-3})  # it draws the likeliest
    settings = SETTINGS | {"steps": 64, "learning_starts": 1000, "num_envs": 8, "callbacks": [Look()]}
    ctrlrl.train("sac-discrete", echo(8, config), network=tiny(config=config), out=str(tmp_path / "t"), **settings)
    ctrlrl.train("sac-discrete", "CartPole-v1", out=str(tmp_path / "c"), **settings)
    shares = [float((mine == likeliest).float().mean()) for mine, likeliest in taken]
    assert shares[0] > 0.95 and 0.2 < shares[1] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "sac-discrete"])
def test_the_same_agents_learn_text_and_cart_pole(algo: str, tmp_path: Path) -> None:
    """One class each, from `algorithms/`: it is given another network, and is told nothing of language.

    Of a model that knows nothing a sum over tokens would make answers of two words a fiftieth as likely as of one."""
    config = LanguageConfig(**{**SMALL.to_dict(), "normalize": "token"})
    network = tiny(seed=2, config=config)
    if algo == "ppo":
        agent = {"lr": 2e-3, "minibatch_size": 64, "epochs": 4, "normalize_reward": False, "gamma": 0.9}
        text = SETTINGS | {"steps": 3072, "rollout_steps": 256, "num_envs": 16, "agent": agent}
        cart: dict[str, Any] = {"steps": 12_000, "rollout_steps": 1024, "agent": {"hidden": [32], "lr": 3e-3}}
    else:
        agent = {"actor_lr": 2e-3, "critic_lr": 2e-3, "batch_size": 32, "gamma": 0.9, "alpha_lr": 1e-2, "utd": 0.5}
        text = SETTINGS | {"steps": 1600, "learning_starts": 200, "num_envs": 8, "agent": agent}
        cart = {"steps": 6_000, "learning_starts": 500, "agent": {"hidden": [64, 64], "utd": 1.0, "batch_size": 64}}
    before = play(_policy_of(algo, tiny(seed=2, config=config)))
    run = ctrlrl.train(algo, echo(text["num_envs"], config), network=network, out=str(tmp_path / "text"), **text)
    after = play(run.policy)
    assert after >= 0.95 and after > before + 0.2
    done = ctrlrl.train(algo, "CartPole-v1", out=str(tmp_path / "cart"), **SETTINGS | {"num_envs": 4} | cart)
    assert ctrlrl.evaluate(done, checkpoint="last", episodes=10).mean > 100


def _policy_of(algo: str, network: LanguageBackbone) -> Any:
    env = echo()
    made: dict[str, Any] = {"ppo": PPO, "sac-discrete": SACDiscrete}
    return made[algo](env.observation_space, env.action_space, seed=0, network=network).policy


def test_imitation_and_iql_take_the_model_too() -> None:
    env, g = echo(32), torch.Generator().manual_seed(0)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    right = right_answers(env)
    agents: list[Any] = [
        BC(env.observation_space, env.action_space, BCConfig(lr=2e-3), network=tiny()),
        IQLDiscrete(
            env.observation_space, env.action_space, IQLDiscreteConfig(actor_lr=3e-3, critic_lr=3e-3), network=tiny()
        ),
    ]
    for agent in agents:
        before = copy.deepcopy(agent.policy.state_dict())
        for _ in range(30 if isinstance(agent, BC) else 80):
            action = torch.where(torch.rand(32, generator=g) < 0.5, right, torch.randint(4, (32,), generator=g))
            if isinstance(agent, BC):
                action = right
            reward = (action == right).float()
            batch = batch_of(obs, action, reward)
            metrics = agent.update(batch)
        with torch.no_grad():
            hit = (agent.policy.act(obs)[0] == right).float().mean()
        assert float(hit) > 0.9, (type(agent), metrics)
        assert any(not torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_is_resumed_told_and_exported(rank: int, tmp_path: Path, capsys: Any) -> None:
    """The whole way by the command line, on a task that is registered."""
    lm, run, env = tmp_path / "lm", tmp_path / "run", "text/GuessNumber"
    options = ["--env-kwargs", '{"high": 4, "max_turns": 3}', "--language.max-candidates", "4"]
    small = ["--language.prompt-tokens", "40", "--language.candidate-tokens", "2"]
    made = ["--episodes", "20", "--epochs", "2", "--hidden", "16", "--heads", "2", "--layers", "1"]
    assert command(["language", "make-lm", "--env", env, "--out", str(lm), *made, *options, *small]) == 0
    assert "words, right in" in capsys.readouterr().out
    lora = ["--language.lora-rank", str(rank), "--language.lora-targets", "q_proj", "v_proj"] if rank else []
    train = ["train", "ppo", "--env", env, *options, *small, *lora, "--language.model", str(lm), "--num-envs", "4"]
    train += ["--rollout-steps", "16", "--agent.epochs", "1", "--agent.minibatch-size", "8", "--eval-episodes", "4"]
    train += ["--threads", "1", "--eval-every", "32", "--checkpoint-every", "20", "--agent.lr", "1e-3"]
    assert command([*train, "--steps", "96", "--out", str(tmp_path / "whole")]) == 0
    assert command([*train, "--steps", "32", "--out", str(run)]) == 0
    assert command(["resume", str(run), "--steps", "96"]) == 0
    assert_same(tmp_path / "whole", run)
    page = (run / "report.html").read_text()
    assert "What is said" in page and "goal: " in page and "no pictures" in page
    capsys.readouterr()
    assert command(["eval", str(run), "--episodes", "6"]) == 0
    greedy = capsys.readouterr().out
    assert command(["eval", str(run), "--episodes", "6", "--sample"]) == 0
    sampled = capsys.readouterr().out
    assert "success" in greedy and "turns" in greedy and greedy != sampled
    assert command(["language", "export", str(run), "--out", str(tmp_path / "out")]) == 0
    policy = ctrlrl.load(run).policy
    model = next(m for m in policy.modules() if isinstance(m, LanguageModel))
    ids = torch.tensor([[2, 3, 4, 5]])
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(out(ids).logits[0, -1], model.read(ids)[0][0], atol=1e-4)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == model.vocabulary
    code = command(["language", "export", str(run), "--out", str(tmp_path / "lora"), "--adapter"])
    assert code == (0 if rank else 2)
    if rank:
        assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    else:
        assert "has no adapter" in capsys.readouterr().err


def test_a_model_that_was_told_otherwise_is_remarked(tmp_path: Path, capsys: Any) -> None:
    """Also one that a run has trained; and the command that `make-lm` prints is told as the model was."""
    env, lm, run = "text/Maze", str(tmp_path / "lm"), str(tmp_path / "run")
    small = ["--episodes", "2", "--epochs", "1", "--hidden", "16", "--heads", "2", "--layers", "1"]
    told = ["--language.history", "1", "--language.form", "tokens", "--language.candidate-tokens", "3"]
    assert command(["language", "make-lm", "--env", env, "--out", lm, *small, *told]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "Train it: " in line)
    asked = shlex.split(line.partition("Train it: ctrlrl ")[2])
    assert asked[:4] == ["train", "ppo", "--env", env] and "--language.prompt-tokens" not in asked
    train = ["--num-envs", "2", "--rollout-steps", "8", "--steps", "8", "--agent.minibatch-size", "8", "--no-video"]
    train += ["--eval-every", "0", "--threads", "1"]
    assert command([*asked, *train, "--out", run]) == 0
    assert "has learned with" not in capsys.readouterr().out
    assert command(["language", "export", run, "--checkpoint", "last", "--out", str(tmp_path / "out")]) == 0
    for model in (lm, str(tmp_path / "out")):
        options = ["--language.model", model, "--language.candidate-tokens", "3"]
        assert command(["train", "ppo", "--env", env, *options, *train, "--out", f"{run}{len(model)}"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        form, history = "form tokens and here it is candidates", "history 1 and here it is 0"
        assert f"has learned with language.{form}, language.{history}" in said


def test_another_model_in_its_place_is_noticed(tmp_path: Path) -> None:
    options = {"max_candidates": 4, "prompt_tokens": 40, "candidate_tokens": 2, "model": str(tmp_path / "lm")}
    options |= {"lora_rank": 2, "lora_targets": ["q_proj"]}
    kwargs = {"high": 4, "max_turns": 3}
    lm = TinyConfig(hidden=16, heads=2, layers=1, episodes=10, epochs=1)
    made = lambda: make_text_env("text/GuessNumber", kwargs)  # noqa: E731
    make_lm(made, tmp_path / "lm", lm, vocabulary_episodes=10)
    small = {"steps": 32, "num_envs": 4, "rollout_steps": 16, "agent": {"epochs": 1, "minibatch_size": 8}}
    settings = SETTINGS | small | {"language": options, "env_kwargs": kwargs}
    run = ctrlrl.train("ppo", "text/GuessNumber", out=str(tmp_path / "run"), **settings)
    shutil.rmtree(tmp_path / "lm")
    make_lm(made, tmp_path / "lm", TinyConfig(**{**lm.to_dict(), "seed": 1}), vocabulary_episodes=10)
    for again in (functools.partial(ctrlrl.load, checkpoint="last"), ctrlrl.resume):
        with pytest.raises(UsageError, match=r"is no longer the one that the run was trained with \(frozen\)"):
            again(run.path)
    for algo, wrong, said in (
        ("sac", {}, "a language model is for bc, iql-discrete, iql-tokens, ppo, sac-discrete so far, not for sac"),
        ("ppo", {"pixels": 32}, "leave pixels out"),
        ("ppo", {"language": options | {"prompt_tokens": 5000}}, r"the model reads 512 tokens; .* = 5,034"),
    ):
        given = {"steps": 32, "num_envs": 4, "language": options, "env_kwargs": kwargs, "out": str(tmp_path / "no")}
        with pytest.raises(UsageError, match=said):
            ctrlrl.train(algo, "text/GuessNumber", **SETTINGS | given | wrong)


MAZE: dict[str, Any] = {"max_candidates": 4, "prompt_tokens": 30, "candidate_tokens": 2}


def maze_model(folder: Path, seed: int, episodes: int = 10) -> str:
    """A tiny model for the maze; with few episodes it knows fewer words."""
    lm = TinyConfig(hidden=16, heads=2, layers=1, episodes=2, epochs=1, seed=seed)
    make_lm(lambda: make_text_env("text/Maze", {"max_turns": 8}), folder, lm, vocabulary_episodes=episodes)
    return str(folder)


def test_what_was_learned_or_collected_with_another_model_is_refused(tmp_path: Path) -> None:
    """Of an adapter the weights below it, of a dataset the words of its tokens."""
    same, other = maze_model(tmp_path / "a", 0), maze_model(tmp_path / "b", 1)
    fewer = maze_model(tmp_path / "c", 0, episodes=0)
    agent = {"batch_size": 8, "entropy_penalty": 0.0, "q_clip": 0.0}
    small = SETTINGS | {
        "steps": 16,
        "num_envs": 4,
        "learning_starts": 8,
        "agent": agent,
        "env_kwargs": {"max_turns": 8},
    }
    lora = MAZE | {"lora_rank": 2, "lora_targets": ["q_proj"]}

    def train(name: str, model: str, **more: Any) -> ctrlrl.Run:
        settings = small | {"language": lora | {"model": model}, "out": str(tmp_path / name)} | more
        return ctrlrl.train("sac-discrete", "text/Maze", **settings)

    run = train("run", same, eval_every=16, eval_episodes=1)
    with pytest.raises(
        UsageError, match=r"--init-from .*another model than .*/b \(frozen.*\), and an adapter fits its own"
    ):
        train("no", other, init_from=str(run.path))
    train("yes", same, init_from=str(run.path))
    data = collect(run.path, tmp_path / "data", tier="replay", reference_episodes=1).path
    for algo, settings in (
        (
            "bc",
            {"updates": 2, "language": MAZE, "agent": {"batch_size": 8}, "threads": 1, "quiet": True, "eval_every": 0},
        ),
        ("sac-discrete", small | {"language": MAZE}),
    ):
        for model, fits in ((fewer, False), (other, True)):
            given = settings | {"language": MAZE | {"model": model}, "data": str(data)}
            given |= {"out": str(tmp_path / f"{algo}-{fits}")}
            if fits:  # the same words in the same order, whatever the weights
                ctrlrl.train(algo, "text/Maze", **given)
                continue
            with pytest.raises(UsageError, match=r"tokens of .*data are those of another tokenizer than that of .*/c"):
                ctrlrl.train(algo, "text/Maze", **given)


def test_a_model_is_evaluated_before_it_learns(tmp_path: Path) -> None:
    """Also where it writes its answers; so that what a report calls before is."""
    for algo, form in (("sac-discrete", "candidates"), ("ppo", "tokens")):
        config = LanguageConfig(**{**SMALL.to_dict(), "form": form})
        more = {"steps": 64, "num_envs": 8, "eval_every": 32, "eval_episodes": 4, "eval_env": echo(4, config)}
        more |= {"rollout_steps": 32} if algo == "ppo" else {"learning_starts": 32}
        run = ctrlrl.train(
            algo, echo(8, config), network=tiny(config=config), out=str(tmp_path / algo), **SETTINGS | more
        )
        steps = [one.step for one in load_run(run.path).evaluations]
        assert steps == [0, 32, 64]


def test_random_answers_are_those_on_offer() -> None:
    env = echo(3)
    policy, obs = RandomPolicy(env, 0), env.reset(0)
    for _ in range(20):
        obs = env.step(policy.act(obs)[0]).obs


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a text environment is for a language model: --language\.model DIR"):
        ctrlrl.train("ppo", "text/Maze", steps=10, out=str(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"no folder /nowhere \(language\.model\)"):
        ctrlrl.train("ppo", "text/Maze", steps=10, language={"model": "/nowhere"}, out=str(tmp_path / "a"))
    with pytest.raises(UsageError, match="two networks for one policy"):
        model = {"model": str(tmp_path)}
        ctrlrl.train("ppo", echo(8), steps=10, language=model, network=tiny(), out=str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_text_environments_are_listed_and_say_what_they_need(capsys: Any) -> None:
    assert command(["envs"]) == 0
    assert "text/GuessNumber" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"text/Maze speaks text, .*--language\.model DIR"):
        make_env("text/Maze")
