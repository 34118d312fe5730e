"""The report as text: Markdown for a pull request, the reward model's verdict, and tables on the terminal."""

from pathlib import Path

from threefold.display.parts import Section, Table, markdown_lines, print_rows, terminal
from threefold.evaluation import checkup
from threefold.report import evaluation, models, seeds, stages, training
from threefold.report.run import Run, notices, read
from threefold.report.summary import Group

# names of tables that a pull request is to see begin with these
SHOWN = ("stages", "models", "seeds", "paired", "arena", "frontier", "sweep", "tasks", "compare")


def markdown(run: Run, summary: list[Group], sections: list[Section]) -> str:
    """The whole of `report.md`; of the sections it takes the tables that fit a pull request."""
    lines = [f"# Run {run.name}", *(f"\n> {notice}." for notice in notices(run))]
    for group in summary:
        lines += ["", f"## {group.title}", "", *(f"- {line}" for line in group.sentences)]
    for table in (part for section in sections for part in section.parts if isinstance(part, Table)):
        if not table.folded and table.name.startswith(SHOWN):
            lines += ["", f"## {table.title}", "", *table_lines(table)]
    last = "Everything else: `report.html` beside this file, its numbers in `report/*.csv`."
    return "\n".join([*lines, "", last, ""])


def reward_model_markdown(run: Run) -> str:
    """The reward model's check-up as a page of its own, `reward_model.md`."""
    metrics = run.stages["reward"]
    lines = [f"# Reward model of run {run.name}", ""]
    lines += [f"- {line}" for line in checkup.verdict(metrics, run.config.reward.gate)]
    for table in training.reward_tables(metrics):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
    return "\n".join([*lines, ""])


def table_lines(table: Table) -> list[str]:
    """A table as lines of Markdown; its columns of numbers are flush right."""
    rule = [":--" if place < table.texts else "--:" for place in range(len(table.rows[0]))]
    return markdown_lines(table.rows, rule)


def print_table(folder: Path) -> None:
    """The stages and the models of a run as tables on the terminal, and where the report is."""
    run, console = read(folder), terminal(200)
    judged = models.table(run, models.JUDGED | models.TEXT, "models", "") if run.models else None
    over_seeds = seeds.section(run)
    shown = (stages.table(run), judged, evaluation.task_table(run), *(over_seeds.parts if over_seeds else ()))
    for table in shown:
        if isinstance(table, Table):
            print_rows(table.rows, console)
    for line in over_seeds.points if over_seeds else ():
        console.print(line, highlight=False)
    console.print(f"report: {folder / 'report.html'}   numbers: {folder / 'summary.json'}", highlight=False)
