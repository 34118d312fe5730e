"""The runs of a sweep: their folders, making them, and the files of the sweep."""

import hashlib
import itertools
import math
import re
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

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

LONGEST = 180  # characters of a folder's name; file systems take 255 bytes


def of_grid(space: list[Dimension], target: str | None) -> dict[Variant, dict[str, Any]]:
    """Every run of all combinations of values, for each method of its own keys."""
    wanted: dict[Variant, dict[str, Any]] = {}
    for part in by_method(space):
        settings = combinations([dimension for dimension in part if not dimension.repeats])
        wanted |= variants_of(part, settings, target)
    return wanted


def composed(config: DictConfig, overrides: list[str], space: list[Dimension]) -> list[Member]:
    """Every run of a grid, composed; raises `UserError` for a search, whose runs follow from results."""
    if config.sweep.trials is not None:
        raise UserError("sweep.trials: a search waits for results; give it to `threefold sweep` with launcher=slurm")
    return [variant.member(config, overrides) for variant in of_grid(space, config.target)]


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
