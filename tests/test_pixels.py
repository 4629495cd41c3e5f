"""Images: what is seen of them, who learns to see, the random shift, and whole trainings from pixels."""

from __future__ import annotations

import copy
import json
import re
import shlex

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrlrl
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.cli.main import run as ctrlrl_command
from ctrlrl.envs.make import make_env
from ctrlrl.envs.worker import PixelObservation
from ctrlrl.errors import Interrupted, UsageError
from ctrlrl.nn.vision import Convolution, image_layout, random_shift
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.checkpoint import pack
from tests.runs import SMALL, assert_same, contents
from tests.scripts import ROOT
from tests.standins import MODULE
from tests.test_training import StopAt

ACT = gym.spaces.Box(-1, 1, (2,))
MIXED = gym.spaces.Dict(
    {
        "camera.front": gym.spaces.Box(0, 255, (3, 20, 18, 3), np.uint8),
        "speed": gym.spaces.Box(-np.inf, np.inf, (4,)),
        "tag": gym.spaces.Box(0, 255, (5,), np.uint8),
    }
)
IMAGE = gym.spaces.Box(0, 255, (20, 18, 3), np.uint8)
SMALLER = SACConfig(hidden=(16,), batch_size=6)


def draw(space: gym.Space, lead: tuple[int, ...], generator: torch.Generator):
    if isinstance(space, gym.spaces.Dict):
        return {name: draw(entry, lead, generator) for name, entry in space.spaces.items()}
    shape = (*lead, *space.shape)
    if space.dtype == np.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def make_batch(space: gym.Space, groups: int = 1, size: int = 6, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lead = (groups, size)
    flags = torch.zeros(lead, dtype=torch.bool)
    obs, next_obs = draw(space, lead, g), draw(space, lead, g)
    action, reward = torch.rand(*lead, 2, generator=g) * 2 - 1, torch.randn(lead, generator=g)
    return Batch(obs, action, reward, torch.full(lead, 0.9), next_obs, flags, flags.long(), {}, {})


def convolutions(network) -> list[torch.Tensor]:
    return [p for name, p in network.named_parameters() if "convolutions" in name]


# The dimensions of an image.


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((84, 84), "hw"),
        ((84, 96, 3), "hwc"),
        ((3, 84, 96), "chw"),
        ((4, 84, 84), "chw"),
        ((3, 84, 84, 1), "khwc"),
        ((4, 3, 84, 84), "kchw"),
    ],
)
def test_the_channels_are_found(shape, layout):
    assert image_layout(shape, "obs") == layout
    features = Convolution(shape, "obs")(torch.zeros(2, *shape, dtype=torch.uint8))
    assert features.shape == (2, Convolution(shape, "obs").out_features)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 32, 32), r"observation 'eye' of shape \(32, 32, 32\) does not show which dimension the channels are"),
        ((3, 64, 3), "does not show which dimension the channels are"),
        ((64, 3, 64), "does not show which dimension the channels are"),
        ((2, 2, 64, 64, 3), "does not show which dimension the channels are"),
        ((12, 64, 3), "an image of 12 x 64 pixels; the convolution needs 15 x 15"),
    ],
)
def test_what_does_not_show_its_channels_is_refused(shape, message):
    space = gym.spaces.Dict({"eye": gym.spaces.Box(0, 255, shape, np.uint8)})
    with pytest.raises(UsageError, match=message) as error:
        SAC(space, ACT)
    assert "encoder=" in str(error.value)


def test_every_layout_of_the_same_picture_is_seen_alike():
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 2, 16, 17, 3), generator=g, dtype=torch.uint8)  # B K H W C
    reference = Convolution((2, 16, 17, 3), "x")
    want = reference(frames)
    other = {
        "kchw": frames.permute(0, 1, 4, 2, 3),
        "chw": frames.permute(0, 1, 4, 2, 3).reshape(5, 6, 16, 17),
        "hwc": frames.permute(0, 2, 3, 1, 4).reshape(5, 16, 17, 6),
    }
    for layout, images in other.items():
        convolution = Convolution(tuple(images.shape[1:]), "x")
        assert convolution.layout == layout
        convolution.load_state_dict(reference.state_dict())
        assert torch.allclose(convolution(images), want, atol=1e-5), layout
    single = Convolution((16, 17), "x")
    as_channel = Convolution((16, 17, 1), "x")
    as_channel.load_state_dict(single.state_dict())
    assert torch.allclose(single(frames[:, 0, ..., 0]), as_channel(frames[:, 0, ..., :1]), atol=1e-5)


