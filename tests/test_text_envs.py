"""Text environments: the contract they all keep, and what each says, rewards and demonstrates."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import pytest

from ctrlrl.envs.text.base import TextEnv, TextState, TextStep
from ctrlrl.envs.text.calculator import Calculator, evaluate
from ctrlrl.envs.text.frozen_lake import FrozenLake
from ctrlrl.envs.text.guess import GuessNumber
from ctrlrl.envs.text.maze import GOAL, LAYOUT, Maze
from ctrlrl.envs.text.registry import TEXT_TASKS, is_text_task, make_text_env
from ctrlrl.errors import UsageError

BRIDGED = {
    "text/textarena:GuessTheNumber-v0": [str(number) for number in range(1, 21)],
    "text/textarena:FrozenLake-v0": ["up", "down", "left", "right"],
    "text/textarena:Blackjack-v0": ["hit", "stand"],
    "text/gem:game:GuessTheNumber-v0-easy": [str(number) for number in range(1, 11)],
    "text/gem:game:FifteenPuzzle-v0-easy": ["up", "down", "left", "right"],
}
"""IDs of other packages' games, and answers to them."""
needs_minigrid = pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="minigrid is not installed")


def made(env_id: str, **kwargs: Any) -> TextEnv:
    package = env_id.removeprefix("text/").split(":")[0] if ":" in env_id else TEXT_TASKS[env_id].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return make_text_env(env_id, kwargs)


def babyai(level: str, **kwargs: Any) -> Any:
    return make_text_env(f"text/BabyAI-{level}", kwargs)


def over(step: TextStep) -> bool:
    return step.terminated or step.truncated


def demonstrated(env: TextEnv) -> Callable[[TextState], str | None]:
    return lambda _: env.expert()


def in_turn(*answers: str) -> Callable[[TextState], str]:
    left = iter(answers)
    return lambda _: next(left)


def played(env: TextEnv, state: TextState, answer: Callable[[TextState], Any]) -> tuple[list[TextStep], TextState]:
    """The steps to the end of an episode with `answer(state)`, and the last state."""
    steps: list[TextStep] = []
    while not steps or not over(steps[-1]):
        steps.append(env.step(answer(state)))
        state = steps[-1].state
    return steps, state


def check_words(state: TextState) -> None:
    assert isinstance(state.observation, str) and state.observation.strip()
    assert isinstance(state.goal, str) and state.goal.strip()
    assert len(set(state.commands)) == len(state.commands) and all(c.strip() == c != "" for c in state.commands)
    json.dumps([state.commands, state.achieved])


@pytest.mark.parametrize("env_id", [*TEXT_TASKS, *BRIDGED])
def test_every_task_keeps_the_contract(env_id: str) -> None:
    env, twin = made(env_id), made(env_id)
    first = env.reset(7)
    assert twin.reset(7) == first and env.reset(7) == first
    assert len({env.reset(seed) for seed in range(20)}) > 1 or "Guess" in env_id or ":" in env_id
    draw = random.Random(0)

    def answer(state: TextState) -> str:
        known = state.commands or BRIDGED.get(env_id) or [env.expert() or ""]
        return draw.choice([*known, *known, "no such answer"])

    saved, follows = 0, False
    state = env.reset(3)
    for turn in range(40):  # episodes one after another, the twin taking over in the midst of them
        check_words(state)
        if turn % 5 == 2:
            twin.reset(99)
            assert twin.set_state(json.loads(json.dumps(env.get_state()))) == state
            assert twin.expert() == env.expert()
            saved, follows = saved + 1, True
        said = answer(state)
        step = env.step(said)
        if state.commands:
            assert step.valid == (said in state.commands)
        assert step.state.goal == state.goal and isinstance(step.reward, float)
        assert not (step.terminated and step.truncated) and (step.success is not None) == over(step)
        assert not follows or twin.step(said) == step
        state = step.state
        if over(step):
            state = env.reset()
            assert not follows or twin.reset() == state
    assert saved == 8


@pytest.mark.parametrize("env_id", [*TEXT_TASKS, *BRIDGED])
def test_an_episode_ends_with_its_turns(env_id: str) -> None:
    env = made(env_id, max_turns=2)
    env.reset(0)
    steps = [env.step("no such answer")]
    while not over(steps[-1]):
        steps.append(env.step("no such answer"))
    assert len(steps) <= 2 and not any(step.valid for step in steps) and steps[-1].success is False
    if env_id in TEXT_TASKS:  # turns are part of the game where a number is guessed
        assert len(steps) == 2 and steps[-1].truncated == ("Guess" not in env_id)


