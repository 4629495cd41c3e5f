"""Videos of episodes: H.264 in MP4, which every browser plays, and what to do where rendering fails."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from ctrlrl.errors import UsageError
from ctrlrl.files import write_errors_explained

Frame = npt.NDArray[np.uint8]


def write_video(frames: Iterable[Frame], path: Path, fps: float) -> None:
    """Write `frames` to `path` as MP4 (H.264, yuv420p, index in front so that it plays while it loads).

    Frames are taken one at a time, so a generator may render them on the way. The file appears under its name only when
    it is complete. yuv420p halves the colour in both directions, so a last odd row or column is left out.

    Args:
        frames: uint8 arrays (H, W, 3), RGB, all of one size, at least one frame.
        path: of the file; its folder is created.
        fps: frames per second, such as 1 / control_dt.

    Raises:
        UsageError: no frames, frames of another shape, size or dtype, an fps that is no positive number, or a PyAV
            without the H.264 encoder.
    """
    rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise UsageError(f"a video needs a positive number of frames per second (0.001 at least), got fps={fps}")
    try:
        av.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError as error:
        raise UsageError(
            "the installed PyAV has no H.264 encoder (libx264), so no video can be written. "
            "The wheels on PyPI have it: pip install --force-reinstall --only-binary av av"
        ) from error
    partial = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # a name that files.remove_leftovers knows
    try:
        with write_errors_explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _encode(frames, partial, rate)
            os.replace(partial, path)
    except av.FFmpegError as error:
        raise UsageError(f"cannot write the video {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _encode(frames: Iterable[Frame], path: Path, rate: Fraction) -> None:
    first: Frame | None = None
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "22"})
        stream.pix_fmt = "yuv420p"
        for index, frame in enumerate(frames):
            _check_frame(frame, first, index)
            if first is None:
                first = frame
                stream.height, stream.width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
            even = np.ascontiguousarray(frame[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        if first is None:
            raise UsageError("a video needs at least one frame, got none: the episode had no steps or was not rendered")
        container.mux(stream.encode())


def _check_frame(frame: Any, first: Frame | None, index: int) -> None:
    expected = "(H, W, 3) with H, W >= 2" if first is None else str(first.shape)
    array = isinstance(frame, np.ndarray)
    if array and frame.dtype == np.uint8:
        if first is not None and frame.shape == first.shape:
            return
        if first is None and frame.ndim == 3 and frame.shape[2] == 3 and min(frame.shape[:2]) >= 2:
            return
    got = f"{frame.dtype} {frame.shape}" if array else type(frame).__name__
    raise UsageError(
        f"frame {index} of the video must be a uint8 array {expected}, got {got}. "
        'Make the environment with render_mode="rgb_array", and do not change its size during an episode.'
    )


_NO_OPENGL = (
    "MuJoCo found no OpenGL to render with. On a machine without a display install Mesa's software rendering and "
    "choose EGL:\n"
    "  apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libgles2\n"
    "  export MUJOCO_GL=egl"
)

# What rendering without a display, a library or a driver was seen to raise, by a part of its message.
_REMEDIES = (
    ("invalid value for environment variable MUJOCO_GL", "MUJOCO_GL names no renderer: export MUJOCO_GL=egl"),
    ("pygame", "this environment draws with pygame: pip install pygame"),
    ("Box2D", 'this environment needs Box2D: pip install swig, then pip install "gymnasium[box2d]"'),
    ("OpenGL platform library", _NO_OPENGL),
    ("gladLoadGL", _NO_OPENGL),
    ("Default framebuffer", _NO_OPENGL),
    ("eglQueryString", _NO_OPENGL),
    ("glGetError", _NO_OPENGL),
    ("EGL", _NO_OPENGL),
    ("OSMesa", _NO_OPENGL),
    ("GLFW", _NO_OPENGL),
    ("OpenGL", _NO_OPENGL),
    ("DISPLAY", _NO_OPENGL),
)


def rendering_error(exc: BaseException | str) -> UsageError:
    """One message with the remedy for what off-screen rendering raised; `raise rendering_error(exc) from exc`.

    Knows what MuJoCo, PyOpenGL, GLFW and pygame raise without a display, an OpenGL library, a driver or the package. Of
    anything else it repeats the exception and says how to tell rendering from the environment.
    """
    what = exc if isinstance(exc, str) else f"{type(exc).__name__}: {exc}"
    for part, remedy in _REMEDIES:
        if part in what:
            return UsageError(f"cannot render: {remedy}\n({what})")
    return UsageError(
        f"cannot render: {what}\n"
        "If the same run works without --video, the fault lies in the environment's rendering, not in its simulation."
    )
