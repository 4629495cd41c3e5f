"""Configurations check themselves, are read strictly, and say what is wrong."""

import json
from dataclasses import FrozenInstanceError

import pytest

from ctrlrl.algorithms.registry import ALGORITHMS, train_config_class
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.config import ReplayConfig, changed_fields, read_config_file
from ctrlrl.errors import UsageError

TrainSAC = train_config_class("sac")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SACConfig(gamma=1.5), "agent.gamma must be in (0, 1], got 1.5"),
        (lambda: SACConfig(gamma=float("nan")), "agent.gamma must be a finite number, got nan"),
        (lambda: SACConfig(gamma="0.9"), "agent.gamma must be a finite number, got '0.9'"),
        (lambda: SACConfig(batch_size=True), "agent.batch_size must be an integer, got True"),
        (lambda: SACConfig(batch_size=1.5), "agent.batch_size must be an integer, got 1.5"),
        (lambda: SACConfig(hidden=[64, "x"]), "agent.hidden must be an integer, got 'x'"),
        (lambda: SACConfig(hidden=(0,)), "agent.hidden must be widths between 1 and 100,000, got (0,)"),
        (lambda: SACConfig(target_entropy="auto"), "agent.target_entropy must be a finite number or null, got 'auto'"),
        (lambda: SACConfig(log_std_bounds=(2, -5)), "agent.log_std_bounds must be two numbers, the lower one first"),
        (lambda: ReplayConfig(n_step=0), "buffer.n_step must be between 1 and 1000, got 0"),
        (lambda: TrainSAC(env="X", steps=0), "steps must be at least 1, got 0"),
        (
            lambda: TrainSAC(env="X", backend="gpu"),
            "backend must be one of auto, native, native-fast, warp, gymnasium, workers, parallel, got 'gpu'",
        ),
        (lambda: TrainSAC(env="X", seed=-1), "seed must be between 0 and 4294967295, got -1"),
        (
            lambda: TrainSAC(env="X", num_envs=8, buffer={"capacity": 4}),
            "buffer must be ReplayConfig, got {'capacity': 4}",
        ),
        (
            lambda: TrainSAC(env="X", num_envs=8, buffer=ReplayConfig(capacity=4)),
            "buffer.capacity must be at least num_envs = 8, got 4",
        ),
        (
            lambda: TrainSAC.from_dict({"env": "X", "agent": {"gama": 0.9}}, source="c.yaml"),
            "unknown field 'agent.gama' in c.yaml. Did you mean gamma?",
        ),
        (
            lambda: TrainSAC.from_dict({"env": "X", "agent": {"gamma": [1]}}),
            "agent.gamma must be a finite number, got [1]",
        ),
        (lambda: TrainSAC.from_dict({}), "missing field 'env'"),
    ],
)
def test_bad_values_name_field_range_and_value(make, message):
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value).startswith(message)


def test_round_trip_through_json_keeps_every_value():
    config = TrainSAC.from_dict({"env": "X", "agent": {"hidden": [64], "gamma": 1}, "env_kwargs": {"a": [1]}})
    assert config.agent.hidden == (64,)
    assert config.agent.gamma == 1.0
    assert isinstance(config.agent.gamma, float)
    assert TrainSAC.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_base_supplies_what_is_left_out():
    base = TrainSAC.from_dict({"env": "X", "agent": {"gamma": 0.9}})
    config = TrainSAC.from_dict({"agent": {"tau": 0.01}}, base=base)
    assert (config.agent.gamma, config.agent.tau) == (0.9, 0.01)
    assert changed_fields(config, TrainSAC(env="X")) == ["agent.gamma", "agent.tau"]


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        SACConfig().gamma = 0.5


def test_config_files(tmp_path):
    good, bad, text = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"
    good.write_text("agent: {gamma: 0.9}\n")
    bad.write_text("agent: {gamma: 0.9\n")
    text.write_text("hello\n")
    assert read_config_file(good) == {"agent": {"gamma": 0.9}}
    (tmp_path / "e.yaml").write_text("agent: {actor_lr: 3e-4, gamma: 1}\n")
    assert read_config_file(tmp_path / "e.yaml") == {"agent": {"actor_lr": 3e-4, "gamma": 1}}
    with pytest.raises(UsageError, match="no valid YAML or JSON"):
        read_config_file(bad)
    with pytest.raises(UsageError, match="must hold fields and their values"):
        read_config_file(text)
    with pytest.raises(UsageError, match="no such config file"):
        read_config_file(tmp_path / "d.yaml")


def test_presets_are_valid_and_picked_by_name():
    for algorithm in ALGORITHMS.values():
        for preset in algorithm.presets:
            required = {"env": "X"} | ({"data": "set"} if algorithm.loop == "offline" else {})
            train_config_class(algorithm.name).from_dict(required | preset.values)
    sac = ALGORITHMS["sac"]
    assert sac.preset_for("Swimmer-v5").values["agent"]["gamma"] == 0.999
    assert sac.preset_for("some.module:Pendulum-v1").name == "pendulum"
    assert sac.preset_for("HalfCheetah-v5") is None
    assert sac.preset_for("InvertedPendulum-v5") is None
