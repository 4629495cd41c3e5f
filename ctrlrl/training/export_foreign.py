"""Bundles of policies that were trained elsewhere: models of Stable-Baselines3, and ONNX files.

Of a model of SB3 the weights are read by torch's reader of tensors alone (`weights_only`), and spaces and statistics
from their pickles as data: nothing that the file names is imported or called.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.data.importers.pickles import Call, array_of, number_of, read_pickle, read_pickled
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.manifest import Entry, Manifest, Network
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.to_onnx import ACTION, BARE, OPSET, as_inputs, to_onnx
from ctrlrl.errors import UsageError
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState
from ctrlrl.runs.provenance import now
from ctrlrl.training.export_run import require_empty, write_bundle
from ctrlrl.training.manifest_parts import action_of
from ctrlrl.tree import Obs

GOLDENS = 32
LARGEST = 2**30
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "ELU": nn.ELU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "LeakyReLU": nn.LeakyReLU,
    "Sigmoid": nn.Sigmoid,
    "Softplus": nn.Softplus,
}
_NOT_ACTING = (
    "critic",
    "actor_target.",
    "q_net_target.",
    "value_net.",
    "mlp_extractor.value_net.",
    "log_std",
    "actor.log_std",
)
"""What SB3 keeps beside the layers that act."""
ALLOWED = frozenset(
    {
        ("gymnasium", "Box"),
        ("gymnasium", "Discrete"),
        ("gymnasium", "MultiDiscrete"),
        ("gym", "Box"),
        ("gym", "Discrete"),
        ("gym", "MultiDiscrete"),
        ("stable_baselines3", "VecNormalize"),
        ("stable_baselines3", "RunningMeanStd"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy", "_reconstruct"),
        ("numpy", "scalar"),
        ("numpy", "_frombuffer"),
        ("numpy", "__generator_ctor"),
        ("numpy", "__bit_generator_ctor"),
        ("numpy", "PCG64"),
        ("numpy", "SeedSequence"),
        ("numpy", "__pyx_unpickle_SeedSequence"),
        ("collections", "OrderedDict"),
    }
)
"""All that pickles of spaces and of VecNormalize name, by package."""


class ForeignPolicy(Policy):
    """A multilayer perceptron of SB3's: statistics, layers, and what becomes of the last one's numbers."""

    mean: Tensor
    scale: Tensor

    def __init__(self, body: nn.Sequential, space: gym.Space[Any], kind: str, statistics: Mapping[str, Array]) -> None:
        super().__init__()
        self.body, self.kind = body, kind
        self.scaling = ActionScaling(space) if isinstance(space, gym.spaces.Box) else None
        self.clip = float(statistics["clip"]) if statistics else 0.0
        mean = statistics.get("mean", np.zeros(1))
        variance, epsilon = statistics.get("variance", np.ones(1)), statistics.get("epsilon", np.zeros(()))
        self.register_buffer("mean", torch.from_numpy(np.asarray(mean, np.float32)))
        self.register_buffer("scale", torch.from_numpy(np.asarray(1 / np.sqrt(variance + epsilon), np.float32)))

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        assert isinstance(obs, Tensor)
        x = obs.flatten(1).float()
        if self.clip:
            x = ((x - self.mean) * self.scale).clamp(-self.clip, self.clip)
        out = self.body(x)
        if self.kind == "choice":
            return out.argmax(1), {}, {}
        assert self.scaling is not None
        if self.kind == "squashed":
            return self.scaling.to_environment(torch.tanh(out)), {}, {}
        low = self.scaling.low
        return out.view(-1, *low.shape).clamp(low, self.scaling.high), {}, {}


def export_sb3(
    model: str | Path,
    out: str | Path,
    *,
    vec_normalize: str | Path | None = None,
    name: str | None = None,
    control_dt: float | None = None,
) -> Bundle:
    """Write a bundle of a model that Stable-Baselines3 saved: PPO, A2C, SAC, TD3, DDPG and DQN with `MlpPolicy`.

    Args:
        model: the zip.
        out: the bundle's folder; must not hold anything yet.
        vec_normalize: what `VecNormalize.save` wrote, if the model was trained with one: its statistics belong to the
            policy.
        name: what the bundle calls itself; by default the file's name.
        control_dt: seconds between two actions.

    Raises:
        UsageError: it is no such model; or it has a policy of another kind, says which; `out` is taken.
    """
    model, out = Path(model), Path(out)
    require_empty(out)
    data, weights = _read_zip(model)
    observation = _space(data, "observation_space", model)
    action = _space(data, "action_space", model)
    if isinstance(observation, gym.spaces.Box) and observation.dtype == np.uint8:
        raise UsageError(f"{model} observes pictures, {observation}; export it as ONNX instead")
    if isinstance(action, gym.spaces.Discrete) and action.start:
        raise UsageError(f"{model} has actions from {action.start} on; those of Stable-Baselines3 count from 0")
    if not isinstance(observation, gym.spaces.Box):
        raise UsageError(f"{model} observes {observation}; only policies of one Box are read")
    statistics = {} if vec_normalize is None else _statistics(Path(vec_normalize), observation)
    policy = _policy(data, weights, observation, action, statistics, model).eval()
    generator = torch.Generator().manual_seed(0)
    seen = as_inputs(_draw(observation, statistics, generator))
    assert isinstance(seen, Tensor)
    exported = to_onnx(policy, seen[:1])
    acted = policy.act(seen)[0]
    goldens = {f"network/input/{BARE}": seen.numpy(), f"network/output/{ACTION}": acted.numpy()}
    manifest = Manifest(
        name=name or model.stem,
        task="a model of Stable-Baselines3",
        control_dt=control_dt,
        observation=(Entry(name=BARE, shape=tuple(observation.shape), dtype="float32"),),
        action=action_of(action, None),
        network=Network(opset=OPSET, runtimes=("onnx",)),
        provenance={
            "file": model.name,
            "stable_baselines3": _version(model),
            "normalized": vec_normalize is not None,
            "exported": now(),
        },
    )
    write_bundle(out, manifest, exported.model, goldens)
    return Bundle.open(out)


def _read_zip(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise UsageError(f"{path} unpacks to more than {LARGEST:,} bytes")
            missing = {"data", "policy.pth"} - set(archive.namelist())
            if missing:
                raise UsageError(f"{path} is no model of Stable-Baselines3: it has no {', '.join(sorted(missing))}")
            data, raw = json.loads(archive.read("data")), archive.read("policy.pth")
    except (zipfile.BadZipFile, ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is no model of Stable-Baselines3, or a damaged one: {error}") from None
    try:
        weights = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, for a damaged file
        raise UsageError(f"the weights in {path} cannot be read: {str(error).splitlines()[0]}") from None
    whole = isinstance(data, dict) and isinstance(weights, dict)
    if not whole or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} is no model of Stable-Baselines3: its parts are not as it writes them")
    return data, weights


def _version(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        name = "_stable_baselines3_version"
        return archive.read(name).decode(errors="replace").strip()[:40] if name in archive.namelist() else ""


def _space(data: dict[str, Any], name: str, path: Path) -> gym.Space[Any]:
    """A space, of whose pickle the arrays are read as data."""
    entry = data.get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get(":serialized:"), str):
        raise UsageError(f"{path} does not say what its {name} is")
    try:
        raw = base64.b64decode(entry[":serialized:"], validate=True)
    except binascii.Error as error:
        raise UsageError(f"{path}: its {name} cannot be read: {error}") from None
    call = read_pickled(memoryview(raw), path, ALLOWED)
    state = call.state if isinstance(call, Call) else None
    if not isinstance(call, Call) or not isinstance(state, dict):
        raise UsageError(f"{path}: its {name} is no space")
    what = f"{path}: {name}"
    if call.of.name == "Box":
        low, high = (array_of(state.get(side), what) for side in ("low", "high"))
        return gym.spaces.Box(low, high, low.shape, low.dtype.type)
    if call.of.name == "Discrete":
        count, start = (int(number_of(value, what)) for value in (state.get("n"), state.get("start", 0)))
        return gym.spaces.Discrete(count, start=start)
    raise UsageError(f"{path}: its {name} is a {call.of.name}; read are Box and, for actions, Discrete")


def _statistics(path: Path, space: gym.spaces.Box) -> dict[str, Array]:
    content = read_pickle(path, ALLOWED)
    if not isinstance(content, Call) or content.of.name != "VecNormalize" or not isinstance(content.state, dict):
        raise UsageError(f"{path} holds no VecNormalize of Stable-Baselines3")
    state, what = content.state, str(path)
    if not number_of(state.get("norm_obs", True), what):
        return {}
    kept = state.get("obs_rms")
    if not isinstance(kept, Call) or not isinstance(kept.state, dict):
        raise UsageError(f"{path}: it has no statistics of one observation vector")
    out = {
        "mean": array_of(kept.state.get("mean"), what).astype(np.float64),
        "variance": array_of(kept.state.get("var"), what).astype(np.float64),
        "epsilon": np.array(number_of(state.get("epsilon", 1e-8), what), np.float64),
        "clip": np.array(number_of(state.get("clip_obs", 10.0), what), np.float64),
    }
    if out["mean"].shape != space.shape or out["variance"].shape != space.shape:
        raise UsageError(f"{path} has statistics of {out['mean'].shape}; the model observes {space.shape}")
    return {name: value.ravel() if value.ndim else value for name, value in out.items()}


def _policy(
    data: dict[str, Any],
    weights: dict[str, Tensor],
    observation: gym.spaces.Box,
    action: gym.Space[Any],
    statistics: Mapping[str, Array],
    path: Path,
) -> ForeignPolicy:
    """The layers that act, by the names under which SB3 keeps them."""
    extractors = ("features_extractor.", "pi_features_extractor.", "actor.features_extractor.", "q_net.features_extr")
    if any(name.startswith(extractors) for name in weights):
        raise UsageError(f"{path} has a features extractor; only MlpPolicy is read. Export it as ONNX instead")
    if "lstm_actor.weight_ih_l0" in weights:
        raise UsageError(f"{path} has a recurrent policy; only MlpPolicy is read. Export it as ONNX instead")
    if data.get("use_sde"):
        raise UsageError(f"{path} explores by gSDE, whose policies squash in other ways; export it as ONNX instead")
    layers: list[str]
    activation: type[nn.Module] = nn.ReLU
    if "action_net.weight" in weights:  # PPO, A2C
        layers, kind, activation = [*_numbered(weights, "mlp_extractor.policy_net."), "action_net"], "plain", nn.Tanh
        if isinstance(action, gym.spaces.Discrete):
            kind = "choice"
    elif "actor.latent_pi.0.weight" in weights or "actor.mu.weight" in weights:  # SAC
        layers, kind = [*_numbered(weights, "actor.latent_pi."), "actor.mu"], "squashed"
    elif "actor.mu.0.weight" in weights:  # TD3, DDPG
        layers, kind = _numbered(weights, "actor.mu."), "squashed"
    elif "q_net.q_net.0.weight" in weights:  # DQN
        layers, kind = _numbered(weights, "q_net.q_net."), "choice"
    else:
        raise UsageError(f"{path} has a policy of another kind: {', '.join(sorted(weights)[:6])}, ...")
    activation = _activation(data, activation, path)
    acting = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if others := sorted(name for name in weights.keys() - acting if not name.startswith(_NOT_ACTING)):
        raise UsageError(f"{path} has {', '.join(others[:4])}, which MlpPolicy has not; export it as ONNX instead")
    modules: list[nn.Module] = []
    inputs = math.prod(observation.shape)
    for layer in layers:
        weight, bias = weights[f"{layer}.weight"], weights.get(f"{layer}.bias")
        if weight.dim() != 2 or weight.shape[1] != inputs or bias is None or bias.shape != weight.shape[:1]:
            raise UsageError(f"{path}: the layer {layer} is {tuple(weight.shape)}; {inputs} numbers come before it")
        linear = nn.Linear(inputs, weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        modules += [linear, activation()]
        inputs = weight.shape[0]
    expected = int(action.n) if isinstance(action, gym.spaces.Discrete) else math.prod(action.shape or ())
    if inputs != expected or (kind == "choice") != isinstance(action, gym.spaces.Discrete):
        raise UsageError(f"{path}: the policy gives {inputs} numbers, and the action is {action}")
    return ForeignPolicy(nn.Sequential(*modules[:-1]), action, kind, statistics)


def _numbered(weights: dict[str, Tensor], prefix: str) -> list[str]:
    """The layers under `prefix`, in order."""
    found = [re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", name) for name in weights]
    return [f"{prefix}{number}" for number in sorted(int(match[1]) for match in found if match)]


def _activation(data: dict[str, Any], default: type[nn.Module], path: Path) -> type[nn.Module]:
    """What `policy_kwargs` says, which SB3 writes as text, too."""
    told = data.get("policy_kwargs")
    told = told if isinstance(told, dict) else {}
    if own := [name for name in ("features_extractor_class", "features_extractor_kwargs") if name in told]:
        raise UsageError(f"{path} has {own[0]}, another way to observe; export it as ONNX instead")
    text = told.get("activation_fn")
    if text is None:
        return default
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", str(text))
    if not match or match[1] not in ACTIVATIONS:
        raise UsageError(f"{path} has the activation {text}; read are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[match[1]]


def _draw(space: gym.spaces.Box, statistics: Mapping[str, Array], generator: torch.Generator) -> Tensor:
    """Observations (GOLDENS, ...) like those that were seen, or else within the space's bounds."""
    drawn = torch.randn(GOLDENS, *space.shape, generator=generator)
    if statistics:
        mean, deviation = statistics["mean"].reshape(space.shape), np.sqrt(statistics["variance"]).reshape(space.shape)
        return (drawn * torch.from_numpy(2 * deviation) + torch.from_numpy(mean)).float()
    low, high = torch.from_numpy(np.array(space.low)), torch.from_numpy(np.array(space.high))
    return torch.minimum(torch.maximum(drawn * 2, low.float()), high.float())


