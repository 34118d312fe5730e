"""What a stage is given while it runs: its configuration, inputs, an empty folder, and ways to report."""

import importlib
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from pipeline import device
from pipeline.artifact import write_json
from pipeline.tracking import StepLog, WandbRun

# TRL, transformers and datasets then send nothing about their use
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

VERSIONED = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")


class Job:
    """One execution of a stage.

    `config` holds the keys that the fingerprint covers, `inputs` the artifact folder of each parent, `out` the folder
    to fill, `checkpoints` a folder that survives a kill and goes when the stage is done. Where several processes
    execute a stage together, each has a job, and that of `rank` 0 alone writes, speaks and tracks.
    """

    def __init__(
        self, stage: str, config: DictConfig, inputs: dict[str, Path], out: Path, checkpoints: Path,
        group: device.Group = device.ALONE,
    ):  # fmt: skip
        self.stage, self.config, self.inputs = stage, config, inputs
        self.out, self.checkpoints, self.main = out, checkpoints, group.rank == 0
        self.steps = StepLog(out / "log.jsonl" if self.main else Path(os.devnull))
        self.wandb: WandbRun | None = None
        self.started = time.perf_counter()
        self.device = device.set_up(config.runtime, config.get("precision", "auto"), group)

    def start(self) -> None:
        """Save the configuration, begin tracking, and measure memory and time from here."""
        device.reset_peak_memory()
        quiet_libraries()
        if not self.main:
            return
        OmegaConf.save(self.config, self.out / "config.yaml")
        if self.config.tracker.kind == "wandb":
            self.wandb = WandbRun(self.config.tracker, self.stage, self.config.run, self.checkpoints, self.config)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.main:
            tqdm.write(f"{self.stage:<12} {text}")

    def announce(self, batch: str, steps: int | None, flops: float) -> None:
        """State devices, precision, mode, batch of all processes or amount of work, and estimated time from `flops`."""
        share = flops / self.device.processes
        mode = "one process" if self.device.processes == 1 else self.device.mode
        about = f", about {_duration(device.estimated_seconds(share))}" if self.device.type == "cpu" else ""
        self.say(f"{self.device} · {mode} · {batch}{f' × {steps:,} steps' if steps else ''}{about}")

    def progress(self, total: int, unit: str, initial: int = 0) -> tqdm:
        """A progress bar in `unit`s (tokens, pairs, episodes) with speed and time left."""
        quiet = not sys.stderr.isatty()
        bar = "{desc:<12} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}]"
        return tqdm(
            total=total, initial=initial, unit=unit, unit_scale=True, desc=self.stage, bar_format=bar,
            leave=False, mininterval=30 if quiet else 0.5, file=sys.stderr, disable=not self.main,
        )  # fmt: skip

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of one step in the step log and the tracker."""
        self.steps.write(step, metrics)
        if self.wandb:
            self.wandb.log(step, metrics)

    def finish(self, metrics: dict[str, Any], fingerprint: str) -> dict[str, Any]:
        """Write `metrics.json`; returns what the manifest says of this execution."""
        cost = {
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_bytes": device.peak_memory_bytes(),
            "fingerprint": fingerprint,
        }
        if self.main:
            write_json(self.out / "metrics.json", metrics | cost)
        if self.wandb:
            self.wandb.summarise(metrics | cost)
        environment = {"python": platform.python_version(), "device": str(self.device)}
        return cost | {"environment": environment | {name: version(name) for name in VERSIONED}}

    def close(self) -> None:
        """End tracking, whether the stage succeeded or not, and leave the GPU's memory to others."""
        if self.wandb:
            self.wandb.close()
        device.free_memory()


def execute(job: Job, fingerprint: str) -> dict[str, Any]:
    """Run the stage of `job` from start to end; returns what the manifest says of this execution."""
    try:
        job.start()
        metrics = importlib.import_module(f"stages.{job.stage}").run(job)
        return job.finish(metrics, fingerprint)
    finally:
        job.close()


def quiet_libraries() -> None:
    """Warnings of libraries at their default level would drown the stage's own lines; errors still show."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # TRL's own bars, which know no slower pace for a log file


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
