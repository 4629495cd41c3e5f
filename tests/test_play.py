"""Looking at environments: a viewer that records what it is shown, a clock that is set by hand, pictures of grids."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import av
import gymnasium as gym
import mujoco
import mujoco.viewer
import numpy as np
import pytest
import torch

import ctrlrl
import tests.standins
from ctrlrl.cli.main import run as ctrlrl_command
from ctrlrl.envs import viewing
from ctrlrl.envs.frame_stack import FrameStack
from ctrlrl.envs.make import make_env
from ctrlrl.envs.vector import RenderFailure
from ctrlrl.envs.viewing import Grid, GymnasiumWindow, aim, undrawable_here
from ctrlrl.errors import UsageError
from ctrlrl.training.evaluation import evaluation_seeds
from ctrlrl.training.loading import film_grid
from ctrlrl.training.play import Episode, Pace, play
from tests.conformance import actions_for
from tests.runs import SMALL

ENV = "Hopper-v5"


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose episodes are short: the hopper falls."""
    path = tmp_path_factory.mktemp("play") / "run"
    ctrlrl.train("sac", env=ENV, out=str(path), **{**SMALL, "steps": 150, "eval_every": 150, "learning_starts": 140})
    return path


class Clock:
    """Time that passes only while one sleeps, or when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def pace(self, period: float) -> Pace:
        return Pace(period, clock=self, sleep=self.sleep)


class FakeViewer:
    """Stands for `mujoco.viewer.launch_passive` and the handle it returns."""

    def __init__(self, clock: Clock, closes_after: int = 10**9) -> None:
        self.clock, self.closes_after = clock, closes_after
        self.shown: list[tuple[float, np.ndarray[Any, Any]]] = []
        self.presses: dict[int, str] = {}
        self.cam = mujoco.MjvCamera()
        self.closed = 0

    def launch(self, model: mujoco.MjModel, data: mujoco.MjData, *, key_callback: Any, **panels: bool) -> FakeViewer:
        mujoco.mj_forward(model, data)  # as the viewer does, which spoils derived fields of an environment's own data
        self.model, self.data, self.press = model, data, key_callback
        return self

    def lock(self) -> Any:
        return contextlib.nullcontext()

    def is_running(self) -> bool:
        return not self.closed and len(self.shown) < self.closes_after

    def sync(self) -> None:
        self.shown.append((self.clock.now, self.data.qpos.copy()))
        self.data.qpos[:] = 7.0  # what its user drags must not reach the simulation
        if key := self.presses.get(len(self.shown)):
            self.press(ord(key))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def viewer(monkeypatch: pytest.MonkeyPatch) -> FakeViewer:
    fake = FakeViewer(Clock())
    monkeypatch.setattr(mujoco.viewer, "launch_passive", fake.launch)
    monkeypatch.setattr(viewing, "_require_opengl_window", lambda: None)
    return fake


# --- what a row looks like --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "backend"),
    [("Hopper-v5", "native"), ("Ant-v5", "native"), ("Ant-v5", "native-fast"), ("Hopper-v5", "gymnasium")],
)
def test_a_scene_shows_the_state_of_its_row_and_changes_nothing(env_id: str, backend: str) -> None:
    """Of environments that observe all of qpos: the first coordinates, and in Ant's case what is not clipped."""
    kwargs = {"exclude_current_positions_from_observation": False, "reset_noise_scale": 0.1}
    env, other = (make_env(env_id, num_envs=3, backend=backend, env_kwargs=kwargs) for _ in range(2))
    obs = env.reset(4)
    other.reset(4)
    assert isinstance(obs, torch.Tensor)
    for action in actions_for(env, 15):
        for row in (2, 0, 1):
            model, data = env.scene(row)
            np.testing.assert_array_equal(data.qpos, obs[row, : model.nq].numpy())
        assert not torch.equal(obs[0], obs[1])
        obs, unseen = env.step(action).obs, other.step(action).obs
        assert isinstance(obs, torch.Tensor)
        assert torch.equal(obs, unseen)  # type: ignore[arg-type]
    env.close()
    other.close()


