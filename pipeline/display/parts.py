"""What a report is made of: sections, tables and figures; tables as Markdown, as CSV and on the terminal."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from threefold.fileio import write_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """A table as it is read (`rows`, the heading first) and as numbers (`data`, a dictionary for each row)."""

    name: str  # of its CSV file
    title: str
    rows: list[tuple[str, ...]]
    data: list[dict[str, Any]]
    note: str = ""
    texts: int = 1  # leading columns that hold words; the others hold numbers
    models: bool = False  # whether the first column names models, which have colours
    shares: bool = False  # whether its percentages are shaded
    folded: bool = False  # whether it is shown only when opened


@dataclass(frozen=True)
class Figure:
    """A plot: `drawing` is plotly's data and layout, `data` the numbers that it shows, a dictionary for each row."""

    name: str  # of its CSV file
    title: str
    note: str  # which question it answers
    drawing: dict[str, Any]
    data: list[dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """A heading of the report with what stands below it, in this order; `folded` is shown when it is opened."""

    name: str  # its anchor on the page
    title: str
    lead: tuple[str, ...] = ()  # paragraphs
    verdict: tuple[bool, str] | None = None  # whether it is good, and the sentence
    points: tuple[str, ...] = ()
    html: Markup | None = None
    parts: tuple[Table | Figure, ...] = ()
    fold: str = ""  # what the line to open says; `html` then is what is shown first
    legend: str = ""  # how to read what is folded
    folded: tuple[Table | Figure, ...] = ()

    @property
    def content(self) -> tuple[Table | Figure, ...]:
        """All tables and figures, shown at once or not."""
        return self.parts + self.folded

    @property
    def empty(self) -> bool:
        """Whether there is a heading alone."""
        return not (self.lead or self.verdict or self.points or self.html or self.content)


def terminal(width: int = 160) -> "Console":
    """The terminal, `width` columns wide where the output goes to a file; names with brackets or colons stay as is."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else width, markup=False, emoji=False)


def print_rows(rows: Sequence[Sequence[str]], console: "Console | None" = None) -> None:
    """Print a table, its heading first, on `console` or the terminal."""
    from rich.table import Table as Columns

    heading, *others = rows
    columns = Columns(*heading, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in others:
        columns.add_row(*row)
    (console or terminal()).print(columns)


def markdown_lines(rows: Sequence[Iterable[str]], rule: Iterable[str], line_break: str = " ") -> list[str]:
    """A table as lines of Markdown, its heading first; `rule` aligns its columns.

    A cell stays one cell: bars and backslashes are escaped, and `line_break` stands for the end of a line.
    """
    heading, *others = (_markdown_row(row, line_break) for row in rows)
    return [heading, f"| {' | '.join(rule)} |", *others]


def _markdown_row(cells: Iterable[str], line_break: str) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", line_break) for cell in cells)
    return f"| {' | '.join(escaped)} |"


def markdown(table: Table) -> str:
    """A table in Markdown below its title, with its note."""
    rule = [*["---"] * table.texts, *["---:"] * (len(table.rows[0]) - table.texts)]
    return "\n".join(
        [f"## {table.title}", "", *markdown_lines(table.rows, rule), *(["", table.note] if table.note else [])]
    )


def latex(table: Table) -> str:
    """A table in LaTeX, for the packages booktabs and graphicx, with its title and note as the caption."""
    from pandas import DataFrame

    heading, *rows = ([_latex_text(cell) for cell in row] for row in table.rows)
    styled = DataFrame(rows, columns=heading).style.hide(axis="index")
    columns = "l" * table.texts + "r" * (len(heading) - table.texts)
    body = styled.to_latex(hrules=True, column_format=columns).rstrip()
    caption = _latex_text(" ".join(filter(None, (f"{table.title}.", table.note))))
    return LATEX.format(body=body, caption=caption, label=table.name)


LATEX = """\
\\begin{{table}}
\\centering
\\caption{{{caption}}}
\\label{{tab:{label}}}
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
{body}
}}
\\end{{table}}
"""
# signs that LaTeX takes for its own, and those that older ones do not know
SIGNS = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "≤": r"$\le$", "–": "--",
    "…": r"\dots{}", "[": "{[}", "*": "{*}",  # at the beginning of a row these would belong to the end of the last
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(SIGNS.get(sign, sign) for sign in " ".join(text.split()))


def csv_text(data: list[dict[str, Any]]) -> str:
    """Rows as CSV; columns are the union of their keys in the order that they first occur, what is missing is empty."""
    columns = list(dict.fromkeys(key for row in data for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return text.getvalue()


def write_csv(folder: Path, sections: list[Section]) -> None:
    """Write `folder`/NAME.csv for every table and figure, and remove those of an earlier report."""
    folder.mkdir(exist_ok=True)
    files = {folder / f"{part.name}.csv": part.data for section in sections for part in section.content}
    for file, data in files.items():
        write_text(file, csv_text(data))
    for file in set(folder.glob("*.csv")) - files.keys():
        file.unlink()