def test_the_convolution_against_one_written_out():
    convolution = Convolution((16, 17, 3), "x")
    x = torch.randint(0, 256, (2, 16, 17, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    y = x.double() / 255 - 0.5
    for layer in convolution.layers[::2]:
        patches = y.unfold(1, 3, 2).unfold(2, 3, 2)  # B H W I 3 3
        y = torch.einsum("bhwixy,oxyi->bhwo", patches, layer.weight.detach().double()) + layer.bias.detach().double()
        y = y.clamp(min=0)
    assert torch.allclose(convolution(x).double(), y.permute(0, 3, 1, 2).flatten(1), atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 48), (48, 48, 3), (3, 48, 48), (3, 48, 48, 3), (3, 3, 48, 48)])
def test_gradients_lie_in_memory_as_their_weights_do(shape):
    convolution = Convolution(shape, "x")  # fused Adam does not look at strides
    images = torch.randint(0, 256, (8, *shape), dtype=torch.uint8)
    parameters = list(convolution.parameters())
    gradients = torch.autograd.grad(convolution(images).square().sum(), parameters)
    assert all(p.is_contiguous() and g.is_contiguous() for p, g in zip(parameters, gradients, strict=True))


# The random shift.


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["hw", "hwc", "chw", "khwc", "kchw"]),
    pad=st.integers(1, 6),
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    seed=st.integers(0, 1000),
)
def test_the_shift_is_a_cut_out_of_the_padded_image(layout, pad, height, width, seed):
    g = torch.Generator().manual_seed(seed)
    sizes = {"k": 2, "c": 3, "h": height, "w": width}
    images = torch.randint(0, 256, (4, *(sizes[axis] for axis in layout)), generator=g, dtype=torch.uint8)
    shift = torch.randint(0, 2 * pad + 1, (4, 2), generator=g)
    shifted = random_shift(images, shift, pad, layout)
    down, right = layout.index("h"), layout.index("w")
    for i in range(4):
        padding = [(pad, pad) if axis in (down, right) else (0, 0) for axis in range(len(layout))]
        padded = np.pad(images[i].numpy(), padding, mode="edge")
        top, left = shift[i].tolist()
        cut = [slice(None)] * len(layout)
        cut[down], cut[right] = slice(top, top + height), slice(left, left + width)
        assert np.array_equal(shifted[i].numpy(), padded[tuple(cut)])


def test_update_draws_shifts_for_each_image_and_step_is_pure():
    agent, other = (SAC(MIXED, ACT, SMALLER, seed=4) for _ in range(2))
    drawn = []
    step = agent.step
    agent._steps[True] = lambda batch, noise, shift: drawn.append((noise, shift)) or step(batch, noise, shift)
    batch = make_batch(MIXED, groups=3)
    agent.update(batch)
    shifts = torch.stack([shift for _, shift in drawn])
    assert shifts.shape == (3, 2, 6, 2)
    assert shifts.min() == 0
    assert shifts.max() == 8
    for i, (noise, shift) in enumerate(drawn):
        other.step(batch[i], noise, shift)
    left, right = pack(agent.state_dict())[0], pack(other.state_dict())[0]
    assert all(torch.equal(left[k], right[k]) for k in left if k != "/generator")


