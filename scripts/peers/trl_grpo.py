"""One training of TRL's GRPOTrainer on single-turn tasks of a text environment of ours, in its own virtual environment:
`bench_trl.py` starts and gates it, and says what is alike and what is not.

Settings come as JSON on the command line. Of `tasks`, a file, each has the seed of the episode, the prompt that ours is
given and its token ids; other ids by TRL's tokenizer end the process. The reward is the environment's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from gate import Gate

from ctrlrl.envs.text.registry import make_text_env


class Counted:
    """The environment as a reward function, which counts what it is given and gives."""

    __name__ = "reward"

    def __init__(self, env: str, kwargs: dict[str, Any]) -> None:
        self._env = make_text_env(env, kwargs)
        self.tokens, self.reward = 0, 0.0

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], seed: list[int], **_: Any
    ) -> list[float]:
        """Of each completion, an answer to the task of its seed."""
        rewards = []
        for answer, one in zip(completions, seed, strict=True):
            self._env.reset(one)
            rewards.append(self._env.step(answer.strip()).reward)
        self.tokens += sum(map(len, completion_ids))
        self.reward += sum(rewards)
        return rewards


class Gated(TrainerCallback):
    """Hands the counts to the gate after all updates of a batch of completions."""

    def __init__(self, settings: dict[str, Any], counted: Counted, updates: int) -> None:
        self._gate, self._counted = Gate(settings["turn"], warm_updates=0), counted
        self._batch, self._updates = settings["batch"], updates

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first turn."""
        self._report(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each update."""
        if state.global_step % self._updates == 0:
            self._report(state.global_step)

    def _report(self, updates: int) -> None:
        made = updates // self._updates * self._batch
        self._gate(made, updates, tokens=self._counted.tokens, reward=self._counted.reward)


def main() -> None:
    """Train until the gate ends the process."""
    s = json.loads(sys.argv[1])
    torch.set_num_threads(s["threads"])
    tasks = json.loads(Path(s["tasks"]).read_text())
    counted = Counted(s["env"], s["env_kwargs"])
    slices = s["batch"] // s["minibatch"]
    updates = s["epochs"] * slices  # of a batch
    trainer = GRPOTrainer(
        model=s["model"],
        reward_funcs=counted,
        train_dataset=Dataset.from_list([{"prompt": one["prompt"], "seed": one["seed"]} for one in tasks]),
        args=GRPOConfig(
            output_dir=s["out"],
            seed=s["seed"],
            # the same as ours
            per_device_train_batch_size=s["minibatch"],
            steps_per_generation=slices,
            gradient_accumulation_steps=1,
            num_generations=s["group"],
            num_iterations=s["epochs"],
            max_steps=s["completions"] // s["batch"] * updates,
            max_completion_length=s["tokens"],
            temperature=1.0,
            learning_rate=s["lr"],
            lr_scheduler_type="constant",
            adam_epsilon=1e-5,
            max_grad_norm=0.5,
            epsilon=0.2,
            beta=0.0,
            scale_rewards="group",
            loss_type="bnpo",
            model_init_kwargs={"dtype": "float32"},
            # for small models on a CPU
            use_cpu=True,
            use_vllm=False,
            bf16=False,
            gradient_checkpointing=False,
            disable_dropout=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            pad_to_multiple_of=None,
            # nothing is written
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    read = trainer.processing_class(text=[one["prompt"] for one in tasks])["input_ids"]
    if read != [one["ids"] for one in tasks]:
        raise SystemExit("TRL reads the prompts as other tokens than ctrlrl")
    trainer.add_callback(Gated(s, counted, updates))
    trainer.train()


if __name__ == "__main__":
    main()
