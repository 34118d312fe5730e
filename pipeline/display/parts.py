"""What a report is made of: sections of sentences, tables and figures; page, Markdown and CSV are made from these."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from threefold.fileio import write_text


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
    """A heading of the report with what stands below it, in this order."""

    name: str  # its anchor on the page
    title: str
    lead: tuple[str, ...] = ()  # paragraphs
    verdict: tuple[bool, str] | None = None  # whether it is good, and the sentence
    points: tuple[str, ...] = ()
    html: Markup | None = None
    parts: tuple[Table | Figure, ...] = ()


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
    files = {folder / f"{part.name}.csv": part.data for section in sections for part in section.parts}
    for file, data in files.items():
        write_text(file, csv_text(data))
    for file in set(folder.glob("*.csv")) - files.keys():
        file.unlink()