def test_a_shift_to_the_middle_is_none_and_others_matter():
    batch, noise = make_batch(IMAGE)[0], torch.zeros(2, 6, 2)
    results = []
    for shift in (None, torch.full((2, 6, 2), 4), torch.zeros(2, 6, 2, dtype=torch.int64)):
        agent = SAC(IMAGE, ACT, SMALLER)
        agent.step(batch, noise, shift)
        results.append(torch.cat([p.flatten() for p in agent.critics.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_without_images_or_with_shift_0_nothing_is_drawn_for_it():
    vector = gym.spaces.Box(-1, 1, (3,))
    for space, config in ((vector, SMALLER), (IMAGE, SACConfig(hidden=(16,), random_shift=0))):
        agent = SAC(space, ACT, config, seed=1)
        agent.update(make_batch(space))
        generator = torch.Generator().manual_seed(1)
        torch.randn(1, 2, 6, 2, generator=generator)
        assert torch.equal(agent.generator.get_state(), generator.get_state())


# Who learns to see.


def test_the_critics_alone_train_the_convolutions_which_the_policy_shares():
    agent = SAC(MIXED, ACT, SMALLER)
    policy, critics = convolutions(agent.policy), convolutions(agent.critics)
    targets = convolutions(agent.target_critics)
    assert len(policy) == 6
    assert all(a is b for a, b in zip(policy, critics, strict=True))
    assert not {id(p) for p in targets} & {id(p) for p in critics}
    optimized = [*agent.actor_parameters(), *agent._critic]
    assert len({id(p) for p in optimized}) == len(optimized)  # nothing twice
    assert {id(p) for p in policy} <= {id(p) for p in agent._critic}
    everything = {*agent.policy.parameters(), *agent.critics.parameters()}
    assert {id(p) for p in everything} == {id(p) for p in optimized}  # and all of it

    batch = make_batch(MIXED)[0]
    critic_obs, obs, next_obs, target_obs = agent.see(batch, None)
    assert not any(value.requires_grad for seen in (obs, next_obs, target_obs) for value in seen.values())
    action, log_prob, _ = agent.policy.distribution(obs).rsample(torch.zeros(6, 2))
    actor_loss = (log_prob.sum(-1) - agent.critics(obs, action).amin(0)).mean()
    assert all(g is None for g in torch.autograd.grad(actor_loss, policy, allow_unused=True, retain_graph=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(actor_loss, agent.actor_parameters()))
    critic_loss = agent.critics(critic_obs, batch.action).square().mean()
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(critic_loss, critics))


def test_one_update_moves_everything_and_targets_follow_slowly():
    agent = SAC(MIXED, ACT, SMALLER)
    before = copy.deepcopy([agent.policy, agent.critics, agent.target_critics])
    agent.update(make_batch(MIXED))
    for old, new in zip(before, (agent.policy, agent.critics, agent.target_critics), strict=True):
        for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True):
            assert not torch.equal(a, b), name
    for old, online, target in zip(*map(convolutions, (before[2], agent.critics, agent.target_critics)), strict=True):
        assert torch.allclose(target, old + 0.005 * (online - old), atol=1e-7)


def test_what_was_seen_stands_for_the_observation():
    agent = SAC(MIXED, ACT, SMALLER)
    obs = make_batch(MIXED)[0].obs
    seen = agent.critics.encoder.see(obs)
    assert seen["camera.front"].dtype == torch.float32
    assert torch.equal(seen["tag"], obs["tag"])  # a vector of bytes is no image
    assert torch.equal(agent.policy.encoder(obs), agent.policy.encoder(seen))
    assert agent.policy.encoder.out_features == 50 + 4 + 5
    brighter = obs | {"camera.front": 255 - obs["camera.front"]}
    faster = obs | {"speed": obs["speed"] + 1}
    for other in (brighter, faster):
        assert not torch.allclose(agent.policy.act(obs)[0], agent.policy.act(other)[0])


def test_normalization_is_of_vectors_and_a_copy_keeps_seeing_it():
    agent = SAC(MIXED, ACT, SACConfig(hidden=(16,), normalize_obs=True))
    obs = make_batch(MIXED)[0].obs
    agent.observe(obs, torch.ones(6, dtype=torch.bool))
    assert sorted(agent.normalizer.entries) == ["speed", "tag"]
    vectors = agent.target_critics.encoder(obs)[:, -9:]
    assert torch.allclose(vectors, agent.critics.encoder(obs)[:, -9:])
    assert vectors.mean(0).abs().max() < 1e-5


def test_privileged_images_are_seen_by_critics_only_and_the_policys_by_both():
    space = gym.spaces.Dict({"policy": gym.spaces.Box(-1, 1, (3,)), "privileged": IMAGE})
    agent = SAC(space, ACT, SMALLER)
    assert not convolutions(agent.policy)
    assert len(convolutions(agent.critics)) == 6
    agent.update(make_batch(space))
    agent.policy.act({"policy": torch.zeros(1, 3)})
    blind = SACConfig(policy_obs=("camera",), critic_obs=("speed",))
    space = gym.spaces.Dict({"camera": IMAGE, "speed": gym.spaces.Box(-1, 1, (3,))})
    with pytest.raises(UsageError, match=r"the policy reads the image 'camera' .* and the critics do not"):
        SAC(space, ACT, blind)


def test_state_dict_continues_bit_for_bit():
    a, b = SAC(MIXED, ACT, SMALLER, seed=1), SAC(MIXED, ACT, SMALLER, seed=2)
    a.update(make_batch(MIXED, groups=3))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        agent.update(make_batch(MIXED, groups=3, seed=9))
    left, right = pack(a.state_dict())[0], pack(b.state_dict())[0]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


# Pictures as observations.


class Picture(gym.Env):
    """Shows the picture it was given."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = ACT

    def __init__(self, picture, render_mode="rgb_array"):
        self.picture, self.render_mode = picture, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        return self.picture


@pytest.mark.parametrize(("height", "width", "size"), [(50, 70, 16), (48, 48, 16), (16, 16, 16), (20, 9, 16)])
def test_a_pixel_is_the_mean_of_its_area(height, width, size):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    # written out: each pixel repeated `size` times, then means over height x width blocks
    fine = picture.astype(np.float64).repeat(size, 0).repeat(size, 1)
    mean = fine.reshape(size, height, size, width, 3).mean((1, 3))
    seen, _ = PixelObservation(Picture(picture), size, False).reset()
    assert seen.dtype == np.uint8
    assert np.abs(seen - mean).max() <= 0.5 + 1e-9
    grey, _ = PixelObservation(Picture(picture), size, True).reset()
    assert np.abs(grey - mean @ [0.299, 0.587, 0.114]).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("backend", ["gymnasium", "workers"])
def test_pixels_from_ids_are_the_rendered_picture(backend):
    env = make_env("CartPole-v1", num_envs=2, pixels=24, backend=backend, render=True)
    assert env.observation_space == gym.spaces.Box(0, 255, (24, 24, 3), np.uint8)
    obs = env.reset([5, 6])
    picture = env.render()
    assert picture.shape == (400, 600, 3)  # a video shows what was drawn, not what is observed
    assert np.array_equal(PixelObservation(Picture(picture), 24, False).reset()[0], obs[0].numpy())
    assert not torch.equal(obs[0], obs[1])
    env.close()


def test_pixels_of_objects():
    picture = np.zeros((30, 30, 3), np.uint8)
    for env in (Picture(picture), lambda: Picture(picture)):
        assert make_env(env, pixels=15, grayscale=True).reset(0).shape == (1, 15, 15)
    with pytest.raises(UsageError, match="its render mode is None"):
        make_env(Picture(picture, render_mode=None), pixels=15)
    with pytest.raises(UsageError, match="has to give images by itself"):
        make_env(gym.make_vec("CartPole-v1"), pixels=15)
    with pytest.raises(UsageError, match="grayscale goes with pixels"):
        make_env("CartPole-v1", grayscale=True)


def test_a_missing_package_is_named():
    class Undrawable(Picture):
        def render(self):
            raise gym.error.DependencyNotInstalled("pygame is not installed")

    with pytest.raises(UsageError, match="needed that is not installed: pygame is not installed"):
        make_env(lambda: Undrawable(None), pixels=15).reset(0)


# Whole trainings.


def test_the_command_of_the_page_is_one(capsys):
    page = ROOT / "docs" / "pixels.md"
    (command,) = re.findall(r"```sh\nctrlrl (.*)\n```", page.read_text())
    assert ctrlrl_command([*shlex.split(command), "--dry-run"]) == 0
    assert "* pixels: 48" in capsys.readouterr().out


MOVING = MODULE + "ctrlrl-test/Moving-v0"

PIXELS = SMALL | {
    "pixels": 15,
    "frame_stack": 3,
    "steps": 130,
    "eval_every": 100,
    "checkpoint_every": 40,
    "agent": {"hidden": [16], "batch_size": 8},
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_envs": 2, "backend": "workers", "grayscale": True, "buffer": {"capacity": 45, "n_step": 3}},
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, more):
    settings = PIXELS | more
    ctrlrl.train("sac", MOVING, out=str(tmp_path / "whole"), callbacks=[StopAt(10**9)], **settings)
    with pytest.raises(Interrupted):
        stop = [StopAt(85, interrupt=True)]
        ctrlrl.train("sac", MOVING, out=str(tmp_path / "parts"), callbacks=stop, **settings)
    ctrlrl.resume(tmp_path / "parts", callbacks=[StopAt(10**9)], quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_from_pixels_is_loaded_evaluated_and_filmed(tmp_path):
    run = ctrlrl.train("sac", MOVING, out=str(tmp_path / "run"), **PIXELS | {"video": True})
    video = json.loads(next((tmp_path / "run" / "videos").glob("*.json")).read_text())
    assert video["frames"] == video["length"]
    assert ctrlrl.evaluate(run, checkpoint="last").mean == ctrlrl.evaluate(run, checkpoint="last").mean
    loaded = ctrlrl.load(run, checkpoint="last")
    obs = torch.randint(0, 256, (2, 3, 15, 15, 3), dtype=torch.uint8)
    assert torch.equal(loaded.policy.act(obs)[0], run.policy.act(obs)[0])


def test_an_environment_that_stacks_by_itself_is_seen_alike(tmp_path):
    def stacked() -> gym.Env:
        observed = PixelObservation(gym.make(MOVING, render_mode="rgb_array"), 15, False)
        return gym.wrappers.FrameStackObservation(observed, 3, padding_type="reset")

    ours, settings = tmp_path / "ours", {**PIXELS, "eval_every": 0, "buffer": {"n_step": 2}}
    ctrlrl.train("sac", MOVING, out=str(ours), **settings)
    ctrlrl.train("sac", stacked, out=str(tmp_path / "theirs"), **settings | {"pixels": 0, "frame_stack": 1})
    left, right = contents(ours), contents(tmp_path / "theirs")
    for name, value in left["tensors"].items():
        if name.startswith(("/agent", "/collector")):
            assert torch.equal(value, right["tensors"][name]), name
    assert left["rows"]["obs/"].shape == (131, 1, 15, 15, 3)  # each frame once
    assert right["rows"]["obs/"].shape == (131, 1, 3, 15, 15, 3)  # as they come
    assert torch.equal(left["rows"]["obs/"], right["rows"]["obs/"][:, :, -1])


def test_an_own_encoder_gets_the_images_as_they_are():
    seen = []

    class Mean(torch.nn.Module):
        def __init__(self, space):
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)

        def forward(self, obs):
            seen.append((obs.dtype, tuple(obs.shape[1:])))
            return self.linear(obs.float().flatten(2).mean(-1) / 255)

    agent = SAC(gym.spaces.Box(0, 255, (3, 4, 4), np.uint8), ACT, SMALLER, encoder=Mean)
    agent.update(make_batch(gym.spaces.Box(0, 255, (3, 4, 4), np.uint8)))
    assert set(seen) == {(torch.uint8, (3, 4, 4))}
    assert not agent.critics.encoder.sees
