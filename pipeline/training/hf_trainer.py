"""What the stages that use a Trainer share: its arguments, its reports, its pairs, and continuing after a kill."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from threefold.data.preferences import TokenisedPairs, drawn, read, tokenised
from threefold.errors import UserError, require_most
from threefold.execution import ranks
from threefold.execution.job import Job
from threefold.schema.config import SHARDED
from threefold.tracking.trackers import OPTIMISER_STEP
from threefold.training import guards

COMPLETE = "complete"  # file that marks a checkpoint as wholly written; what the processes held of the model is in it

# what each mode of `launch` adds to a trainer's arguments, and how accelerate calls it; on a CPU ddp is MULTI_CPU
ZERO3 = {
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}},
    "deepspeed_zero3": {"deepspeed": ZERO3},
}
SET_UP = {"single": ("NO",), "ddp": ("MULTI_CPU", "MULTI_GPU"), "fsdp2": ("FSDP",), "deepspeed_zero3": ("DEEPSPEED",)}


class Undisturbed:
    """Goes before a Trainer: what it measures on held-out rows leaves the random state as it was.

    A loader of rows draws a number whether it needs one or not; a run that is measured more often would then differ.
    """

    def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
        """The Trainer's own evaluation."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*given, **options)  # ty: ignore[missing-attribute]


HELD_OUT_SHARE = 0.05  # of the cost of training that all evaluations of its held-out loss may have, about
LEAST_HELD_OUT, MOST_HELD_OUT = 8, 256  # rows


def held_out_rows(job: Job, rows: Any, trained: int) -> Any:
    """Some of `rows` in their order, drawn by the stage's seed, for the evaluations of the loss; None for none.

    There are as many as these may take beside `trained` rows: a row costs a forward pass, a third of training on it.
    """
    times = job.config.runtime.evaluations
    if not times or not len(rows):
        return None
    count = min(len(rows), MOST_HELD_OUT, max(LEAST_HELD_OUT, int(3 * HELD_OUT_SHARE * trained / times)))
    chosen = np.random.default_rng(getattr(job.config, job.stage).seed).choice(len(rows), count, replace=False)
    return [rows[number] for number in np.sort(chosen)]


