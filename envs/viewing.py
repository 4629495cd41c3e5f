"""Looking at environments: MuJoCo's viewer, Gymnasium's own window, and many environments in one picture.

Importing this file imports neither MuJoCo nor torch: MuJoCo picks its way to draw when it is first imported, so
`ctrlrl.envs.headless` comes before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ctrlrl.envs.worker import name_and_message
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    import mujoco

    from ctrlrl.envs.vector import VectorEnv

Picture = np.ndarray[Any, np.dtype[np.uint8]]

GRID_SIZE = 1280, 960
"""Width and height in pixels that a grid of pictures has at most."""
MAX_GRID = 20
"""Rows and columns of a grid at most; a picture is 64 pixels wide then."""
_TILE_WIDTH = 640
_FOLLOWING = ("track", "tracking")
_DISTANCE = 3.5
"""Of a camera, in radii of what it follows: it fills about two thirds of a picture."""


# --- whether something can be seen here -------------------------------------------------------------------------------


def undrawable_here() -> str | None:
    """Why MuJoCo cannot draw off screen on this machine, as type and message of what it raised; None where it can.

    `ctrlrl.runs.video.rendering_error` knows the remedy. Draws a picture of nothing, since libraries that can be
    loaded may still find no driver.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what GLFW has to say comes as an error, too
        try:
            import mujoco

            with contextlib.closing(mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16)) as renderer:
                renderer.render()
        except Exception as error:
            return name_and_message(error)
    return None


def no_display() -> str | None:
    """Why no window can be opened here; None where one can, as far as can be told without opening one."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "neither DISPLAY nor WAYLAND_DISPLAY is set"
    return None


# --- windows ----------------------------------------------------------------------------------------------------------


class Window(Protocol):
    """What shows environment 0 of a vector environment."""

    paused: bool
    """Whether its user wants the simulation to stand still."""

    def is_open(self) -> bool:
        """Whether its user has not closed it."""

    def show(self) -> None:
        """Show the environment's state of now; to be called while paused, too, so that the window stays alive."""

    def close(self) -> None:
        """Close it. Safe to call twice."""


class MujocoWindow:
    """MuJoCo's viewer with all its controls; the space bar pauses, Tab and Shift-Tab show the viewer's panels.

    The viewer has data of its own: what its user drags or sets has no effect on the simulation.
    """

    def __init__(self, env: VectorEnv) -> None:
        """Open the viewer on `env.scene(0)`.

        Raises:
            UsageError: there is no MuJoCo scene, or no window can be opened.
        """
        import mujoco
        import mujoco.viewer

        self.paused = False
        self._env = env
        model, data = env.scene(0)
        _require_opengl_window()
        self._data = mujoco.MjData(model)
        mujoco.mj_copyData(self._data, model, data)
        try:
            self._viewer = mujoco.viewer.launch_passive(
                model, self._data, key_callback=self._key, show_left_ui=False, show_right_ui=False
            )
        except RuntimeError as error:
            if "mjpython" not in str(error):
                raise
            raise UsageError(
                "on macOS MuJoCo's viewer needs mjpython, which comes with MuJoCo, in place of python: "
                f"mjpython -m ctrlrl {' '.join(sys.argv[1:])}"
            ) from error
        with self._viewer.lock():
            aim(self._viewer.cam, model, data, movable=True)

    def is_open(self) -> bool:
        return bool(self._viewer.is_running())

    def show(self) -> None:
        import mujoco

        model, data = self._env.scene(0)
        with self._viewer.lock():
            mujoco.mj_copyData(self._data, model, data)
        self._viewer.sync()

    def close(self) -> None:
        self._viewer.close()

    def _key(self, code: int) -> None:
        if code == ord(" "):
            self.paused = not self.paused


class GymnasiumWindow:
    """The window that an environment with the render mode `human` opens by itself and draws to as it is stepped.

    Where it is pygame's, the space bar pauses, and the window can be closed; elsewhere Ctrl-C is the way out.
    """

    def __init__(self) -> None:
        self.paused, self._open = False, True

    def is_open(self) -> bool:
        return self._open

    def show(self) -> None:
        pygame = sys.modules.get("pygame")
        if pygame is None or not pygame.display.get_init():
            return
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                self._open = False
            elif event.type == pygame.KEYDOWN and event.key == pygame.K_SPACE:
                self.paused = not self.paused

    def close(self) -> None:
        """Nothing to do: it goes with the environment."""


def _require_opengl_window() -> None:
    """Raise UsageError where GLFW cannot open a window, for which MuJoCo's viewer would wait for ever."""
    if sys.platform == "darwin":  # there windows are mjpython's to open
        return
    import glfw

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", glfw.GLFWError)
            glfw.init()
            glfw.window_hint(glfw.VISIBLE, glfw.FALSE)
            glfw.create_window(16, 16, "ctrlrl", None, None)
    except glfw.GLFWError as error:
        raise UsageError(f"MuJoCo's viewer cannot open a window on this display: {error}") from error
    finally:
        glfw.terminate()


# --- cameras and pictures ---------------------------------------------------------------------------------------------


def aim(camera: mujoco.MjvCamera, model: mujoco.MjModel, data: mujoco.MjData, *, movable: bool = False) -> None:
    """Point `camera` at what moves, and have it follow.

    As the model's own camera that follows something, if it has one; where the user is to turn it (`movable`), as a free
    one that follows the same body. Else it follows the first body with a free joint, or looks at all that moves.
    """
    import mujoco

    mujoco.mjv_defaultFreeCamera(model, camera)
    own = [model.camera(index).name in _FOLLOWING for index in range(model.ncam)]
    if not any(own):
        own = [mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM for mode in model.cam_mode]
    bodies = model.cam_bodyid[own] if any(own) else model.jnt_bodyid[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    if any(own) and not movable:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, own.index(True)
        return
    roots, shown = model.body_rootid[model.geom_bodyid], model.body_weldid[model.geom_bodyid] != 0
    if bodies.size:
        camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, int(bodies[0])
        shown &= roots == model.body_rootid[bodies[0]]
    if shown.any():  # the distance by what moves: the model's own extent counts floors
        places, sizes = data.geom_xpos[shown], model.geom_rbound[shown]
        endless = (model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE) & (model.jnt_limited == 0) & (not bodies.size)
        for joint in np.flatnonzero(endless):  # what hangs now may stand later
            turns = shown & (model.geom_bodyid == model.jnt_bodyid[joint])
            places = np.concatenate([places, 2 * data.xanchor[joint] - data.geom_xpos[turns]])
            sizes = np.concatenate([sizes, model.geom_rbound[turns]])
        center = (places.min(0) + places.max(0)) / 2
        reach = float((np.linalg.norm(places - center, axis=1) + sizes).max())
        if bodies.size:
            camera.distance = _DISTANCE * reach
        else:  # what the camera does not follow moves about
            near, far = _DISTANCE * reach, 2 * _DISTANCE * reach
            camera.lookat[:], camera.distance = center, max(near, min(camera.distance, far))


class Grid:
    """Pictures of many environments, in rows and columns; without shadows and reflections, which take most of the time
    where a CPU draws."""

    def __init__(self, env: VectorEnv, rows: int, columns: int) -> None:
        """Draw the first `rows` x `columns` environments of `env`, the first ones in the first row.

        Raises:
            UsageError: they have no MuJoCo scene.
            RenderFailure: MuJoCo cannot draw here.
        """
        import mujoco

        from ctrlrl.envs.vector import RenderFailure

        self._env, self._rows, self._columns = env, rows, columns
        model, data = env.scene(0)
        if cause := undrawable_here():
            raise RenderFailure(f"{env.name} cannot be drawn: {cause}", cause)
        self.height, self.width = _tile_size(rows, columns, model)
        self._renderer = mujoco.Renderer(model, self.height, self.width)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._cameras = [mujoco.MjvCamera() for _ in range(rows * columns)]
        for camera in self._cameras:
            aim(camera, model, data)

    def draw(self) -> Picture:
        """The picture (rows * height, columns * width, 3) of now."""
        tiles = np.empty((self._rows, self._columns, self.height, self.width, 3), np.uint8)
        for row, (tile, camera) in enumerate(zip(self._flat(tiles), self._cameras, strict=True)):
            self._renderer.update_scene(self._env.scene(row)[1], camera)
            self._renderer.render(out=tile)
        height, width = self._rows * self.height, self._columns * self.width
        return tiles.swapaxes(1, 2).reshape(height, width, 3)

    def close(self) -> None:
        """Free what draws. Safe to call twice."""
        self._renderer.close()

    def _flat(self, tiles: Picture) -> Iterator[Picture]:
        return iter(tiles.reshape(-1, self.height, self.width, 3))


def _tile_size(rows: int, columns: int, model: mujoco.MjModel) -> tuple[int, int]:
    """Height and width of a picture, 3 to 4, even, so that the whole fits and MuJoCo's buffer holds it."""
    buffer = model.vis.global_
    width = min(GRID_SIZE[0] // columns, GRID_SIZE[1] // rows * 4 // 3, _TILE_WIDTH)
    width = min(width, buffer.offwidth, buffer.offheight * 4 // 3)
    return width * 3 // 4 // 2 * 2, width // 2 * 2
