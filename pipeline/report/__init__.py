"""The report of a run, read from what the run left behind: a page, Markdown, the figures' numbers, and summary.json."""

from pathlib import Path

from omegaconf import DictConfig

from threefold.display.parts import write_csv
from threefold.fileio import write_json, write_text
from threefold.report import compare, evaluation, models, page, stages, studies, summary
from threefold.report.page import print_table
from threefold.report.run import configured, in_order

__all__ = ["in_order", "print_table", "write_report"]

# what the page has beside the summary, in this order, a sweep and a frontier before it; each takes the run and gives
# its section, or None where it has no place
SECTIONS = (
    studies.sweep_section,
    studies.frontier_section,
    stages.section,
    compare.section,
    models.section,
    studies.seeds_section,
    evaluation.paired_section,
    evaluation.arena_section,
    evaluation.tasks_section,
    evaluation.contamination_section,
    stages.reward_section,
    stages.curves_section,
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
    sections = [section for section in (make(run) for make in SECTIONS) if section is not None and not section.empty]
    told, verdict = summary.groups(run), summary.verdict(run)
    write_csv(folder / "report", sections)
    write_text(folder / "report.md", page.markdown(run, verdict, told, sections))
    if stages.checked(run):
        write_text(folder / "reward_model.md", page.reward_model_markdown(run))
    write_text(folder / "report.html", page.html(run, verdict, told, sections))
    return folder
