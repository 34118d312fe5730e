"""Ending trials that do badly: the step logs of running stages are read, reported to Optuna, and stages asked to stop.

A stage is asked by a file beside its work folder (`Artifact.ask_to_stop`), so it may run on any machine that sees the
artifacts; one that another run makes, or wants as well, is left alone. It ends at the next step that it logs, and what
it has done so far is kept.
"""

import contextlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

import optuna
from omegaconf import DictConfig
from optuna.trial import Trial

from threefold.artifacts.artifact import Artifact
from threefold.chain.member import Member
from threefold.errors import UserError, nearest
from threefold.runs.sweep_space import direction
from threefold.slurm import job_records

PAUSE = 1.0  # seconds between two looks at the logs


@dataclass
class Watched:
    """A trial, and the artifacts of the stage whose log is read, one for each of its runs."""

    trial: Trial
    artifacts: list[Artifact]
    reported: set[int] = field(default_factory=set)  # steps


def watched(trial: Trial, config: DictConfig, members: list[Member]) -> Watched:
    """What is watched of a trial that has the runs `members`; nothing without `sweep.prune`."""
    if config.prune is None:
        return Watched(trial, [])
    stage = config.prune.partition(".")[0]
    return Watched(trial, [member.planned[stage].artifact for member in members])


class Watch:
    """Reads the logs of `trials` in a thread while a `with` block lasts; `pruned` has the reason by trial number."""

    def __init__(self, run: str, config: DictConfig, study: optuna.Study, trials: list[Watched]):
        self.run, self.trials, self.pruned, self.error = run, trials, {}, None
        self.key = (config.prune or "").partition(".")[2]
        # the study's pruner knows one direction, that of the metric which the search is for
        given = direction(config.prune or "", config.prune_direction)
        self.sign = 1 if given == study.direction.name.lower() else -1
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Report what was logged last; raises here what the thread met."""
        self.over.set()
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def _watch(self) -> None:
        try:
            while not self.over.wait(PAUSE):
                for trial in self.trials:
                    self._look(trial)
            for trial in self.trials:
                self._look_back(trial)
        except Exception as error:
            self.error = error

    def _look(self, watched: Watched) -> None:
        """Report new steps of a trial, and end it where the pruner says so."""
        for step, value in self._new(watched):
            if watched.trial.number in self.pruned:
                return
            self._report(watched, step, value)
            if watched.trial.should_prune():
                reason = f"pruned at step {step}, {self.key} {value:.4g}"
                self.pruned[watched.trial.number] = reason
                for artifact in watched.artifacts:
                    if not job_records.wanted_outside(artifact, self.run):
                        artifact.ask_to_stop(self.run, reason)

    def _look_back(self, watched: Watched) -> None:
        """Report what remains of a trial that has run to its end, so that later ones are compared with all of it."""
        if all(artifact.finished for artifact in watched.artifacts):
            for step, value in self._new(watched):
                self._report(watched, step, value)

    def _report(self, watched: Watched, step: int, value: float) -> None:
        watched.trial.report(self.sign * value, step)
        watched.reported.add(step)

    def _new(self, watched: Watched) -> list[tuple[int, float]]:
        """Steps that all runs of a trial have logged and that were not reported, with their mean."""
        logs = [steps(artifact, self.key) for artifact in watched.artifacts]
        common = set.intersection(*map(set, logs)) - watched.reported
        return [(step, sum(log[step] for log in logs) / len(logs)) for step in sorted(common)]


def steps(artifact: Artifact, key: str) -> dict[int, float]:
    """Metric `key` by step in the log of an artifact, finished or not; raises `UserError` where no step has it."""
    rows = [json.loads(line) for line in _whole_lines(artifact)]
    values = {int(row["step"]): row[key] for row in rows if key in row}
    if rows and artifact.finished and not values:
        logged = [name for row in rows for name in row if name != "step"]
        raise UserError(f"sweep.prune: {artifact.stage} logs no {key}{nearest(key, logged)}")
    return values


def _whole_lines(artifact: Artifact) -> list[str]:
    """Lines of the step log that are written to their end; the log moves when the artifact is finished."""
    for folder in (artifact.out, artifact.folder):
        with contextlib.suppress(FileNotFoundError):
            text = (folder / "log.jsonl").read_text()
            return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []
