"""Scripted policies for the Panda's tasks: what to compare with, to learn from, and to correct.

They see what any policy sees, and nothing else: joint positions lead, by the arm's kinematics, to the tool's frame,
and damped least squares (Nakamura and Hanafusa 1986) from where the tool should go to how joints should turn. They
remember nothing: the phase of a grasp (above, down, close, carry) is read off the observation, so that they go on from
any state, after a cube has slipped or another policy has acted.

In 100 episodes from seed 0 (`scripts/experts.py`) they always succeed: mean return 60.3 for PandaLift-v0, -43.0
with the sparse reward, and 8.7 for PandaReach-v0, -11.7 with the sparse one.

    env = make_env("PandaLift-v0", num_envs=100)
    policy = expert(env)
    step = env.step(policy(env.reset(0)))
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.tasks.panda import STEP, norm
from ctrlrl.envs.tasks.panda_lift import HALF
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.envs.world import index_of
from ctrlrl.errors import UsageError

DAMPING = 0.05  # of least squares; unit: m for rows of positions, rad for those of rotations
FASTEST = (0.1, 0.5)  # m, rad: largest errors that are looked at
ABOVE = 0.08  # m, over the cube, from where the tool comes down


class PandaExpert:
    """The scripted policy of an environment; make it with `expert`.

    Args:
        env: whose observations it will get.
        noise: half width of the uniform noise on each entry of the action, from 0 to 2.
        seed: of the noise.
    """

    def __init__(self, env: SimVector, noise: float, seed: int) -> None:
        self._noise, self._generator = noise, torch.Generator(env.device).manual_seed(seed)
        self._names = env.groups["policy"].names
        self._lifts = "gripper" in self._names
        self._turns = "turn" in self._names
        self._home = env.world.default_joint_pos[:7]
        self._chain = Chain(env.sim.model, env.task.joints[:7], "tool", env.device)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """(N, 7 or 8) actions in [-1, 1] for observations (N, ...)."""
        seen = {name: obs[:, place] for name, place in self._names.items()}
        action = self._lift(seen) if self._lifts else self._reach(seen)
        if self._noise:
            drawn = torch.rand(action.shape, generator=self._generator, device=obs.device)
            action = action + self._noise * (2 * drawn - 1)
        return action.clamp(-1.0, 1.0)

    def _reach(self, seen: dict[str, Tensor]) -> Tensor:
        _, axes, jacobian = self._chain(seen["joint positions"] + self._home)
        way = seen["desired goal"] - seen["achieved goal"]
        if self._turns:
            sine, cosine = seen["turn"].unbind(1)
        else:  # pointing down, out of the way of the joints' limits
            sine, cosine = torch.zeros(2, len(way), device=way.device)
        return self._move(seen, axes, jacobian, way, sine, cosine)

    def _lift(self, seen: dict[str, Tensor]) -> Tensor:
        _, axes, jacobian = self._chain(seen["joint positions"] + self._home)
        tool, cube, gripper = seen["tool"], seen["achieved goal"], seen["gripper"][:, 0]
        to_cube = cube - tool
        beside, below = norm(to_cube[:, :2]), to_cube[:, 2].abs()

        # The fingers, which close along the tool's y axis, are to be square to the cube: of the four ways that is so,
        # the one in which the hand is turned least.
        edge = torch.where(norm(seen["cube axes"][:, :2]) >= norm(seen["cube axes"][:, 3:5]), 0.0, 1.0)[:, None]
        side = torch.lerp(seen["cube axes"][:, :3], seen["cube axes"][:, 3:], edge)
        yaw = torch.atan2(side[:, 1], side[:, 0])
        yaw = torch.remainder(yaw + torch.pi / 4, torch.pi / 2) - torch.pi / 4
        turn = _turn_to(axes, yaw.sin(), yaw.cos())

        between = (beside < 0.012) & (below < 0.012)
        holds = between & (gripper < HALF + 0.0015)
        # Down a funnel: the further beside the cube, or turned away from it, the higher above it.
        high = (4 * (beside - 0.006) + 0.3 * (norm(turn) - 0.1)).clamp(0.0, ABOVE)
        above = torch.cat([to_cube[:, :2], (to_cube[:, 2] + torch.where(between, 0.0, high))[:, None]], 1)
        way = torch.where(holds[:, None], seen["desired goal"] - cube, above)
        arm = self._move(seen, axes, jacobian, way, yaw.sin(), yaw.cos())
        target = torch.where(between, -1.0, 1.0)  # the gripper's: shut, or open
        return torch.cat([arm, target[:, None]], 1)

    def _move(
        self, seen: dict[str, Tensor], axes: Tensor, jacobian: Tensor, way: Tensor, sine: Tensor, cosine: Tensor
    ) -> Tensor:
        """(N, 7) actions that take the tool `way` (N, 3), pointing down and turned as `sine` and `cosine` (N,) say."""
        error = torch.cat([_shorten(way, FASTEST[0]), _shorten(_turn_to(axes, sine, cosine), FASTEST[1])], 1)
        transposed = jacobian.mT
        damping = DAMPING**2 * torch.eye(6, device=error.device)
        joints = (transposed @ torch.linalg.solve(jacobian @ transposed + damping, error[:, :, None]))[:, :, 0]
        action = (joints - seen["leads"][:, :7]) / STEP
        slower: Tensor = action / action.abs().amax(1, keepdim=True).clamp(min=1.0)
        return slower


def expert(env: VectorEnv, *, noise: float = 0.0, seed: int = 0) -> PandaExpert:
    """The scripted policy for `env`: `PandaReach-v0` or `PandaLift-v0`, with any of their options.

    Call it with observations (N, ...) to get actions. It is deterministic.

    Args:
        env: as `make_env` makes it.
        noise: half width of uniform noise that is added to each entry of an action in [-1, 1], for demonstrations of
            varying quality.
        seed: of the noise.

    Raises:
        UsageError: there is no expert for this environment, or the noise is not from 0 to 2.
    """
    if not isinstance(env, SimVector) or not env.name.startswith(("PandaReach-", "PandaLift-")):
        raise UsageError(f"there are experts for PandaReach-v0 and PandaLift-v0, not for {env.name}")
    if not 0 <= noise <= 2:
        raise UsageError(f"noise is of actions in [-1, 1] and goes from 0 to 2, got {noise}")
    return PandaExpert(env, noise, seed)


class Chain:
    """Kinematics of a chain of hinges from the world to a site, of many positions at once: products of exponentials.

    Args:
        model: that has them; other joints on the way count as being where the model has them by default.
        joints: of the chain, in order from the base.
        site: at its end.
        device: of what is computed.
    """

    def __init__(self, model: mujoco.MjModel, joints: Sequence[str], site: str, device: torch.device) -> None:
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        ids = [index_of(model, mujoco.mjtObj.mjOBJ_JOINT, name) for name in joints]
        end = index_of(model, mujoco.mjtObj.mjOBJ_SITE, site)
        first = [float(model.qpos0[model.jnt_qposadr[i]]) for i in ids]

        def tensor(values: object) -> Tensor:
            return torch.as_tensor(np.array(values), dtype=torch.float32, device=device)

        self._first, self._axes, self._anchors = tensor(first), tensor(data.xaxis[ids]), tensor(data.xanchor[ids])
        self._end, self._frame = tensor(data.site_xpos[end]), tensor(data.site_xmat[end].reshape(3, 3))
        self._cross = torch.linalg.cross(self._axes[:, :, None], torch.eye(3, device=device)[None], dim=1)  # (J, 3, 3)

    def __call__(self, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `angles` (N, J): the site's position (N, 3), its axes (N, 3, 3) as columns, its Jacobian (N, 6, J)."""
        turned = (angles - self._first)[:, :, None, None]
        each = torch.eye(3, device=angles.device) + turned.sin() * self._cross
        each = each + (1 - turned.cos()) * (self._cross @ self._cross)  # (N, J, 3, 3), Rodrigues
        rotation = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
        shift = torch.zeros(len(angles), 3, device=angles.device)
        axes, anchors = [], []
        for i in range(angles.shape[1]):
            axes.append(rotation @ self._axes[i])
            anchors.append(rotation @ self._anchors[i] + shift)
            rotation = rotation @ each[:, i]
            shift = anchors[i] - rotation @ self._anchors[i]
        end = rotation @ self._end + shift
        along = torch.stack(axes, 2)  # (N, 3, J)
        moves = torch.linalg.cross(along, end[:, :, None] - torch.stack(anchors, 2), dim=1)
        return end, rotation @ self._frame, torch.cat([moves, along], 1)


def _turn_to(axes: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """(N, 3) from the tool's `axes` (N, 3, 3) to where it points down and is turned about the vertical by an angle of
    that sine and cosine (N,): the rotation's axis times the sine of its angle."""
    none = torch.zeros_like(sine)
    x = torch.stack([-sine, cosine, none], 1)
    y = torch.stack([cosine, sine, none], 1)
    wanted = torch.stack([x, y, torch.linalg.cross(x, y)], 2)
    turn: Tensor = torch.linalg.cross(axes, wanted, dim=1).sum(2) / 2
    return turn


def _shorten(vector: Tensor, longest: float) -> Tensor:
    """(N, 3) of the same directions, no longer than that."""
    return vector * (longest / norm(vector)[:, None].clamp(min=longest))
