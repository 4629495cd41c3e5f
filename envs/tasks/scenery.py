"""What scenes share that is only seen: a checkered floor, on which motion shows, a sky and a light."""

from __future__ import annotations

import mujoco

FLOOR = "floor"
"""Name of the material for floors."""


def add_scenery(spec: mujoco.MjSpec) -> None:
    """Add the material `FLOOR`, the sky and a light from above."""
    texture, builtin = mujoco.mjtTexture, mujoco.mjtBuiltin
    spec.add_texture(
        name="sky",
        type=texture.mjTEXTURE_SKYBOX,
        builtin=builtin.mjBUILTIN_GRADIENT,
        rgb1=[0.75, 0.84, 0.92],
        rgb2=[0.95, 0.97, 1.0],
        width=256,
        height=1536,
    )
    checkers = spec.add_texture(
        name=FLOOR,
        type=texture.mjTEXTURE_2D,
        builtin=builtin.mjBUILTIN_CHECKER,
        rgb1=[0.82, 0.85, 0.88],
        rgb2=[0.7, 0.74, 0.78],
        width=256,
        height=256,
    )
    material = spec.add_material(name=FLOOR, texrepeat=[1, 1], texuniform=True)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = checkers.name
    light = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    spec.worldbody.add_light(name="sun", type=light, pos=[0, 0, 3], dir=[0.3, 0.2, -1], diffuse=[0.5] * 3)
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.4] * 3, [0.4] * 3