@pytest.mark.parametrize("env_id", TEXT_TASKS)
def test_the_expert_solves(env_id: str) -> None:
    env = made(env_id)
    wins = 0
    for seed in range(20):
        steps, _ = played(env, env.reset(seed), demonstrated(env))
        assert all(step.valid for step in steps)
        wins += steps[-1].success is True
    assert wins >= (17 if "Guess" in env_id else 20), f"{wins} of 20"


@pytest.mark.parametrize("level", ["GoToLocalS5N2", "PickupLoc"])
@needs_minigrid
def test_the_bot_goes_on_after_what_others_did_and_admissible_commands_change_something(level: str) -> None:
    env, draw, wins = babyai(level, admissible=True), random.Random(0), 0
    grid = env._env

    def situation() -> Any:
        return grid.grid.encode().tolist(), tuple(grid.agent_pos), grid.agent_dir, grid.carrying

    for seed in range(8):
        state = env.reset(seed)
        for _ in range(10):
            before = situation()
            env.expert()
            assert situation() == before  # asking changes nothing
            step = env.step(draw.choice(state.commands))
            state = step.state
            assert situation() != before
            if over(step):
                break
        else:
            step = played(env, state, demonstrated(env))[0][-1]
        wins += step.success is True
    assert wins == 8


@needs_minigrid
def test_a_seed_begins_minigrids_own_episode_without_its_remarks(capsys: pytest.CaptureFixture[str]) -> None:
    env = babyai("GoToLocal")
    capsys.readouterr()
    goals = [env.reset(seed).goal for seed in range(15)]
    assert capsys.readouterr().out == ""
    theirs = gym.make("BabyAI-GoToLocal-v0", disable_env_checker=True)
    assert goals == [theirs.reset(seed=seed)[0]["mission"] for seed in range(15)]


@needs_minigrid
def test_random_commands_succeed_as_often_as_known_and_hindsight_tells_the_truth() -> None:
    from minigrid.envs.babyai.core.verifier import GoToInstr, ObjDesc

    env, draw, wins, other = babyai("GoToLocal", time_penalty=0.01), random.Random(0), 0, 0
    for seed in range(130):
        state, step = env.reset(seed), None
        objects = {(cell.type, cell.color) for cell in env._env.grid.grid if cell and cell.type != "wall"}
        tasks = {}
        if seed < 40:  # minigrid's own judges, for all goals that this room could have had
            for kind, colour in objects:
                judge = GoToInstr(ObjDesc(kind, colour))
                judge.reset_verifier(env._env)
                tasks[judge.surface(env._env)] = judge
        while step is None or not over(step):
            step = env.step(draw.choice(state.commands[:3] if tasks else state.commands))
            state = step.state
            assert env.reward_of(state.goal, state) == (step.reward, step.terminated)
            if tasks:
                assert set(state.achieved) == {text for text, judge in tasks.items() if judge.verify(2) == "success"}
                other += bool(set(state.achieved) - {state.goal})
        wins += seed >= 40 and step.success is True
    assert 0.2 < wins / 90 < 0.55 and other > 100  # 0.37 is known


WAY = re.compile(r"(\d) steps? (forward|left|right)|(\d) (forward|left|right)")


def said(env: Any, phrase: str, terse: bool) -> tuple[str, tuple[int, int], int]:
    """Of `a red ball 1 step forward and 2 steps left`: the object, its cell in the grid, and the number of its ways."""
    ways = [(int(a or c), b or d) for a, b, c, d in WAY.findall(phrase)]
    name = WAY.split(phrase)[0].strip()
    name = name if terse else name.split(" ", 1)[1]
    cell = env.agent_pos
    for count, way in ways:
        cell = cell + count * (env.dir_vec if way == "forward" else env.right_vec * (1 if way == "right" else -1))
    return name, (int(cell[0]), int(cell[1])), len(ways)


