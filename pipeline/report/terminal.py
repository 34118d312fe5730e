"""A run's tables on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from threefold.display.parts import Table
from threefold.report import seeds, tasks
from threefold.report.run import read
from threefold.report.tables import JUDGED, TEXT, models, stages


def print_table(folder: Path) -> None:
    """The stages and the models of a run as tables on the terminal, and where the report is."""
    run, width = read(folder), None if Console().is_terminal else 200
    console = Console(width=width, markup=False, emoji=False)  # brackets and colons in names are what they are
    tables = [stages(run)] + ([models(run, JUDGED | TEXT, "models", "")] if run.models else [])
    over_seeds = seeds.section(run)
    for table in (*tables, tasks.answers(run), *(over_seeds.parts if over_seeds else ())):
        if table is not None:
            console.print(_for_terminal(table))
    for line in over_seeds.points if over_seeds else ():
        console.print(line, highlight=False)
    console.print(f"report: {folder / 'report.html'}   numbers: {folder / 'summary.json'}", highlight=False)


def _for_terminal(table: Table) -> RichTable:
    heading, *rows = table.rows
    drawn = RichTable(*heading, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        drawn.add_row(*row)
    return drawn
