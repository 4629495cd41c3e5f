"""Videos are read back with the decoder; rendering errors are the messages that were really seen."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ctrlrl.errors import UsageError
from ctrlrl.files import remove_leftovers
from ctrlrl.runs.video import Frame, rendering_error, write_video


def grey(count: int, height: int = 48, width: int = 64) -> Iterator[Frame]:
    return (np.full((height, width, 3), 10 * index, np.uint8) for index in range(count))


def decode(path: Path) -> tuple[Any, list[Frame]]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        facts = (stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt)
        return facts, [np.asarray(one.to_ndarray(format="rgb24"), np.uint8) for one in container.decode(stream)]


@pytest.mark.parametrize(
    ("fps", "rate"),
    [(20, Fraction(20)), (12.5, Fraction(25, 2)), (33.3, Fraction(333, 10)), (1 / 0.03, Fraction(100, 3))],
)
def test_frames_come_back_at_their_rate(tmp_path: Path, fps: float, rate: Fraction) -> None:
    path = tmp_path / "videos" / "a.mp4"
    write_video(grey(20), path, fps)
    facts, frames = decode(path)
    assert facts == (rate, "h264", "yuv420p")
    assert len(frames) == 20
    means = np.array([frame.mean() for frame in frames])
    np.testing.assert_allclose(means, 10 * np.arange(20), atol=3)  # lossy, in order, none lost
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # plays while it loads
    assert [child.name for child in path.parent.iterdir()] == ["a.mp4"]


def test_colours_keep_their_channels(tmp_path: Path) -> None:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[..., 0] = 200
    write_video([frame] * 3, tmp_path / "red.mp4", 10)
    _, frames = decode(tmp_path / "red.mp4")
    np.testing.assert_allclose(frames[1].mean(axis=(0, 1)), [200, 0, 0], atol=6)


def test_odd_sizes_lose_a_row_and_a_column(tmp_path: Path) -> None:
    write_video(grey(3, 49, 65), tmp_path / "odd.mp4", 10)
    assert decode(tmp_path / "odd.mp4")[1][0].shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame, got none"),
        ([np.zeros((48, 64, 3), np.float32)], r"frame 0 .* uint8 array \(H, W, 3\).* got float32 \(48, 64, 3\)"),
        ([np.zeros((48, 64), np.uint8)], r"got uint8 \(48, 64\)"),
        ([None], "got NoneType"),
        ([np.zeros((48, 64, 3), np.uint8), np.zeros((48, 66, 3), np.uint8)], r"frame 1 .* \(48, 64, 3\), got .*66"),
    ],
)
def test_bad_frames_leave_no_file(tmp_path: Path, frames: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_video(frames, tmp_path / "a.mp4", 10)
    assert list(tmp_path.iterdir()) == []


def test_what_a_cut_off_write_leaves_is_recognised(tmp_path: Path) -> None:
    kept = tmp_path / "left"

    def watched() -> Iterator[Frame]:
        for _ in range(6):  # enough for the encoder to have written something
            yield from grey(20)
        for path in tmp_path.glob("*.mp4*"):  # as a kill at this moment would leave it
            kept.mkdir(exist_ok=True)
            (kept / path.name).write_bytes(path.read_bytes())

    write_video(watched(), tmp_path / "a.mp4", 10)
    assert len(list(kept.iterdir())) == 1
    remove_leftovers(kept)
    assert list(kept.iterdir()) == []


def test_a_failure_on_the_way_keeps_the_earlier_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(grey(2), path, 10)
    before = path.read_bytes()

    def breaks() -> Iterator[Frame]:
        yield from grey(5)
        raise RuntimeError("the renderer died")

    with pytest.raises(RuntimeError, match="the renderer died"):
        write_video(breaks(), path, 10)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fps", [0.0, -5.0, float("nan"), float("inf"), 1e-9])
def test_fps_is_checked(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UsageError, match="positive number of frames per second"):
        write_video(grey(2), tmp_path / "a.mp4", fps)


def test_a_missing_encoder_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: str) -> None:
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", missing)
    with pytest.raises(UsageError, match="pip install --force-reinstall --only-binary av av"):
        write_video(grey(2), tmp_path / "a.mp4", 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "seen",
    [
        RuntimeError("an OpenGL platform library has not been loaded into this process, this most likely means ..."),
        RuntimeError("gladLoadGL error"),
        RuntimeError("Default framebuffer is not complete, error 0x0"),  # MuJoCo was imported before MUJOCO_GL was set
        AttributeError("'NoneType' object has no attribute 'eglQueryString'"),
        AttributeError("'NoneType' object has no attribute 'glGetError'"),
        ImportError(
            "Cannot initialize a EGL device display. This likely means that your EGL driver does not support ..."
        ),
        ImportError("No module named 'OpenGL'"),
    ],
)
def test_no_opengl_names_packages_and_backend(seen: Exception) -> None:
    message = str(rendering_error(seen))
    assert "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libgles2" in message
    assert "MUJOCO_GL=egl" in message
    assert str(seen) in message


def test_other_rendering_errors() -> None:
    pygame = rendering_error(ModuleNotFoundError("No module named 'pygame'"))
    assert "pip install pygame" in str(pygame) and "libegl1" not in str(pygame)
    wrong = rendering_error(RuntimeError("invalid value for environment variable MUJOCO_GL: foo"))
    assert "export MUJOCO_GL=egl" in str(wrong) and "libegl1" not in str(wrong)
    unknown = str(rendering_error(ZeroDivisionError("division by zero")))
    assert "ZeroDivisionError: division by zero" in unknown and "libegl1" not in unknown