# --- ONNX -------------------------------------------------------------------------------------------------------------


def export_onnx(model: str | Path, spec: str | Path, out: str | Path) -> Bundle:
    """Write a bundle of an ONNX file, which a specification describes: the manifest's fields, but for `network` and
    `files`. Its inputs are named as the observation's entries, its first output is the action; `state` maps inputs that
    are memory to the outputs that they become.

    Raises:
        UsageError: a file is missing or not as it should be; the model's inputs are not what the specification says.
    """
    model, spec, out = Path(model), Path(spec), Path(out)
    require_empty(out)
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: pip install 'ctrlrl[deploy]'") from None
    for file in (model, spec):
        if not file.is_file():
            raise UsageError(f"no such file: {file}")
    try:
        loaded = onnx.load(str(model), load_external_data=False)
        onnx.checker.check_model(loaded)
    except Exception as error:  # protobuf's and onnx's own
        raise UsageError(f"{model} is no ONNX model that can be read: {str(error).splitlines()[0]}") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in loaded.graph.initializer):
        raise UsageError(f"{model} keeps its weights in other files; save it as one file")
    try:
        told = json.loads(spec.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{spec} is no valid JSON: {error}") from None
    if not isinstance(told, dict):
        raise UsageError(f"{spec} must hold an object")
    state = told.pop("state", {})
    opset = next((entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")), 0)
    network = {"opset": opset, "runtimes": ["onnx"], "state": state}
    tree: dict[str, Any] = {"name": model.stem, "task": "an ONNX model", "control_dt": None} | told
    tree |= {"format": "ctrlrl.bundle/1", "network": network, "files": {}}
    manifest = Manifest.from_json(json.dumps(tree).encode(), str(spec))
    names = [entry.name for entry in loaded.graph.input]
    wanted = [entry.name for entry in manifest.observation] + list(manifest.network.state)
    if sorted(names) != sorted(wanted):
        raise UsageError(f"{model} has the inputs {', '.join(names)}; {spec} describes {', '.join(wanted)}")
    outputs = [entry.name for entry in loaded.graph.output]
    if unknown := sorted(set(manifest.network.state.values()) - set(outputs)):
        raise UsageError(f"{model} has the outputs {', '.join(outputs)}, and no {unknown[0]}, which {spec} names")
    acted = [name for name in outputs if name not in manifest.network.state.values()]
    if len(acted) != 1:
        raise UsageError(f"{model} has the outputs {', '.join(outputs)}: beside memory there must be one, the action")
    _rename(loaded, acted[0])
    shapes = {entry.name: (1, *entry.shape) for entry in manifest.observation}
    try:
        session = onnxruntime.InferenceSession(loaded.SerializeToString(), providers=["CPUExecutionProvider"])
        shapes |= {i.name: (1, *i.shape[1:]) for i in session.get_inputs() if i.name in manifest.network.state}
        generator, kinds = np.random.default_rng(0), {e.name: e.dtype for e in manifest.observation}
        goldens: dict[str, list[Array]] = {}
        for _ in range(GOLDENS):
            given = {n: _random(generator, shape, kinds.get(n, "float32")) for n, shape in shapes.items()}
            made = dict(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))
            for side, values in (("input", given), ("output", made)):
                for name, value in values.items():
                    goldens.setdefault(f"network/{side}/{name}", []).append(np.asarray(value))
    except Exception as error:  # onnxruntime's own have no base
        raise UsageError(f"{model} cannot be run on what {spec} describes: {str(error).splitlines()[0]}") from None
    if goldens[f"network/output/{ACTION}"][0].shape != (1, *manifest.action.shape):
        found = goldens[f"network/output/{ACTION}"][0].shape
        raise UsageError(f"{model} gives actions {found}; {spec} says {(1, *manifest.action.shape)}")
    write_bundle(out, manifest, loaded, {name: np.concatenate(values) for name, values in goldens.items()})
    return Bundle.open(out)


def _rename(model: Any, former: str) -> None:
    """Let the output `former` be called `action`."""
    import onnx

    if former == ACTION:
        return
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    if ACTION in names or any(entry.name == ACTION for entry in model.graph.input):
        raise UsageError(
            f"the model calls something else {ACTION!r}, which is what its output {former!r} is called here"
        )
    model.graph.node.append(onnx.helper.make_node("Identity", [former], [ACTION]))
    for entry in model.graph.output:
        if entry.name == former:
            entry.name = ACTION


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "float32":
        return generator.normal(size=shape).astype(np.float32)
    return generator.integers(0, 2 if dtype == "bool" else 256, shape).astype(dtype)
