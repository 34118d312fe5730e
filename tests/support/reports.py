"""Runs to report on: copies of the smoke run without weights, which a test may change."""

import json
import shutil
from pathlib import Path

from helpers import composed
from omegaconf import OmegaConf

from threefold.fileio import read_lines, write_lines
from threefold.report import write_report


def copy_of(smoke: Path, runs: Path) -> Path:
    """The smoke run and its artifacts below `runs`, whose name is returned."""
    run = runs / "smoke"
    run.mkdir(parents=True)
    for link in (link for link in (smoke / "smoke").iterdir() if link.is_symlink()):
        folder = runs / "artifacts" / link.resolve().name
        shutil.copytree(link.resolve(), folder, ignore=shutil.ignore_patterns("*.safetensors", "critic", "members"))
        (run / link.name).symlink_to(f"../artifacts/{folder.name}")
    return runs


def configuration(runs: Path, *overrides: str, run: str = "smoke"):
    """The smoke configuration of a run below `runs`, with values of dotted keys."""
    config = composed(*overrides)
    OmegaConf.set_readonly(config, False)
    config.runs, config.run = str(runs), run
    return config


def write(runs: Path, *overrides: str, run: str = "smoke", compare: str | None = None) -> tuple[str, str]:
    """Write the report and return its page and its Markdown."""
    write_report(configuration(runs, *overrides, run=run), compare)
    return (runs / run / "report.html").read_text(), (runs / run / "report.md").read_text()


def change_metrics(runs: Path, stage: str, **values) -> None:
    """Put other values into a finished stage's metrics."""
    file = runs / "smoke" / stage / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_samples(runs: Path, change) -> None:
    """Apply `change` to every row of the evaluation's samples."""
    file = runs / "smoke/evaluate/samples.jsonl"
    rows = read_lines(file)
    for row in rows:
        change(row)
    write_lines(file, rows)
