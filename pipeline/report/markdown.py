"""The report as Markdown for a pull request: what is missing, the summary, stages, models and arena standings."""

from threefold.display.parts import Section, Table
from threefold.evaluation import checkup
from threefold.report import reward
from threefold.report.run import Run, notices
from threefold.report.summary import Group

# names of tables that a pull request is to see begin with these
SHOWN = ("stages", "models", "seeds", "paired", "arena", "frontier", "sweep", "tasks", "compare")


def text(run: Run, summary: list[Group], sections: list[Section]) -> str:
    """The whole of `report.md`; of the sections it takes the tables that fit a pull request."""
    lines = [f"# Run {run.name}", *(f"\n> {notice}." for notice in notices(run))]
    for group in summary:
        lines += ["", f"## {group.title}", "", *(f"- {line}" for line in group.sentences)]
    for table in (part for section in sections for part in section.parts if isinstance(part, Table)):
        if not table.folded and table.name.startswith(SHOWN):
            lines += ["", f"## {table.title}", "", *table_lines(table)]
    last = "Everything else: `report.html` beside this file, its numbers in `report/*.csv`."
    return "\n".join([*lines, "", last, ""])


def verdict(run: Run) -> str:
    """The reward model's check-up as a page of its own, `reward_model.md`."""
    metrics = run.stages["reward"]
    lines = [f"# Reward model of run {run.name}", ""]
    lines += [f"- {line}" for line in checkup.verdict(metrics, run.config.reward.gate)]
    for table in reward.tables(metrics):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
    return "\n".join([*lines, ""])


def table_lines(table: Table) -> list[str]:
    """A table as lines of Markdown; cells that would end a column or a row are escaped."""
    heading, *rows = table.rows
    rule = [":--" if place < table.texts else "--:" for place in range(len(heading))]
    return [_row(heading), f"| {' | '.join(rule)} |", *map(_row, rows)]


def _row(cells: tuple[str, ...]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"
