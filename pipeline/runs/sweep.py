"""The sweep: a run with several values of some keys, all combinations of them or as a search by Optuna chooses.

runs/<run>/variants/<key=value,…>   the run of each setting and seed
runs/<run>/sweep.json               settings with their spread, the best, importance, failed runs
runs/<run>/sweep.csv                a line for each run
runs/<run>/sweep.journal            Optuna's trials, where it is a search
"""

import contextlib
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from threefold.artifacts.artifact import Artifact, read_json, write_json, write_text
from threefold.display.parts import csv_text
from threefold.errors import UserError, nearest
from threefold.report import write_report
from threefold.runs import seeds, sweep_table, variants
from threefold.runs.sweep_metric import direction, kl_metric, metric, objective, stage_wanted
from threefold.runs.sweep_space import Dimension, combinations, spelt
from threefold.runs.variants import Variant
from threefold.tracking.backends import installed

LONGEST = 180  # characters of a folder's name; file systems take 255 bytes


def run(config: DictConfig, overrides: list[str], space: list[Dimension]) -> dict[str, Any]:
    """Make a sweep over `space`, print its table and write its files; returns what sweep.json holds.

    Runs that fail are in `failed`. What is there is not made again, so the same command continues an interrupted sweep
    and makes failed runs alone. Raises `UserError` for bad input.
    """
    with alone(config):
        found = _search(config, overrides, space) if config.sweep.trials else _grid(config, overrides, space)
    folder = Path(config.runs) / config.run
    sweep_table.print_result(found, folder)
    if found["made_from"]:  # a report is of a run's stages
        write_report(config)
        print(f"report with plots: {folder / 'report.html'}")
    return found


@contextlib.contextmanager
def alone(config: DictConfig) -> Iterator[None]:
    """Hold the run's sweep; raises `UserError` while another process does."""
    folder = Path(config.runs) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"run={config.run}: another sweep of it is going on; wait, or choose another run") from None
    try:
        yield
    finally:
        lock.release()


def members(
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
    overrides = spelt(values)
    return Variant(f"variants/{folder_name(','.join(overrides))}", tuple(overrides), target)


def folder_name(text: str) -> str:
    """`text` if it can name a folder, otherwise what is left of it and a digest of the whole."""
    kept = re.sub(r"[^\w.,=+@-]", "_", text)[:LONGEST]
    return text if kept == text else f"{kept}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make(config: DictConfig, overrides: list[str], wanted: dict[Variant, dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the runs of `wanted`; returns each with its folder, state, value, KL and first error line."""
    reasons = {}
    try:
        variants.make(config, overrides, list(wanted))
    except variants.Failed as failed:
        reasons = failed.reasons
    return [result(config, each, known, reasons.get(each.name)) for each, known in wanted.items()]


def result(config: DictConfig, wanted: Variant, known: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """A run as sweep.json lists it, with its value and KL unless it failed for `reason`.

    `value` is what settings are chosen by, `reported` the metric where that is another number.
    """
    name = f"{config.run}/{wanted.name}"
    row = known | {"run": name, "state": "complete", "value": None, "reported": None, "kl": None, "reason": reason}
    if reason:
        return row | {"state": "failed"}
    folder, kl = Path(config.runs) / name, kl_metric(config)
    value = measured(folder, objective(config))
    if not math.isfinite(value):
        return row | {"state": "failed", "reason": f"{objective(config)} is {value}"}
    reported = measured(folder, metric(config)) if objective(config) != metric(config) else None
    return row | {
        "value": value,
        "reported": reported,
        "kl": measured(folder, kl, config.sweep.kl is not None) if kl else None,
    }


def measured(folder: Path, name: str, needed: bool = True) -> float | None:
    """The number STAGE.METRIC of a run; where there is none None, or a `UserError` if it is `needed`."""
    stage, _, key = name.partition(".")
    known = seeds.numbers(read_json(folder / stage / "metrics.json"))
    if key not in known and not needed:
        return None
    if key not in known:
        raise UserError(f"{name}: is not among the numbers of {folder / stage / 'metrics.json'}{nearest(key, known)}")
    return known[key]


def _grid(config: DictConfig, overrides: list[str], space: list[Dimension]) -> dict[str, Any]:
    """All combinations."""
    settings = combinations([dimension for dimension in space if not dimension.repeats])
    runs = make(config, overrides, members(space, settings, config.target))
    return write(config, space, runs, sweep_table.variance_shares(runs), "main effects")


def _search(config: DictConfig, overrides: list[str], space: list[Dimension]) -> dict[str, Any]:
    """What Optuna chooses."""
    installed("optuna", "sweep.trials")
    from threefold.runs import sweep_search

    return sweep_search.run(config, overrides, space)


def write(
    config: DictConfig, space: list[Dimension], runs: list[dict[str, Any]], importance: dict[str, float], by: str
) -> dict[str, Any]:
    """Write sweep.json and sweep.csv from `runs`, and link the stages that all share; returns what sweep.json holds."""
    found = {
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
    found["settings"] = sweep_table.settings(runs, found["direction"])
    folder = Path(config.runs) / config.run
    for stage, fingerprint in found["made_from"].items():
        Artifact(Path(config.runs), stage, fingerprint).link_into(folder)
    write_json(folder / "sweep.json", found)
    write_text(folder / "sweep.csv", csv_text(sweep_table.lines(runs, found["metric"], found["reported"])))
    return found
