"""The report as one HTML file that asks no host for anything: its policy lets only its own two scripts run."""

import base64
import functools
import hashlib
import time
from importlib.resources import files

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from markupsafe import Markup

from threefold.display.figures import PALETTE
from threefold.display.parts import Figure, Section, Table
from threefold.report import summary
from threefold.report.run import Run, notices


@functools.cache
def template(name: str) -> Template:
    """A template of this folder, escaping what is put into it."""
    environment = Environment(loader=PackageLoader("threefold.report", "."), autoescape=select_autoescape())
    environment.globals |= {"palette": PALETTE}
    environment.tests |= {"table": lambda part: isinstance(part, Table)}
    return environment.get_template(name)


def html(run: Run, told: list[summary.Group], sections: list[Section]) -> str:
    """The page: what is missing, the summary, and every section."""
    from plotly.offline import get_plotlyjs

    parts = [part for section in sections for part in section.parts]
    figures = {part.name: part.drawing for part in parts if isinstance(part, Figure)}
    scripts = [Markup(text) for text in (*([get_plotlyjs()] if figures else []), file_text("page.js"))]
    return template("page.html").render(
        run=run,
        written=time.strftime("%Y-%m-%d %H:%M"),
        notices=notices(run),
        summary=told,
        cards=summary.cards(run),
        sections=sections,
        parts=parts,
        figures=figures,
        style=Markup(file_text("page.css")),
        scripts=scripts,
        hashes=[digest(text) for text in scripts],
    )


def file_text(name: str) -> str:
    """The text of a file of this folder."""
    return files("threefold.report").joinpath(name).read_text()


def digest(script: str) -> str:
    """A script's hash as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
