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

import torch
from torch import Tensor

from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.tasks.kinematics import Chain, joints_for, shorten, turn_down
from ctrlrl.envs.tasks.panda import RATE, STEP, TIMESTEP, TOOL_STEP, TOOL_TURN, norm
from ctrlrl.envs.tasks.panda_lift import HALF
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError

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
        self._tool = "turn" in env.task.action.names  # which actions move, instead of joints
        self._longer = env.task.substeps * TIMESTEP * RATE  # than an action of the usual rate lasts
        self._home = env.world.default_joint_pos[:7]
        self._chain = Chain(env.sim.model, env.task.joints[:7], "tool", env.device)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """(N, A) actions in [-1, 1] for observations (N, ...)."""
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
        turn = turn_down(axes, yaw.sin(), yaw.cos())

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
        """(N, 7 or 4) actions that take the tool `way` (N, 3), pointing down and turned by `sine` and `cosine` (N,)."""
        error = torch.cat([shorten(way, FASTEST[0]), shorten(turn_down(axes, sine, cosine), FASTEST[1])], 1)
        if self._tool:  # from where the targets would take it
            ahead = (jacobian @ seen["leads"][:, :7, None])[:, :, 0]
            action = torch.cat([(error - ahead)[:, :3] / TOOL_STEP, (error - ahead)[:, 5:] / TOOL_TURN], 1)
        else:
            action = (joints_for(jacobian, error) - seen["leads"][:, :7]) / STEP
        action = action / self._longer
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
