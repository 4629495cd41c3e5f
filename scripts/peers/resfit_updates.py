"""Gradient updates per second of ResFiT's released code, on made-up batches of states.

    python resfit_updates.py CLONE    # of github.com/amazon-science/residual-offpolicy-rl; needs torch, and einops

Released is an agent for cameras alone. What belongs to them is taken out of it: the vision transformer, the critics'
spatial embedding and the actor's compression, so that critics read state and action, the residual state and base
action. That is the least that it can cost. One update is `QAgent.update`; each fourth one is of the actor, too.
Batches are ready before the clock starts. For each line of standard input, so many updates are timed: a line with
their seconds.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from typing import Any

BATCH, OBS, ACTION, HEADS, HIDDEN = 256, 39, 4, 10, 1024


def _stand_in(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


class _Store:
    """Hydra's registry, in which the configurations only put themselves."""

    @classmethod
    def instance(cls) -> _Store:
        return cls()

    def store(self, **what: Any) -> None:
        pass


def main() -> None:
    """Time what standard input asks for."""
    clone = sys.argv[1]
    names = ("hydra", "hydra.core", "hydra.core.config_store", "torchvision", "psutil", "tabulate")
    for name in names:
        more = (
            {"ConfigStore": _Store}
            if name.endswith("store")
            else {"tabulate": lambda *what, **how: "", "transforms": None}
        )
        _stand_in(name, **more)
    sys.path.insert(0, clone)
    import torch
    from resfit.rl_finetuning.config.rlpd import ActorConfig, CriticConfig, QAgentConfig
    from resfit.rl_finetuning.off_policy.rl import critic as critics
    from resfit.rl_finetuning.off_policy.rl import q_agent as agents
    from torch import nn

    for name in names:  # torch looks for some of these later
        del sys.modules[name]

    class NoCamera(nn.Module):
        patch_repr_dim = repr_dim = 1

        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, 1, 1))

        def forward(self, x: Any, flatten: bool = False) -> Any:
            return self.w.expand(x.shape[0], 1, 1)

    class Nothing(nn.Module):
        def forward(self, x: Any) -> Any:
            return x[:, :0]

    torch.manual_seed(0)
    config = QAgentConfig(
        device="cpu",
        actor_lr=1e-6,
        critic_lr=1e-4,
        critic_target_tau=0.005,
        critic=CriticConfig(num_q=HEADS, hidden_dim=HIDDEN),
        actor=ActorConfig(action_scale=0.2, actor_last_layer_init_scale=0.0),
    )
    agents.VitEncoder = NoCamera
    config.critic.spatial_emb = config.actor.feature_dim = 0
    critics.SpatialEmbQEnsemble._compute_trunk = lambda self, f, prop, act: torch.cat((prop, act), -1)
    with contextlib.redirect_stdout(sys.stderr):  # it tells of its networks
        agent = agents.QAgent((3, 84, 84), (OBS,), ACTION, ["camera"], config, residual_actor=True)
    agent.aug = lambda x: x
    agent.actor.compress, agent.actor_target.compress = Nothing(), Nothing()

    def obs() -> dict[str, Any]:
        return {
            "observation.state": torch.randn(BATCH, OBS),
            "observation.base_action": torch.rand(BATCH, ACTION) * 2 - 1,
            "camera": torch.zeros(BATCH, 1, 1, 1),
        }

    batches: list[dict[Any, Any]] = [
        {
            "obs": obs(),
            ("next", "obs"): obs(),
            "action": torch.rand(BATCH, ACTION) * 2 - 1,
            ("next", "reward"): (torch.rand(BATCH) < 0.05).float(),
            "gamma": torch.full((BATCH,), 0.99**3),
            "nonterminal": torch.rand(BATCH) > 0.05,
        }
        for _ in range(16)
    ]
    print("ready", flush=True)
    done = 0
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            batch = dict(batches[done % len(batches)])
            batch["obs"], batch["next", "obs"] = dict(batch["obs"]), dict(batch["next", "obs"])
            done += 1
            agent.update(batch, 0.05, done % 4 == 0, bc_batch=None, ref_agent=agent)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