def arguments(job: Job, batch_size: int, steps: int, seed: int, checkpoints: Path | None = None) -> dict[str, Any]:
    """Arguments for any Trainer: `steps` optimiser steps of `batch_size` rows; checkpoints go into that folder.

    `batch_size` is that of all processes together; each takes an equal share of the rows of every batch, in the order
    of the rows: passes of `micro_batch_size` rows go to the processes in turn.
    """
    share = math.ceil(batch_size / job.device.processes)
    most = min(job.config.runtime.micro_batch_size or share, share)
    # a batch of few rows need not divide by the size asked for
    micro_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
    return copy.deepcopy(OPTIONS[job.device.mode]) | {
        "output_dir": str(checkpoints or job.checkpoints),
        "per_device_train_batch_size": micro_batch_size,
        "per_device_eval_batch_size": 1,  # then the mean over batches is that over rows, however they are shared out
        "gradient_accumulation_steps": share // micro_batch_size,
        "ddp_find_unused_parameters": True,  # buckets then stay as they are: a resumed run adds up in the same order
        "max_steps": steps,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": job.device.type == "cpu",
        "bf16": job.device.bf16,
        "logging_steps": min(job.config.runtime.log_every, steps),
        "logging_nan_inf_filter": False,  # it would write a loss that is no number as the mean of those before
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
    global random state, which a resumed run has not advanced in the same way. Rows that do not fill a batch are left
    out of an epoch before rows are sorted, drawn without regard to their length, and others in the next epoch.
    """
    batch_size = rows_of_a_batch(batch_size, len(lengths))
    generator, order = np.random.default_rng(seed), []
    turns, count = generator.permutation(len(lengths)), len(lengths) % batch_size
    for epoch in range(epochs):
        left_out = np.take(turns, np.arange(epoch * count, (epoch + 1) * count), mode="wrap")
        shuffled = generator.permutation(np.setdiff1d(turns, left_out))
        pools = [shuffled[i : i + POOL * batch_size] for i in range(0, len(shuffled), POOL * batch_size)]
        by_length = np.concatenate([pool[np.argsort(np.asarray(lengths)[pool], kind="stable")] for pool in pools])
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        order += [int(row) for i in generator.permutation(len(batches)) for row in batches[i]]
    return order


def rows_of_a_batch(batch_size: int, rows: int) -> int:
    """`batch_size`, or all rows where these are fewer: a batch holds no row twice, and every epoch is one of them."""
    return min(batch_size, rows)


def trained_on(job: Job, orders: list[list[int]], rows: int, batch_size: int, unit: str) -> dict[str, int]:
    """The different rows that the `orders` of the trainings hold, of `rows`, and how many an epoch leaves out."""
    left_out = rows % batch_size
    if left_out:
        job.say(f"{left_out} of {rows:,} {unit} fill no batch and are left out of an epoch, others in each, by chance")
    return {unit: len(set().union(*orders)), "left_out_per_epoch": left_out}


POOL = 16  # batches that are sorted by length together


def linear_schedule(learning_rate: float, warmup: float, steps: int) -> dict[str, Any]:
    """Arguments for a learning rate that rises over a share `warmup` of the steps and falls linearly to zero."""
    return {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(warmup * steps),
        "weight_decay": 0.0,
    }


def require_whole_batch(job: Job, rows: int, batch_size: int) -> None:
    """Raise `UserError` where several processes would share fewer rows than one batch and each counts in the loss."""
    if job.device.processes > 1 and rows < batch_size:
        raise UserError(
            f"{job.stage}.batch_size={batch_size}: {rows} pairs are fewer, which {job.device.processes} processes "
            "cannot share alike; set it lower, or use launch=single"
        )


def train(trainer: Trainer, job: Job, per_step: int, unit: str, before: int = 0) -> nn.Module:
    """Train to the end, from the last complete checkpoint if there is one; `per_step` `unit`s per optimiser step.

    `before` are the steps of the trainings of this stage that came before, in its log. Returns the trained model, with
    all its weights in the main process; in others it may have a share of them.
    """
    require_mode(trainer, job)
    model: Any = trainer.model
    kind, shape = type(model), model.config  # before fsdp2 changes the model's class
    folder = Path(str(trainer.args.output_dir))
    last = ranks.decided(job.main and continued_from(folder, job), trainer.accelerator)
    step = int(last.rsplit("-", 1)[1]) if last else 0
    if last:
        job.say(f"continues from step {step:,} of {trainer.args.max_steps:,}")
    job.steps.rewind(before + step)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reports(job, per_step, unit, step, before, trainer.eval_dataset is not None))
    trainer.train(resume_from_checkpoint=last)
    if not job.device.sharded:
        return cast(nn.Module, trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # all processes give theirs
    return gather(kind, shape, weights).to(job.device.type) if job.main else cast(nn.Module, trainer.model)


def gather(kind: type[nn.Module], shape: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A model of one's own, fp32, with weights that several processes held."""
    model = kind(shape)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model


def require_mode(trainer: Trainer, job: Job) -> None:
    """Raise `UserError` where accelerate has silently set up another mode than the one asked for."""
    chosen, mode = trainer.accelerator.distributed_type.name, job.device.mode
    wrong_version = mode == "fsdp2" and not trainer.accelerator.is_fsdp2
    if chosen not in SET_UP[mode] or trainer.accelerator.num_processes != job.device.processes or wrong_version:
        raise UserError(
            f"launch.mode={mode}: accelerate set up {trainer.accelerator.num_processes} {chosen} instead of "
            f"{job.device.processes} {' or '.join(SET_UP[mode])}; unset the ACCELERATE_ variables of the environment"
        )


def continued_from(folder: Path, job: Job) -> str | None:
    """The checkpoint to continue from; raises `UserError` where processes shared the model that now do not."""
    last = last_checkpoint(folder)
    saved = (Path(last) / COMPLETE).read_text() if last else job.device.mode
    if saved != job.device.mode and {saved, job.device.mode} & set(SHARDED):
        raise UserError(
            f"launch.mode={job.device.mode}: was begun with {saved}; continue with that, or remove {folder}"
        )
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint below `folder`; incomplete ones are removed."""
    while (last := get_last_checkpoint(str(folder))) and not (Path(last) / COMPLETE).exists():
        shutil.rmtree(last)
    return last


# what is kept of an evaluation; TRL adds the means of its other metrics
EVALUATED = ("eval_loss", "eval_accuracy", "eval_rewards/accuracies", "eval_mean_token_accuracy")


def moments(times: int, steps: int) -> set[int]:
    """The optimiser steps, of `steps`, after which the held-out loss is measured: the last, and evenly before it."""
    return {round(steps * k / times) for k in range(1, times + 1)} - {0}


class Reports(TrainerCallback):
    """Passes a Trainer's metrics and progress to the job, and marks its checkpoints as complete."""

    def __init__(self, job: Job, per_step: int, unit: str, step: int, before: int, measured: bool = False):
        self.job, self.per_step, self.unit, self.first, self.before = job, per_step, unit, step, before
        self.measured = measured  # whether there are held-out rows
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar."""
        self.bar = self.job.progress(state.max_steps * self.per_step, self.unit, self.first * self.per_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress bar."""
        self.bar.update(self.per_step)
        if self.measured:
            control.should_evaluate = state.global_step in moments(self.job.config.runtime.evaluations, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Record the metrics of a step; the Trainer's own closing summary is left out.

        Raises `UserError` where one is not a finite number: the weights are lost then.
        """
        step = self.before + state.global_step
        metrics = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if names := guards.broken(metrics):
            stage = self.job.stage
            rates = [f"{stage}.{key}" for key in getattr(self.job.config, stage) if key.endswith("learning_rate")]
            raise UserError(f"{stage}: {names[0]} is {metrics[names[0]]} at step {step:,}; lower {' or '.join(rates)}")
        if "loss" in metrics:
            self.bar.set_postfix({"loss": f"{metrics['loss']:.3f}"}, refresh=False)
        if "eval_loss" in metrics:
            metrics = {name: value for name, value in metrics.items() if name in EVALUATED}
        if "train_runtime" not in metrics:
            self.job.log(step, metrics, {OPTIMISER_STEP: step, self.unit: step * self.per_step})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written, once all processes have written theirs of it."""
        ranks.meet(self.job)
        if self.job.main:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).write_text(self.job.device.mode)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar."""
        self.bar.close()


LONG = 2000  # pairs from which on tokenising takes so long that it has a bar


def load_pairs(job: Job, tokenizer: Any) -> tuple[TokenisedPairs, TokenisedPairs]:
    """Training and held-out pairs of a comparisons artifact, as many as the stage of `job` asks for.

    Raises `UserError` when none of either fits, or more than the share that data.preferences allows do not.
    """
    config, share = getattr(job.config, job.stage), job.config.data.preferences.max_unusable_share
    counts = {"train": config.pairs, "test": config.eval_pairs}
    pairs = {split: drawn(read(job.inputs["comparisons"], split), n, config.seed) for split, n in counts.items()}
    total = sum(len(pairs[split][:n]) for split, n in counts.items())
    bar = job.progress(total, "pairs", part="tokens") if total > LONG else None
    train, test = (tokenised(tokenizer, pairs[split], config.max_length, n, bar) for split, n in counts.items())
    if bar is not None:
        bar.close()
    for split, what in ((train, "training pairs"), (test, "held-out pairs")):
        key, allowed = f"{job.stage}.max_length={config.max_length}", "data.preferences.max_unusable_share"
        require_most(split.dropped, split.dropped + len(split.rows), share, key, what, allowed)
    return train, test
