"""What the stages that use a Trainer share: its arguments, its reports, and continuing after a kill."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.tracked import OPTIMISER_STEP

COMPLETE = "complete"  # file that marks a checkpoint as wholly written


def arguments(job: Job, batch_size: int, steps: int, seed: int, checkpoints: Path | None = None) -> dict[str, Any]:
    """Arguments for any Trainer: `steps` optimiser steps of `batch_size` rows; checkpoints go into that folder."""
    micro = min(job.config.runtime.micro_batch_size or batch_size, batch_size)
    if batch_size % micro:
        raise UserError(f"runtime.micro_batch_size={micro}: must divide {job.stage}.batch_size={batch_size}")
    return {
        "output_dir": str(checkpoints or job.checkpoints),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch_size // micro,
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": job.device.type == "cpu",
        "bf16": job.device.bf16,
        "logging_steps": min(job.config.runtime.log_every, steps),
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": max(1, steps // (job.config.runtime.checkpoints + 1)),
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device.type == "cuda",
    }


def in_order(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Row numbers for all epochs in the order of training: shuffled, with rows of similar length in one batch.

    The trainers read their rows in this order, so that it depends on the seed alone: their own samplers draw from the
    global random state, which a resumed run has not advanced in the same way. A last
    batch that is not full is left out.
    """
    generator, order = np.random.default_rng(seed), []
    for _ in range(epochs):
        shuffled = generator.permutation(len(lengths))
        pools = [shuffled[i : i + POOL * batch_size] for i in range(0, len(shuffled), POOL * batch_size)]
        by_length = np.concatenate([pool[np.argsort(np.asarray(lengths)[pool], kind="stable")] for pool in pools])
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        whole = [batch for batch in batches if len(batch) == batch_size] or batches
        order += [int(row) for i in generator.permutation(len(whole)) for row in whole[i]]
    return order


POOL = 16  # batches that are sorted by length together


def linear_schedule(learning_rate: float, warmup: float, steps: int) -> dict[str, Any]:
    """Arguments for a learning rate that rises over a share `warmup` of the steps and falls linearly to zero."""
    return {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(warmup * steps),
        "weight_decay": 0.0,
    }


def train(trainer: Trainer, job: Job, per_step: int, unit: str, before: int = 0) -> None:
    """Train to the end, from the last complete checkpoint if there is one; `per_step` `unit`s per optimiser step.

    `before` are the steps of the trainings of this stage that came before, in its log.
    """
    last = last_checkpoint(Path(trainer.args.output_dir))
    step = int(last.rsplit("-", 1)[1]) if last else 0
    if last:
        job.say(f"continues from step {step:,} of {trainer.args.max_steps:,}")
    job.steps.rewind(before + step)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reports(job, per_step, unit, step, before))
    trainer.train(resume_from_checkpoint=last)


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint below `folder`; incomplete ones are removed."""
    while (last := get_last_checkpoint(str(folder))) and not (Path(last) / COMPLETE).exists():
        shutil.rmtree(last)
    return last


class Reports(TrainerCallback):
    """Passes a Trainer's metrics and progress to the job, and marks its checkpoints as complete."""

    def __init__(self, job: Job, per_step: int, unit: str, step: int, before: int):
        self.job, self.per_step, self.unit, self.first, self.before = job, per_step, unit, step, before
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar."""
        self.bar = self.job.progress(state.max_steps * self.per_step, self.unit, self.first * self.per_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress bar."""
        self.bar.update(self.per_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Record the metrics of a step; the Trainer's own closing summary is left out."""
        if logs and "train_runtime" not in logs:
            step = self.before + state.global_step
            axes = {OPTIMISER_STEP: step, self.unit: step * self.per_step}
            self.job.log(step, {name: value for name, value in logs.items() if isinstance(value, int | float)}, axes)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar."""
        self.bar.close()
