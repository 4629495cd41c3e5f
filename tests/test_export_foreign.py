"""Bundles of models that Stable-Baselines3 and others trained."""

from __future__ import annotations

import base64
import copy
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.cli.main import run as command
from ctrlrl.deploy import Actor, Bundle
from ctrlrl.errors import UsageError

sb3 = pytest.importorskip("stable_baselines3")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from stable_baselines3.common.torch_layers import FlattenExtractor  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

from ctrlrl.training.export_foreign import export_onnx, export_sb3  # noqa: E402

NETS = {"net_arch": [16, 16]}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("PPO", "Pendulum-v1", {"n_steps": 32, "batch_size": 32, "policy_kwargs": NETS}),
    "ppo-elu": ("PPO", "Pendulum-v1", {"n_steps": 32, "policy_kwargs": NETS | {"activation_fn": torch.nn.ELU}}),
    "ppo-discrete": ("PPO", "CartPole-v1", {"n_steps": 32, "policy_kwargs": NETS}),
    "a2c": ("A2C", "Pendulum-v1", {"policy_kwargs": NETS}),
    "sac": ("SAC", "Pendulum-v1", {"policy_kwargs": NETS, "learning_starts": 32}),
    "td3": ("TD3", "Pendulum-v1", {"policy_kwargs": NETS, "learning_starts": 32}),
    "dqn": ("DQN", "CartPole-v1", {"policy_kwargs": NETS, "learning_starts": 32}),
}


def saved(kind: str, folder: Path, *, normalize: bool) -> tuple[Any, Any, Path]:
    algo, env_id, settings = copy.deepcopy(MODELS[kind])  # SB3 writes into what it is given
    env: Any = DummyVecEnv([lambda: gym.make(env_id)])
    env = VecNormalize(env, clip_obs=2.0) if normalize else env
    model = getattr(sb3, algo)("MlpPolicy", env, device="cpu", seed=0, **settings)
    model.learn(64)
    model.save(folder / "model.zip")
    if normalize:
        env.save(str(folder / "statistics.pkl"))
    return model, env, folder / "model.zip"


@pytest.mark.parametrize("kind", MODELS)
def test_models_act_as_in_stable_baselines3(kind: str, tmp_path: Path, capsys: Any) -> None:
    normalize = not kind.startswith("dqn")
    model, env, path = saved(kind, tmp_path, normalize=normalize)
    line = ["export", str(path), "--from", "sb3", "--out", str(tmp_path / "b"), "--control-dt", "0.05"]
    more = ["--vec-normalize", str(tmp_path / "statistics.pkl")] if normalize else []
    assert command([*line, *more]) == 0
    assert "runs with onnx, numpy, c" in capsys.readouterr().out
    bundle = Bundle.open(tmp_path / "b")
    actors = [Actor(bundle, name) for name in ("onnx", "numpy", "c")]
    for seed in range(10):
        seen = gym.make(MODELS[kind][1]).reset(seed=seed)[0] * (1 + seed)
        own = env.normalize_obs(seen[None])[0] if normalize else seen
        expected, _ = model.predict(own, deterministic=True)
        for actor in actors:
            np.testing.assert_allclose(actor.act(seen), expected, atol=1e-5)


class Doubling(FlattenExtractor):
    """Without weights, so that no layer tells of it."""

    def forward(self, observations: Any) -> Any:
        return 2 * super().forward(observations)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run!",))


