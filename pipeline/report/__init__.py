"""The report of a run, read from what the run left behind: a page, Markdown, the figures' numbers, and summary.json."""

from pathlib import Path

from omegaconf import DictConfig

from threefold.display.parts import write_csv
from threefold.fileio import write_json, write_text
from threefold.report import (
    arena,
    compare,
    contamination,
    curves,
    effects,
    environment,
    frontier,
    lineage,
    markdown,
    models,
    page,
    reward,
    samples,
    seeds,
    summary,
    sweep,
    tasks,
)
from threefold.report.names import in_order
from threefold.report.run import configured
from threefold.report.terminal import print_table

__all__ = ["in_order", "print_table", "write_report"]

# what stands below the summary, in this order; each takes the run and gives its section, or None where it has no place
SECTIONS = (
    lineage.section,
    compare.section,
    models.section,
    seeds.section,
    effects.section,
    arena.section,
    frontier.section,
    sweep.section,
    tasks.section,
    contamination.section,
    reward.section,
    curves.section,
    samples.section,
    environment.section,
)


def write_report(config: DictConfig, compare: str | None = None) -> Path:
    """Write the report of the configured run, beside the run `compare` where one is named, and return the run's folder.

    Raises `UserError` where either run has no finished stage. A run that is not whole gives a report that says so.
    """
    run = configured(config, compare)
    folder = run.folder
    write_json(folder / "summary.json", {"run": run.name} | run.stages | {"outdated": run.outdated})
    sections = [section for section in (make(run) for make in SECTIONS) if section is not None]
    told = summary.groups(run)
    write_csv(folder / "report", sections)
    write_text(folder / "report.md", markdown.text(run, told, sections))
    if reward.checked(run):
        write_text(folder / "reward_model.md", markdown.verdict(run))
    write_text(folder / "report.html", page.html(run, told, sections))
    return folder
