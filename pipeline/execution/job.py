"""What a stage is given while it runs: its configuration, inputs, an empty folder, and ways to report."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from threefold.artifacts.artifact import asked_to_stop
from threefold.artifacts.digests import VERSIONED
from threefold.errors import UserError, queued_again
from threefold.execution import device
from threefold.fileio import read_json, write_json
from threefold.schema.config import Config
from threefold.tracking.trackers import OPTIMISER_STEP, About, StepLog, Trackers

# TRL, transformers and datasets then send nothing about their use
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


STEP_SECONDS = 0.01  # that a step takes beside the model's passes, about: optimiser, and the Trainer's own work


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
        self.stage, self.inputs = stage, inputs
        self.config = cast(Config, config)  # typed, so that editors complete job.config.ppo.kl_coef
        self.out, self.checkpoints, self.main = out, checkpoints, group.rank == 0
        self.steps = StepLog(out / "log.jsonl" if self.main else Path(os.devnull))
        self.trackers: Trackers | None = None
        self.started = time.perf_counter()
        self.device = device.set_up(config.runtime, config.get("precision", "auto"), group)

    def start(self, fingerprint: str) -> None:
        """Save the configuration, begin tracking, and measure memory and time from here."""
        device.reset_peak_memory()
        quiet_libraries()
        if not self.main:
            return
        OmegaConf.save(self.config, self.out / "config.yaml")
        if self.config.tracker.kinds:
            self.trackers = Trackers(self.config.tracker, self._about(fingerprint), self.steps.last())

    def _about(self, fingerprint: str) -> About:
        parents = {name: read_json(folder / "manifest.json")["fingerprint"] for name, folder in self.inputs.items()}
        described, store = cast(dict[str, Any], OmegaConf.to_container(self.config)), self.checkpoints.parent.parent
        return About(self.stage, self.config.run, fingerprint, parents, described, store, self.checkpoints)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.main:
            tqdm.write(f"{self.stage:<12} {text}")

    def announce(self, batch: str, steps: int | None, model: Any, work: device.Work, more: float = 0.0) -> None:
        """State devices, precision, mode, batch of all processes or amount of work, and on a CPU the estimated time.

        That is the time of `work` with `model`, of a Trainer's `steps`, and `more` seconds.
        """
        if not self.main:
            return
        mode, about = "one process" if self.device.processes == 1 else self.device.mode, ""
        if self.device.type == "cpu":
            seconds = device.estimated_seconds(model, work, self.device.bf16) / self.device.processes
            about = f", about {_duration(seconds + STEP_SECONDS * (steps or 0) + more)}"
        self.say(f"{self.device} · {mode} · {batch}{f' × {steps:,} steps' if steps else ''}{about}")

    def progress(self, total: int, unit: str, initial: int = 0, part: str = "") -> tqdm:
        """A progress bar in `unit`s (tokens, pairs, episodes) with speed and time left, of a `part` of the stage."""
        quiet = not sys.stderr.isatty()
        bar = "{desc:<12} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} {unit} "
        bar += "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return tqdm(
            total=total, initial=initial, unit=unit, unit_scale=True, bar_format=bar,
            desc=f"{self.stage} {part}".strip(),
            leave=False, mininterval=30 if quiet else 0.5, file=sys.stderr, disable=not self.main,
        )  # fmt: skip

    def log(self, step: int, metrics: dict[str, float], axes: dict[str, int] | None = None) -> None:
        """Record metrics of one step in the step log and the trackers, for these also how far it is in other units.

        Raises `UserError` where the stage was asked to end here.
        """
        self.steps.write(step, metrics)
        if self.trackers:
            self.trackers.log(step, metrics, axes or {OPTIMISER_STEP: step})
        if self.main and (reason := asked_to_stop(self.out.parent, self.config.run)):
            raise UserError(f"{self.stage}: ended at step {step}: {reason}")

    @property
    def tracked(self) -> bool:
        """Whether anybody sees what `show` is given; if not it need not be made."""
        return self.trackers is not None

    def show(self, values: dict[str, Any], step: int | None = None) -> None:
        """Tables, histograms and figures for the trackers alone, at `step` or at the last one."""
        if self.trackers:
            self.trackers.show(values, step)

    def alert(self, title: str, text: str) -> None:
        """Have the trackers tell people that something needs them."""
        if self.trackers:
            self.trackers.alert(title, text)

    def finish(self, metrics: dict[str, Any], fingerprint: str) -> dict[str, Any]:
        """Write `metrics.json`; returns what the manifest says of this execution."""
        cost = {
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_memory_bytes": device.peak_memory_bytes(),
            "fingerprint": fingerprint,
        }
        if self.main:
            write_json(self.out / "metrics.json", metrics | cost)
        if self.trackers:
            self.trackers.finish(metrics | cost, self.out)
        devices = {"devices": {"type": self.device.type, "count": self.device.processes}}
        environment = {"python": platform.python_version(), "device": str(self.device)} | commit()
        return cost | devices | {"environment": environment | {name: version(name) for name in VERSIONED}}

    def close(self) -> None:
        """End tracking, whether the stage succeeded or not, and leave the GPU's memory to others."""
        if self.trackers:
            self.trackers.close()
        device.free_memory()


def execute(job: Job, fingerprint: str) -> dict[str, Any]:
    """Run the stage of `job` from start to end; returns what the manifest says of this execution."""
    try:
        job.start(fingerprint)
        metrics = importlib.import_module(f"threefold.stages.{job.stage}").run(job)
        return job.finish(metrics, fingerprint)
    except SystemExit as error:  # of a library, or of people's own code: nothing was made
        if queued_again(error):
            raise
        raise UserError(f"{job.stage}: something that it called ended with sys.exit({error.code!r})") from error
    finally:
        job.close()


def commit() -> dict[str, str]:
    """The commit of this code, with -dirty where files differ from it; empty outside of a git checkout of it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(["git", "--no-optional-locks", *describe], cwd=root, capture_output=True, text=True)
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


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
    os.environ["TQDM_DISABLE"] = "1"  # TRL's own bars: the stage has one for each part that takes long


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