def test_a_wrapped_environment_shows_the_one_inside() -> None:
    env = FrameStack(make_env("InvertedPendulum-v5", backend="gymnasium", pixels=16), 2)
    env.reset(0)
    assert env.scene(0)[1].qpos.shape == (2,)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "backend", "reason"),
    [
        ("Pendulum-v1", "native", "Pendulum-v1 has no MuJoCo scene"),
        ("Pendulum-v1", "gymnasium", "Pendulum-v1 has no MuJoCo scene"),
        ("InvertedPendulum-v5", "workers", "worker processes"),
    ],
)
def test_what_has_no_scene_says_so(env_id: str, backend: str, reason: str) -> None:
    env = make_env(env_id, backend=backend)
    with pytest.raises(UsageError, match=reason):
        env.scene(0)
    env.close()


# --- playing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "gymnasium"])
def test_the_viewer_sees_the_episodes_of_an_evaluation_in_real_time(
    hopper: Path, viewer: FakeViewer, backend: str
) -> None:
    told: list[Episode] = []
    play(hopper, episodes=2, speed=0.5, backend=backend, on_episode=told.append, pace=viewer.clock.pace)
    result = ctrlrl.evaluate(hopper, episodes=2)
    assert [episode.seed for episode in told] == evaluation_seeds(2)
    np.testing.assert_allclose([episode.ret for episode in told], result.returns, rtol=1e-6)
    assert [episode.length for episode in told] == result.lengths
    assert len(viewer.shown) == sum(result.lengths)  # the first state of an episode too, but not what follows its end
    times = np.array([time for time, _ in viewer.shown])
    period = 0.008 / 0.5  # Hopper's control step is 8 ms
    np.testing.assert_allclose(times - times[0], period * np.arange(len(times)), atol=1e-9)
    env = make_env(ENV)
    env.reset([told[0].seed])
    first = env.scene(0)[1].qpos.copy()
    env.close()
    np.testing.assert_array_equal(viewer.shown[0][1], first)
    assert not np.array_equal(viewer.shown[1][1], first)
    assert viewer.closed == 1


def test_the_space_bar_pauses_and_goes_on(hopper: Path, viewer: FakeViewer) -> None:
    viewer.presses = {4: " ", 9: "x", 12: " "}
    told: list[Episode] = []
    play(hopper, episodes=1, on_episode=told.append, pace=viewer.clock.pace)
    states = [state for _, state in viewer.shown]
    for state in states[4:12]:  # still alive, and still
        np.testing.assert_array_equal(state, states[3])
    assert not np.array_equal(states[12], states[11])
    assert len(states) == told[0].length + 8
    times = np.diff([time for time, _ in viewer.shown])
    np.testing.assert_allclose(times[12:], 0.008)  # the pause is not made up for


def test_closing_the_window_ends_it(hopper: Path, viewer: FakeViewer) -> None:
    viewer.closes_after = 3
    told: list[Episode] = []
    play(hopper, on_episode=told.append, pace=viewer.clock.pace)
    assert (len(viewer.shown), told) == (3, [])


def test_the_viewers_camera_follows_and_can_be_turned(hopper: Path, viewer: FakeViewer) -> None:
    viewer.closes_after = 1
    play(hopper, pace=viewer.clock.pace)
    assert viewer.cam.type == mujoco.mjtCamera.mjCAMERA_TRACKING
    assert viewer.model.body(viewer.cam.trackbodyid).name == "torso"


def test_a_delay_is_made_up_for_when_it_is_short() -> None:
    clock = Clock()
    pace = clock.pace(0.1)
    clock.now += 0.15  # one step took one and a half
    pace.wait()
    pace.wait()
    assert clock.now == pytest.approx(100.2)
    clock.now += 10.0  # the lid was closed
    pace.wait()
    pace.wait()
    assert clock.now == pytest.approx(110.3)