@pytest.mark.parametrize(
    ("level", "terse"), [("GoToLocal", False), ("UnlockLocal", True), ("UnlockLocal", False), ("GoToObjDoor", False)]
)
@needs_minigrid
def test_what_is_said_is_what_is_seen(level: str, terse: bool) -> None:
    env, draw = babyai(level, terse=terse), random.Random(1)
    inner, state, carried, doors = env._env, env.reset(1), 0, 0
    for _ in range(60):
        text, *rest = state.observation.removeprefix("you see ").removesuffix(" .").split(" . ")
        phrases = [] if text == "nothing" else [said(inner, phrase, terse) for phrase in text.split(" , ")]
        objects = []
        for name, cell, count in phrases:
            there = inner.grid.get(*cell)
            if name == "wall":
                assert there.type == "wall" and count == 1
                continue
            kind = f"{there.color} {there.type}"
            if there.type == "door":
                kind = f"{'locked' if there.is_locked else 'open' if there.is_open else 'closed'} {kind}"
                doors += 1
            assert name == kind
            objects.append(cell)
        view, seen = inner.gen_obs_grid()
        visible = []
        for i in range(7):
            for j in range(7):
                thing = view.get(i, j)
                if seen[i, j] and thing and thing.type != "wall" and (i, j) != (3, 6):
                    cell = inner.agent_pos + (6 - j) * inner.dir_vec + (i - 3) * inner.right_vec
                    visible.append((int(cell[0]), int(cell[1])))
        assert sorted(objects) == sorted(visible)
        walls = [cell for name, cell, _ in phrases if name == "wall"]
        for ray in ([(3, j) for j in range(5, -1, -1)], [(i, 6) for i in (2, 1, 0)], [(i, 6) for i in (4, 5, 6)]):
            first = next((p for p in ray if seen[p] and view.get(*p) and view.get(*p).type == "wall"), None)
            if first:
                cell = inner.agent_pos + (6 - first[1]) * inner.dir_vec + (first[0] - 3) * inner.right_vec
                walls.remove((int(cell[0]), int(cell[1])))
        assert not walls
        held = inner.carrying
        assert rest == ([f"{'carry' if terse else 'you carry a'} {held.color} {held.type}"] if held else [])
        carried += held is not None
        step = env.step(draw.choice([*state.commands, "go forward", *[env.expert() or "drop"] * 3]))
        state = env.reset() if over(step) else step.state
    assert (doors and carried) or level != "UnlockLocal"


def test_the_lake_is_as_said_and_slips_to_either_side() -> None:
    moves = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
    env, draw = FrozenLake(size=8), random.Random(0)
    for seed in range(10):
        state, step, row, column = env.reset(seed), None, 1, 1
        assert env.expert() in moves and env._steps[1, 1] == len(played(env, state, demonstrated(env))[0])
        state = env.reset(seed)
        while step is None or not over(step):
            numbers = [int(word) for word in re.findall(r"\d+", state.observation)]
            assert numbers == [row, 8, column, 8] and state.achieved == (f"go to row {row} column {column}",)
            for way, (down, right) in moves.items():
                inside = 1 <= row + down <= 8 and 1 <= column + right <= 8
                cell = env.lake[row + down - 1][column + right - 1] if inside else "edge"
                assert f"{way} {'ice' if cell == '.' else 'hole' if cell == 'O' else cell}" in state.observation
            command = draw.choice(state.commands)
            if f"{command} edge" not in state.observation:
                row, column = row + moves[command][0], column + moves[command][1]
            step = env.step(command)
            state = step.state
            assert env.reward_of(state.goal, state) == (step.reward, step.terminated)
    slippery, ends = FrozenLake(slippery=True, holes=0.0), []
    for _ in range(300):
        slippery.reset()
        ends.append(slippery.step("down").state.observation.split(" . ")[0])
    assert all(
        abs(ends.count(f"row {r} of 4 , column {c} of 4") / 300 - 1 / 3) < 0.1 for r, c in [(1, 1), (2, 1), (1, 2)]
    )


def test_the_mazes_distances_rewards_and_hindsight() -> None:
    assert {len(row) for row in LAYOUT} == {13} and LAYOUT[GOAL[0]][GOAL[1]] == "."
    full, partial = Maze(), Maze("partial")
    by_hand = {(1, 1): 16, (1, 11): 16, (4, 6): 8, (7, 1): 10, (7, 10): 1, (4, 1): 13}
    for seed in range(150):
        state = full.reset(seed)
        assert partial.reset(seed).observation == state.observation.split(" . ", 1)[1]
        distance, cell = full.distance, full._cell
        assert by_hand.get(cell, distance) == distance
        by_hand.pop(cell, None)
        steps, _ = played(full, state, demonstrated(full))
        assert len(steps) == distance and sum(step.reward for step in steps) == 1 - distance
        for step in steps:
            assert full.reward_of(step.state.goal, step.state) == (step.reward, step.terminated)
            assert full.reward_of(step.state.achieved[0], step.state) == (0.0, True)
    assert not by_hand
    full.reset(0)
    assert full.step("north").reward == -4