def test_nothing_in_a_model_is_run(tmp_path: Path, capsys: Any) -> None:
    _, _, path = saved("a2c", tmp_path, normalize=True)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def written(**changes: bytes) -> Path:
        out = tmp_path / "evil.zip"
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in (parts | {key.replace("__", "."): value for key, value in changes.items()}).items():
                archive.writestr(name, content)
        return out

    data = json.loads(parts["data"])
    data["observation_space"][":serialized:"] = base64.b64encode(pickle.dumps(Evil())).decode()
    with pytest.raises(UsageError, match=r"names 'builtins\.print', which is no part"):
        export_sb3(written(data=json.dumps(data).encode()), tmp_path / "b")
    data = json.loads(parts["data"])
    data["policy_class"][":serialized:"] = base64.b64encode(pickle.dumps(Evil())).decode()  # which nobody reads
    export_sb3(written(data=json.dumps(data).encode()), tmp_path / "fine")
    buffer = io.BytesIO()
    torch.save({"action_net.weight": Evil()}, buffer)
    with pytest.raises(UsageError, match=r"the weights in .* cannot be read"):
        export_sb3(written(policy__pth=buffer.getvalue()), tmp_path / "b")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match=r"names 'builtins\.print', which is no part"):
        export_sb3(path, tmp_path / "b", vec_normalize=tmp_path / "evil.pkl")
    assert "run!" not in capsys.readouterr().out and not (tmp_path / "b").exists()

    for change, message in (
        ({"data": b"{"}, "no model of Stable-Baselines3, or a damaged one"),
        ({"data": b"[]"}, "its parts are not as it writes them"),
        ({"data": b"{}"}, "does not say what its observation_space is"),
        ({"policy__pth": b"PK"}, r"the weights in .* cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            export_sb3(written(**change), tmp_path / "b")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UsageError, match="no model of Stable-Baselines3, or a damaged one"):
        export_sb3(tmp_path / "text.zip", tmp_path / "b")
    with pytest.raises(UsageError, match="no such file"):
        export_sb3(tmp_path / "none.zip", tmp_path / "b")


def test_other_policies_are_named(tmp_path: Path) -> None:
    model = sb3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", n_steps=32, use_sde=True)
    model.save(tmp_path / "sde.zip")
    with pytest.raises(UsageError, match="gSDE"):
        export_sb3(tmp_path / "sde.zip", tmp_path / "b")
    doubling = {"policy_kwargs": {"features_extractor_class": Doubling}}
    sb3.PPO("MlpPolicy", "Pendulum-v1", device="cpu", n_steps=32, **doubling).save(tmp_path / "doubling.zip")
    with pytest.raises(UsageError, match="has features_extractor_class, another way to observe"):
        export_sb3(tmp_path / "doubling.zip", tmp_path / "b")
    _, _, path = saved("a2c", tmp_path, normalize=False)
    other = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    VecNormalize(other).save(str(tmp_path / "other.pkl"))
    with pytest.raises(UsageError, match=r"has statistics of \(4,\); the model observes \(3,\)"):
        export_sb3(path, tmp_path / "b", vec_normalize=tmp_path / "other.pkl")


SPEC: dict[str, Any] = {
    "name": "arm",
    "control_dt": 0.02,
    "observation": [{"name": "seen", "shape": [4]}],
    "action": {"kind": "box", "shape": [2], "low": [-1, -1], "high": [1, 1]},
    "state": {"memory": "memory_out"},
}


def recurrent(path: Path) -> Any:
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = torch.nn.GRUCell(4, 6), torch.nn.Linear(6, 2)

        def forward(self, seen: Any, memory: Any) -> Any:
            following = self.cell(seen, memory)
            return torch.tanh(self.head(following)), following

    module = Cell().eval()
    program = torch.onnx.export(
        module,
        (torch.zeros(1, 4), torch.zeros(1, 6)),
        input_names=["seen", "memory"],
        output_names=["target", "memory_out"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    return module


def test_an_onnx_file_with_a_specification(tmp_path: Path, capsys: Any) -> None:
    module = recurrent(tmp_path / "arm.onnx")
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    line = ["export", str(tmp_path / "arm.onnx"), "--from", "onnx", "--spec", str(tmp_path / "spec.json")]
    assert command([*line, "--out", str(tmp_path / "b")]) == 0
    assert "memory memory; runs with onnx, numpy, c" in capsys.readouterr().out
    for name in ("onnx", "numpy", "c"):
        actor, memory = Actor(Bundle.open(tmp_path / "b"), name), torch.zeros(1, 6)
        for t in range(5):
            seen = torch.linspace(-1, 1, 4)[None] * t
            with torch.no_grad():
                expected, memory = module(seen, memory)
            np.testing.assert_allclose(actor.act(seen[0].numpy()), expected[0].numpy(), atol=1e-5)

    def refused(message: str, **changes: Any) -> None:
        (tmp_path / "bad.json").write_text(json.dumps({k: v for k, v in (SPEC | changes).items() if v is not None}))
        with pytest.raises(UsageError, match=message):
            export_onnx(tmp_path / "arm.onnx", tmp_path / "bad.json", tmp_path / "c")
        assert not (tmp_path / "c").exists()

    refused("has the inputs seen, memory; .* describes seen", state=None)
    refused("and no gone, which", state={"memory": "gone"})
    refused("lacks action", action=None)
    refused("cannot be run on what", observation=[{"name": "seen", "shape": [5]}])
    refused(r"gives actions \(1, 2\); .* says \(1, 3\)", action=SPEC["action"] | {"shape": [3]})
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UsageError, match="is no ONNX model that can be read"):
        export_onnx(tmp_path / "text.onnx", tmp_path / "spec.json", tmp_path / "c")


def test_options_that_do_nothing_are_refused(tmp_path: Path, capsys: Any) -> None:
    for line, message in (
        (["x", "--spec", "y"], "--spec does nothing with --from run"),
        (["x", "--from", "sb3", "--checkpoint", "last"], "--checkpoint does nothing with --from sb3"),
        (["x", "--from", "onnx"], "an ONNX file does not say what it observes and does: --spec FILE"),
    ):
        assert command(["export", *line, "--out", str(tmp_path / "b")]) == 2
        assert message in capsys.readouterr().err
