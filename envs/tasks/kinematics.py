"""Kinematics of an arm, of many positions at once: where its tool is, how joints move it, and how to move it.

What moves the tool is damped least squares (Nakamura and Hanafusa 1986): near singular poses it moves less than was
asked, and not wildly.
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.world import index_of

DAMPING = 0.05  # of least squares; unit: m for rows of positions, rad for those of rotations


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


def turn_down(axes: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """(N, 3) from the tool's `axes` (N, 3, 3) to where it points down and is turned about the vertical by an angle of
    that sine and cosine (N,): the rotation's axis times the sine of its angle."""
    none = torch.zeros_like(sine)
    x = torch.stack([-sine, cosine, none], 1)
    y = torch.stack([cosine, sine, none], 1)
    wanted = torch.stack([x, y, torch.linalg.cross(x, y)], 2)
    turn: Tensor = torch.linalg.cross(axes, wanted, dim=1).sum(2) / 2
    return turn


def shorten(vector: Tensor, longest: float) -> Tensor:
    """(N, 3) of the same directions, no longer than that."""
    shorter: Tensor = vector * (longest / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp(min=longest))
    return shorter


def joints_for(jacobian: Tensor, motion: Tensor) -> Tensor:
    """(N, J) rad by which joints turn for a `motion` (N, 6) of the site, m and rad; `jacobian` (N, 6, J)."""
    transposed = jacobian.mT
    damping = DAMPING**2 * torch.eye(6, device=motion.device)
    joints: Tensor = (transposed @ torch.linalg.solve(jacobian @ transposed + damping, motion[:, :, None]))[:, :, 0]
    return joints
