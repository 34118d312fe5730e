"""W&B: one run per stage, grouped by run, online where a key is at hand and the host answers, otherwise offline."""

import contextlib
import logging
import os
import secrets
import subprocess
from pathlib import Path
from typing import Any, Literal

# before the import, which reads it: W&B then prints nothing, and what it cannot do is said in one line
os.environ.setdefault("WANDB_SILENT", "true")
import wandb
from omegaconf import DictConfig

from threefold.errors import first_line
from threefold.tracking.dashboard import UNSENT
from threefold.tracking.trackers import About, Histogram, Table, mode

START_SECONDS, FINISH_SECONDS = 20, 30  # that W&B may take online, in a thread beside the stage
TYPES = {"tokenizer": "tokenizer", "comparisons": "dataset", "frontier": "result", "evaluate": "result"}


class WandbRun:
    """One W&B run of a stage (the protocol of pipeline/tracking/trackers.py)."""

    def __init__(self, tracker: DictConfig, about: About):
        self.tracker, self.about, self.succeeded = tracker, about, False
        self.online = mode(tracker.mode) == "online"
        # copies of tables that wait for `sync`; by default they are in the home folder
        os.environ.setdefault("WANDB_DATA_DIR", str((about.store / "wandb").absolute()))
        self.run = self._start()
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: None  # on a full disk its own log would print a traceback per line
        self.run.define_metric(about.axis)
        self.run.define_metric(f"{about.stage}/*", step_metric=about.axis)
        if self.online:
            self._use_parents()

    def _start(self) -> Any:
        """The run; offline where it cannot be started online."""
        identity = self.about.checkpoints / "wandb-id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        if self.online:
            try:
                return self._init("online", identity.read_text())
            except Exception as error:
                print(
                    f"W&B is offline for this stage ({first_line(error)}); `threefold sync` sends it later", flush=True
                )
                self.online = False
                identity.write_text(secrets.token_hex(4))  # the old one counts as in use
        return self._init("offline", identity.read_text())

    def _init(self, chosen: Literal["online", "offline"], identity: str) -> Any:
        about, tracker = self.about, self.tracker
        return wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=chosen,
            dir=str(about.store / "wandb"),
            id=identity,
            resume="allow",
            reinit="create_new",  # whatever became of the run before
            name=about.name,
            group=about.group,
            job_type=about.stage,
            tags=tags(tracker, about),
            config=about.described,
            settings=wandb.Settings(
                console="off",
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values at the stage's own `step`; those of one step may come in several calls."""
        self.run.log({name: _converted(value) for name, value in values.items()}, step=step)

    def alert(self, title: str, text: str) -> None:
        """An alert, online only: one that is sent days later helps nobody."""
        if self.online:
            self.run.alert(title, text, level="ERROR")

    def finish(self, metrics: dict[str, Any], out: Path) -> None:
        """The results as the run's summary, and online an artifact named after the stage, with two aliases."""
        self.run.summary.update(metrics)
        self.succeeded = True
        if self.online:
            self.run.log_artifact(
                self._artifact(metrics, out), aliases=[self.about.fingerprint, self.about.run.replace("/", "-")]
            )

    def close(self) -> None:
        """Finish the run, as failed where the stage did."""
        try:
            self.run.finish(exit_code=0 if self.succeeded else 1)
        except TimeoutError:
            (Path(self.run.settings.sync_dir) / UNSENT).touch()
            raise

    def _artifact(self, metrics: dict[str, Any], out: Path) -> Any:
        """What W&B keeps of the stage's artifact: configuration and results, and with `tracker.upload` all of it."""
        about = self.about
        described = {"fingerprint": about.fingerprint, "parents": about.parents, "results": metrics}
        artifact = wandb.Artifact(about.stage, TYPES.get(about.stage, "model"), metadata=described)
        if self.tracker.upload:
            artifact.add_dir(str(out))
        else:
            for name in ("config.yaml", "metrics.json"):
                artifact.add_file(str(out / name))
        return artifact

    def _use_parents(self) -> None:
        """Draw the lineage; a parent that was made without W&B is not there."""
        for stage, fingerprint in self.about.parents.items():
            with contextlib.suppress(Exception):
                self.run.use_artifact(f"{stage}:{fingerprint}")


def _converted(value: Any) -> Any:
    if isinstance(value, Table):
        return wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
    if isinstance(value, Histogram):
        return wandb.Histogram(np_histogram=(value.counts, value.edges))
    return value if isinstance(value, int | float) else wandb.Plotly(value)


def tags(tracker: DictConfig, about: About) -> list[str]:
    """The tags of the configuration, the stage, and the commit of the working directory where it has one."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    names = [*tracker.tags, about.stage]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)
        names.append(commit.stdout.strip())
    return list(dict.fromkeys(names))
