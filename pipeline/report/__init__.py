"""The report of a run, read from what the run left behind: a page, Markdown, the figures' numbers, and summary.json."""

from pathlib import Path

from omegaconf import DictConfig

from threefold.display.parts import write_csv
from threefold.fileio import write_json, write_text
from threefold.report import (
    arena,
    compare,
    evaluation,
    frontier,
    models,
    page,
    seeds,
    stages,
    summary,
    sweep,
    text,
    training,
)
from threefold.report.run import configured, in_order
from threefold.report.text import print_table

__all__ = ["in_order", "print_table", "write_report"]

# what stands below the summary, in this order; each takes the run and gives its section, or None where it has no place
SECTIONS = (
    stages.section,
    compare.section,
    models.section,
    seeds.section,
    evaluation.paired_section,
    arena.section,
    frontier.section,
    sweep.section,
    evaluation.tasks_section,
    evaluation.contamination_section,
    training.reward_section,
    training.curves_section,
    page.samples_section,
    stages.environment_section,
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
    write_text(folder / "report.md", text.markdown(run, told, sections))
    if training.checked(run):
        write_text(folder / "reward_model.md", text.reward_model_markdown(run))
    write_text(folder / "report.html", page.html(run, told, sections))
    return folder
