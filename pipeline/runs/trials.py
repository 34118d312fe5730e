"""The runs of a sweep: their folders, making them, what each came to, and the files of the sweep."""

import hashlib
import itertools
import math
import re
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from threefold.artifacts.artifact import Artifact
from threefold.display.parts import csv_text
from threefold.errors import UserError, nearest
from threefold.fileio import read_json, write_json, write_text
from threefold.runs import seeds, sweep_table, variants
from threefold.runs.sweep_space import (
    Dimension,
    combinations,
    direction,
    kl_metric,
    metric,
    objective,
    spelt,
    stage_wanted,
)
from threefold.runs.variants import Variant

LONGEST = 180  # characters of a folder's name; file systems take 255 bytes


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
    overrides = spelt(values)
    return Variant(f"variants/{folder_name(','.join(overrides))}", tuple(overrides), target)


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
    folder, kl = Path(config.runs) / name, kl_metric(config)
    value = cast(float, measured(folder, objective(config)))
    if not math.isfinite(value):
        return row | {"state": "failed", "reason": f"{objective(config)} is {value}"}
    reported = measured(folder, metric(config)) if objective(config) != metric(config) else None
    return row | {
        "value": value,
        "reported": reported,
        "kl": measured(folder, kl, config.sweep.kl is not None) if kl else None,
    }


def measured(folder: Path, name: str, needed: bool = True) -> float | None:
    """The number STAGE.METRIC of a run. Without it: None, or `UserError` if it is `needed`."""
    stage, _, key = name.partition(".")
    file = folder / stage / "metrics.json"
    numbers = seeds.numbers(read_json(file))
    if key not in numbers and needed:
        raise UserError(f"{name}: is not among the numbers of {file}{nearest(key, numbers)}")
    return numbers.get(key)


def write(
    config: DictConfig, space: list[Dimension], runs: list[dict[str, Any]], importance: dict[str, float], by: str
) -> dict[str, Any]:
    """Write sweep.json and sweep.csv from `runs`, and link the stages that all share; returns what sweep.json holds."""
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
    folder = Path(config.runs) / config.run
    for stage, fingerprint in results["made_from"].items():
        Artifact(Path(config.runs), stage, fingerprint).link_into(folder)
    write_json(folder / "sweep.json", results)
    write_text(folder / "sweep.csv", csv_text(sweep_table.lines(runs, results["metric"], results["reported"])))
    return results
