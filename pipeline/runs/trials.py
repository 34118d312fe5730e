"""The runs of a sweep: their folders, making them, ending those that do badly, and the files of the sweep.

Ending trials that do badly: the step logs of running stages are read, reported to Optuna, and stages asked to stop.

A stage is asked by a file beside its work folder (`Artifact.ask_to_stop`), so it may run on any machine that sees the
artifacts; one that another run makes, or wants as well, is left alone. It ends at the next step that it logs, and what
it has done so far is kept.
"""

import contextlib
import hashlib
import itertools
import json
import math
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import optuna
from omegaconf import DictConfig
from optuna.trial import Trial

from threefold.artifacts.artifact import COSTS, Artifact
from threefold.chain.plans import Member
from threefold.display.parts import csv_text, latex, markdown
from threefold.errors import UserError, nearest
from threefold.fileio import numbers, read_json, write_json, write_text
from threefold.runs import method_table, sweep_table, variants
from threefold.runs.sweep_space import (
    Dimension,
    by_method,
    combinations,
    direction,
    kl_metric,
    metric,
    objective,
    own,
    spelt,
    stage_wanted,
)
from threefold.runs.variants import Variant
from threefold.slurm import job_records

LONGEST = 180  # characters of a folder's name; file systems take 255 bytes


def of_grid(space: list[Dimension], target: str | None) -> dict[Variant, dict[str, Any]]:
    """Every run of all combinations of values, for each method of its own keys."""
    wanted: dict[Variant, dict[str, Any]] = {}
    for part in by_method(space):
        settings = combinations([dimension for dimension in part if not dimension.repeats])
        wanted |= variants_of(part, settings, target)
    return wanted


def variants_of(
    space: list[Dimension], settings: list[dict[str, Any]], target: str | None
) -> dict[Variant, dict[str, Any]]:
    """Every run of the settings, each with every combination of seeds: its variant, setting and repetition."""
    repeated = combinations([dimension for dimension in space if dimension.repeats])
    return {
        variant(setting | repetition, target): {"setting": setting, "repetition": repetition}
        for setting, repetition in itertools.product(settings, repeated)
    }


def variant(values: dict[str, Any], target: str | None) -> Variant:
    """The variant with `values`, in the folder that is called after them."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    return Variant(f"variants/{folder_name(name)}", tuple(spelt(values)), target)


def folder_name(text: str) -> str:
    """`text` if it can name a folder, otherwise what is left of it and a digest of the whole text."""
    kept = re.sub(r"[^\w.,=+@-]", "_", text)[:LONGEST]
    return text if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make(config: DictConfig, overrides: list[str], wanted: dict[Variant, dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the runs of `wanted`; returns each with its folder, state, value, KL and first error line."""
    reasons = {}
    try:
        variants.make(config, overrides, list(wanted))
    except variants.Failed as failed:
        reasons = failed.reasons
    return [result(config, variant, values, reasons.get(variant.name)) for variant, values in wanted.items()]


def result(config: DictConfig, variant: Variant, values: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """A run as sweep.json lists it, with its value and KL unless it failed for `reason`.

    `values` has its setting and repetition. In the row `value` is what settings are chosen by, and `reported` the
    metric where that is another number.
    """
    name = f"{config.run}/{variant.name}"
    row = values | {"run": name, "state": "complete", "value": None, "reported": None, "kl": None, "reason": reason}
    if reason:
        return row | {"state": "failed"}
    folder, kl, setting = Path(config.runs) / name, kl_metric(config), values["setting"]
    value = cast(float, measured(folder, own(objective(config), setting)))
    if not math.isfinite(value):
        return row | {"state": "failed", "reason": f"{objective(config)} is {value}"}
    reported = measured(folder, own(metric(config), setting)) if objective(config) != metric(config) else None
    return row | {
        "value": value,
        "reported": reported,
        "kl": measured(folder, own(kl, setting), config.sweep.kl is not None) if kl else None,
    }


def measured(folder: Path, name: str, needed: bool = True) -> float | None:
    """The number STAGE.METRIC of a run. Without it: None, or `UserError` if it is `needed`."""
    stage, _, key = name.partition(".")
    file = folder / stage / "metrics.json"
    by_name = numbers(read_json(file), COSTS)
    if key not in by_name and needed:
        raise UserError(f"{name}: is not among the numbers of {file}{nearest(key, by_name)}")
    return by_name.get(key)


def write(
    config: DictConfig, space: list[Dimension], runs: list[dict[str, Any]], importance: dict[str, float], by: str
) -> dict[str, Any]:
    """Write the sweep's files from `runs`, and link the stages that all share; returns what sweep.json holds."""
    results = {
        "run": config.run,
        "search": config.sweep.trials is not None,
        "target": stage_wanted(config),
        "metric": objective(config),
        "reported": metric(config) if objective(config) != metric(config) else None,
        "direction": direction(metric(config), config.sweep.direction),
        "kl_metric": kl_metric(config),
        "keys": [dimension.key for dimension in space if not dimension.repeats],
        "log_keys": [dimension.key for dimension in space if dimension.log],
        "repeated": [dimension.key for dimension in space if dimension.repeats],
        "importance": importance,
        "importance_by": by,
        "made_from": sweep_table.made_from(Path(config.runs), runs),
        "failed": [run for run in runs if run["state"] == "failed"],
        "runs": runs,
    }
    results["settings"] = sweep_table.settings(runs, results["direction"])
    results["methods"] = method_table.compared(Path(config.runs), results)
    folder = Path(config.runs) / config.run
    for stage, fingerprint in results["made_from"].items():
        Artifact(Path(config.runs), stage, fingerprint).link_into(folder)
    write_json(folder / "sweep.json", results)
    write_text(folder / "sweep.csv", csv_text(sweep_table.lines(Path(config.runs), runs)))
    tables = sweep_table.tables(results)
    write_text(folder / "sweep.md", "\n\n".join(map(markdown, tables)) + "\n")
    write_text(folder / "sweep.tex", "\n".join(map(latex, tables)))
    return results


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
