"""A film of what a simulated robot did, drawn after it is over: drawing takes longer than the robot has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrlrl.deploy.impaired import impaired
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.envs.sim_vector import simulate
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.errors import UsageError
from ctrlrl.runs.video import Frame, rendering_error, write_video

SECONDS = 20.0
FPS = 25.0


def film(out: Path, robot: SimulatedConfig, episodes: list[dict[str, Any]]) -> Path | None:
    """Write `out/video.mp4` of the first episode; None where there was none. `ctrlrl.envs` is imported before MuJoCo.

    Raises:
        UsageError: nothing can be drawn on this machine; the rest of the deployment is kept.
    """
    if not episodes or not episodes[0]["length"]:
        return None
    with np.load(out / "robot.npz", allow_pickle=False) as log:
        times, places = log["place time"], log["place"]
    task = impaired(make_robot_task(robot.task, robot.env_kwargs), robot.impairments)
    seconds = min(SECONDS, episodes[0]["length"] * task.timestep * task.substeps)
    times = times - times[0]
    env = simulate(task, 1, render=True)
    try:
        env.reset([robot.seeds[0]])
        if task.track is not None:
            task.track(env.world)  # marks of goals

        def frames() -> Any:
            for moment in np.arange(0.0, seconds, 1 / FPS):
                at = min(len(places) - 1, int(np.searchsorted(times, moment)))
                env.sim.field("qpos")[0] = torch.from_numpy(places[at])
                picture: Frame = env.render()
                yield picture

        path = out / "video.mp4"
        write_video(frames(), path, FPS)
        return path
    except UsageError:
        raise
    except Exception as error:  # of drawing: its libraries raise what they like
        raise rendering_error(error) from error
    finally:
        env.close()