def test_the_command_line_tells_of_every_episode(
    hopper: Path, viewer: FakeViewer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    assert ctrlrl_command(["play", str(hopper), "--episodes", "2", "--seed", "5", "--speed", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed 5", "seed 6"]
    assert "return " in lines[0] and lines[0].endswith(" steps")


def test_without_a_display_a_video_is_recommended(
    hopper: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ctrlrl.cli.play.undrawable_here", lambda: None)
    assert ctrlrl_command(["play", str(hopper)]) == 2
    said = capsys.readouterr().err
    assert "neither DISPLAY nor WAYLAND_DISPLAY is set" in said
    assert f"ctrlrl eval {hopper} --video-grid" in said
    assert "libegl1" not in said
    monkeypatch.setattr("ctrlrl.cli.play.undrawable_here", lambda: "RuntimeError: gladLoadGL error")
    assert ctrlrl_command(["play", str(hopper)]) == 2
    assert "apt-get install libegl1" in capsys.readouterr().err


def test_a_display_without_opengl_is_an_error_and_no_endless_wait(
    hopper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mujoco.viewer, "launch_passive", lambda *args, **kwargs: pytest.fail("would wait for ever"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":987")
    with pytest.raises(UsageError, match="cannot open a window on this display"):
        play(hopper)


def test_macos_is_told_of_mjpython(hopper: Path, viewer: FakeViewer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("`launch_passive` requires that the Python script be run under `mjpython` on macOS")

    monkeypatch.setattr(mujoco.viewer, "launch_passive", refuse)
    with pytest.raises(UsageError, match="mjpython -m ctrlrl"):
        play(hopper)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": 0.0}, "speed must be a finite number above 0, got 0.0"),
        ({"speed": float("inf")}, "speed must be"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
        ({"backend": "gpu"}, "backend must be"),
    ],
)
def test_bad_numbers_are_named(hopper: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        play(hopper, **given)


# --- Gymnasium's own window -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("play") / "pendulum"
    settings = {**SMALL, "steps": 100, "eval_every": 100, "eval_episodes": 1, "learning_starts": 90}
    ctrlrl.train("sac", env="Pendulum-v1", out=str(path), env_kwargs={"g": 9.0}, **settings)
    return path


def test_without_mujoco_gymnasium_opens_its_window(pendulum: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(pygame.time, "Clock", lambda: type("Still", (), {"tick": lambda self, fps: None})())
    clock, told = Clock(), []
    play(pendulum, episodes=1, on_episode=told.append, pace=clock.pace)
    assert told[0].ret == pytest.approx(ctrlrl.evaluate(pendulum, episodes=1).returns[0])
    assert clock.now == pytest.approx(100 + 200 * 0.05)  # 200 steps of 50 ms

    def close_at_once(episode: Episode) -> None:
        told.append(episode)
        pygame.event.post(pygame.event.Event(pygame.QUIT))

    play(pendulum, on_episode=close_at_once, pace=clock.pace)
    assert len(told) == 2


def test_the_space_bar_pauses_gymnasiums_window(monkeypatch: pytest.MonkeyPatch) -> None:
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame.display.init()
    window = GymnasiumWindow()
    for paused in (True, False):
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_a))
        window.show()
        assert (window.paused, window.is_open()) == (paused, True)
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    window.show()
    pygame.display.quit()
    assert not window.is_open()


class Written(tests.standins.WalkEnv):
    """Is drawn in letters only."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode


def test_an_environment_without_a_window_says_so() -> None:
    gym.register("ctrlrl-test/Written-v0", Written)
    for name, why in (
        ("Written", "has no window: it needs the render mode 'human' and has ['ansi']"),
        ("Walk", "cannot give pictures: it takes no render_mode"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"ctrlrl-test/{name}-v0 {why}")):
            make_env(f"ctrlrl-test/{name}-v0", env_kwargs={"render_mode": "human"}, backend="gymnasium")


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_has_a_picture_of_each_environment() -> None:
    env = make_env("Reacher-v5", num_envs=6)
    env.reset(0)
    grid = Grid(env, 2, 3)
    before = grid.draw()
    assert (grid.height, grid.width) == (318, 426)
    assert before.shape == (2 * 318, 3 * 426, 3) and before.dtype == np.uint8
    tiles = before.reshape(2, 318, 3, 426, 3).swapaxes(1, 2).reshape(6, 318, 426, 3)
    for row in range(6):
        assert tiles[row].std() > 5  # something is to be seen
        for other in range(row):
            assert not np.array_equal(tiles[row], tiles[other])
    np.testing.assert_array_equal(grid.draw(), before)
    for _ in range(5):
        env.step(torch.ones(6, 2))
    assert not np.array_equal(grid.draw(), before)
    grid.close()
    env.close()


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(1, 1, (480, 640)), (4, 6, (158, 212)), (20, 20, (48, 64)), (1, 20, (48, 64))]
)
def test_a_grid_fits_on_a_screen(rows: int, columns: int, size: tuple[int, int]) -> None:
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    assert viewing._tile_size(rows, columns, model) == size
    assert size[0] * rows <= 960 and size[1] * columns <= 1280
    small = mujoco.MjModel.from_xml_string("<mujoco><visual><global offwidth='80' offheight='40'/></visual></mujoco>")
    height, width = viewing._tile_size(rows, columns, small)
    assert height <= 40 and width <= 80


BODY = "<body pos='0 0 1'>{joint}<geom size='0.1'/>{camera}</body>"


@pytest.mark.parametrize(
    ("joint", "cameras", "fixed", "tracked"),
    [
        ("<freejoint/>", "<camera name='front'/><camera name='track'/>", 1, 2),
        ("<freejoint/>", "<camera name='front'/><camera mode='trackcom'/>", 1, 2),
        ("<freejoint/>", "<camera name='front'/>", None, 2),
        ("<joint/>", "<camera name='front'/>", None, None),
    ],
)
def test_cameras_follow_what_moves(joint: str, cameras: str, fixed: int | None, tracked: int | None) -> None:
    world = "<mujoco><worldbody><geom type='plane' size='50 50 1'/><body/>{}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(world.format(BODY.format(joint=joint, camera=cameras)))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for movable in (False, True):
        camera = mujoco.MjvCamera()
        aim(camera, model, data, movable=movable)
        if fixed is not None and not movable:
            assert (camera.type, camera.fixedcamid) == (mujoco.mjtCamera.mjCAMERA_FIXED, fixed)
        elif tracked is not None:
            assert (camera.type, camera.trackbodyid) == (mujoco.mjtCamera.mjCAMERA_TRACKING, tracked)
            assert camera.distance == pytest.approx(0.35)  # of the ball, not of the floor
        else:
            assert camera.type == mujoco.mjtCamera.mjCAMERA_FREE
            assert camera.distance == pytest.approx(0.7)
            np.testing.assert_allclose(camera.lookat, [0, 0, 1])


def test_the_command_line_films_a_grid(
    hopper: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctrlrl.training.loading.GRID_SECONDS", 0.2)
    assert ctrlrl_command(["eval", str(hopper), "--episodes", "1", "--video-grid", "2x3"]) == 0
    path = hopper / "videos" / "grid-000000000150-2x3.mp4"
    assert capsys.readouterr().out.splitlines()[-1] == f"video: {path}"
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == pytest.approx(31.25)  # every fourth step of 8 ms
    assert len(frames) == 6  # 0.2 s
    assert frames[0].shape == (636, 1278, 3)
    assert np.abs(frames[0].astype(float) - frames[-1]).mean() > 0.5
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["rows"], about["columns"], about["step"], about["checkpoint"]) == (2, 3, 150, "best")
    assert "base64" in (hopper / "report.html").read_text()


def test_a_machine_that_cannot_draw_keeps_the_numbers(
    hopper: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewing, "undrawable_here", lambda: "RuntimeError: gladLoadGL error")
    lines = (hopper / "evaluations.jsonl").read_text().count("\n") if (hopper / "evaluations.jsonl").exists() else 0
    assert ctrlrl_command(["eval", str(hopper), "--episodes", "1", "--video-grid", "1x1"]) == 2
    out, err = capsys.readouterr()
    assert "mean return" in out
    assert "apt-get install libegl1" in err and "Traceback" not in err
    assert (hopper / "evaluations.jsonl").read_text().count("\n") == lines + 1
    env = make_env(ENV)
    with pytest.raises(RenderFailure, match="Hopper-v5 cannot be drawn: RuntimeError: gladLoadGL error"):
        Grid(env, 1, 1)
    env.close()


def test_whether_pictures_can_be_drawn_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert undrawable_here() is None  # as other tests need, too

    def refuse(*args: Any) -> None:
        raise mujoco.FatalError("gladLoadGL error")

    monkeypatch.setattr(mujoco, "Renderer", refuse)
    assert undrawable_here() == "FatalError: gladLoadGL error"


def test_grids_are_refused_that_cannot_be(hopper: Path, pendulum: Path) -> None:
    with pytest.raises(UsageError, match="1 to 20 columns, got 21"):
        film_grid(hopper, 1, 21)
    with pytest.raises(UsageError, match="Pendulum-v1 has no MuJoCo scene"):
        film_grid(pendulum, 1, 1)