def test_the_odds_of_guessing() -> None:
    env = GuessNumber()
    assert (env.optimum(), env.uninformed()) == (0.9375, 0.25)
    bisected = blind = 0
    for secret in range(1, 17):
        env.reset(0)
        env._secret = secret
        bisected += played(env, env._look(), demonstrated(env))[0][-1].success is True
        env.reset(0)
        env._secret = secret
        blind += played(env, env._look(), in_turn("3", "16", "7", "1"))[0][-1].success is True
    assert (bisected, blind) == (15, 4)
    rates = []
    for consistent in (0.0, 0.5, 1.0):
        env, wins = GuessNumber(consistent=consistent), 0
        for seed in range(600):
            steps, last = played(env, env.reset(seed), demonstrated(env))
            wins += steps[-1].success is True
            guesses = re.findall(r"(\d+) is", last.observation)
            assert len(set(guesses)) == len(guesses)
        rates.append(wins / 600)
    assert abs(rates[0] - 0.25) < 0.06 and rates[0] < rates[1] < rates[2] < 0.9375
    free = GuessNumber(free=True, invalid_penalty=0.5)
    assert free.reset(0).commands == ()
    assert free.step("it is 7") == free.step("17") == TextStep(free._look(), -0.5, valid=False)
    assert free.step(" 7 ").valid


def test_the_calculator_reads_arithmetic_and_nothing_else() -> None:
    draw = random.Random(0)
    for _ in range(200):
        words = [str(draw.randint(0, 99))]
        for _ in range(draw.randint(0, 6)):
            words += [draw.choice("+-*"), draw.choice(["", "-"]) + str(draw.randint(0, 99))]
        text = " ".join(words)
        if len(words) > 4:
            text = f"({' '.join(words[:3])}) {' '.join(words[3:])}"
        assert evaluate(text) == eval(text)
    assert evaluate("(" * 49 + "1" + ")" * 49) == 1
    refused = [
        "",
        "()",
        "1 2",
        "1 +",
        "9 ** 9",
        "2**99999999",
        "1/2",
        "7 // 2",
        "1e9",
        "0x10",
        "1_0",
        "٣ + 1",
        "a",
        "a.b",
    ]
    refused += ["__import__('os')", "lambda: 1", "(1", "1)", "3; 4", "1\x00", "(" * 101, "-" * 101 + "1", "9" * 10]
    refused += ["999999999 * 999999999", "*1", "1 == 1", "[1]", "1,2", "(1)(2)"]
    for text in refused:
        with pytest.raises(ValueError):
            evaluate(text)
    env = Calculator(budget=1, call_cost=0.1, invalid_penalty=0.3)
    state = env.reset(4)
    question = state.goal.removeprefix("what is ").removesuffix(" ?")
    assert state.observation == "1 call left" and env.expert() == f"call {question}"
    assert env.step("call open('x')") == TextStep(
        replace(state, observation="refused , 1 call left"), -0.3, valid=False
    )
    called = env.step(f" Call  {question}")
    assert called.state.observation == f"result {eval(question)} , 0 calls left" and called.reward == -0.1
    assert not env.step("call 1 + 1").valid and not env.step("answer me").valid
    assert env.step(f"answer {eval(question)}") == TextStep(
        replace(state, observation="right , 0 calls left"), 1.0, terminated=True, success=True
    )
    env.reset(4)
    wrong = env.step(f"answer {eval(question) + 1}")
    assert wrong.terminated and wrong.success is False and wrong.reward == 0


@pytest.mark.parametrize(
    ("env_id", "kwargs", "words"),
    [
        ("text/Mazes", {}, ["no text environment 'text/Mazes'", "Did you mean text/Maze"]),
        ("text/Maze", {"observe": "full"}, ["no argument 'observe'", "Did you mean observed?", "random_goal"]),
        ("text/Maze", {"max_turns": "9"}, ["max_turns takes an integer, got '9'"]),
        ("text/Maze", {"max_turns": 0}, ["max_turns is 1 or more, got 0"]),
        ("text/Maze", {"observed": "all"}, ["full or partial, got 'all'"]),
        ("text/FrozenLake", {"size": 5, "fixed": True}, ["a fixed one 4 or 8: got size = 5"]),
        ("text/GuessNumber", {"low": 9, "high": 3}, ["low = 9, high = 3"]),
        ("text/Calculator", {"terms": 1}, ["terms = 1"]),
    ],
)
def test_what_is_asked_wrongly_is_answered(env_id: str, kwargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        make_text_env(env_id, kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


@needs_minigrid
def test_a_level_that_is_none_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*BabyAI-GoToLocalS5N2-v0"):
        babyai("GoToLocalS5N22")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for env_id, package in [("BabyAI-GoToLocal", "minigrid"), ("textarena:X", "textarena"), ("gem:X", "gem-llm")]:
        with pytest.raises(UsageError, match=rf"pip install {package}$"):
            make_text_env(f"text/{env_id}")
    assert is_text_task("text/Maze") and not is_text_task("Pendulum-v1") and not is_text_task(3)


def test_the_registry_imports_no_environment() -> None:
    code = "import sys, ctrlrl.envs.text.registry; print(sorted({'torch', 'minigrid', 'mujoco'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
