"""The report as a page, as Markdown for a pull request, and as tables on the terminal.

The page is one HTML file that asks no host for anything: its policy lets only its own two scripts run. One of them,
plotly.js, is in it compressed; the other unpacks it where a figure is about to be seen.
"""

import base64
import functools
import gzip
import hashlib
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Template, select_autoescape
from markupsafe import Markup

from threefold.display.figures import PALETTE
from threefold.display.parts import Figure, Section, Table, print_rows, table_lines, terminal
from threefold.evaluation import checkup
from threefold.report import evaluation, models, stages, studies, summary
from threefold.report.run import Run, in_order, notices, read
from threefold.report.summary import Group


@functools.cache
def template(name: str) -> Template:
    """A template of this folder, escaping what is put into it."""
    environment: Any = Environment(loader=PackageLoader("threefold.report", "."), autoescape=select_autoescape())
    environment.globals["palette"] = PALETTE
    environment.tests["table"] = lambda part: isinstance(part, Table)
    return environment.get_template(name)


def html(run: Run, verdict: summary.Verdict, told: list[summary.Group], sections: list[Section]) -> str:
    """The page: the verdict, what is missing, the summary, and every section."""
    from plotly.offline import get_plotlyjs

    parts = [part for section in sections for part in section.content]
    figures = {part.name: part.drawing for part in parts if isinstance(part, Figure)}
    plotly, script = get_plotlyjs() if figures else "", file_text("page.js")
    return template("page.html").render(
        run=run,
        written=time.strftime("%Y-%m-%d %H:%M"),
        notices=notices(run),
        verdict=verdict,
        legend=summary.legend(run),
        judges=judges(run, [verdict.example.row]) if verdict.example else {},
        summary=told,
        cards=summary.cards(run),
        sections=sections,
        parts=parts,
        figures=figures,
        style=Markup(file_text("page.css")),
        script=Markup(script),
        plotly=Markup(packed(plotly)) if plotly else "",
        hashes=[digest(text) for text in (script, plotly) if text],
    )


def file_text(name: str) -> str:
    """The text of a file of this folder."""
    return files("threefold.report").joinpath(name).read_text()


def packed(script: str) -> str:
    """A script compressed by gzip, in base64; the same text always gives the same."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def digest(script: str) -> str:
    """A script's hash as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def samples_section(run: Run) -> Section | None:
    """The first `evaluate.samples_shown` prompts; None where the configuration asks for no evaluation."""
    if not run.asks_for("evaluate"):
        return None
    title, shown = "Replies to held-out prompts", run.evaluation.get("shown", 0)
    if not shown:
        none = "No replies are shown, as evaluate.samples_shown=0 asks."
        return Section("samples", title, (run.lacks("evaluate") or none,))
    rows = run.samples()[:shown]
    lead = (
        f"The first {len(rows)} of {run.evaluation['prompts']} prompts; all of them with every score are in "
        "evaluate/samples.jsonl of the run."
    )
    return Section("samples", title, (lead,), html=reply_cards(run, rows))


def judges(run: Run, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The judges that scored any of these replies, with their names."""
    names = {"gold": run.evaluation["judge"], "second": run.evaluation["second_judge"], "reward_model": "reward model"}
    seen = {key for row in rows for model, scores in row.items() if model != "prompt" for key in scores}
    return {judge: name for judge, name in names.items() if judge in seen}


def reply_cards(run: Run, rows: list[dict[str, Any]]) -> Markup:
    """The controls and a card for each prompt."""
    models = in_order({model for row in rows for model in row if model != "prompt"})
    judge_names = judges(run, rows)
    scores = [{model: {j: row[model].get(j) for j in judge_names} for model in models if model in row} for row in rows]
    return Markup(template("samples.html").render(rows=rows, models=models, judges=judge_names, scores=scores))


# names of tables that a pull request is to see begin with these
STUDIES = ("sweep", "frontier")  # what a report of one of these begins with
SHOWN = ("stages", "models", "seeds", "paired", "arena", "frontier", "sweep", "tasks", "compare")


def markdown(run: Run, verdict: summary.Verdict, told: list[Group], sections: list[Section]) -> str:
    """The whole of `report.md`; of the sections it takes the tables that fit a pull request."""
    lines = [f"# Run {run.name}", "", " ".join(verdict.sentences), *([f"\n**{verdict.alarm}**"] * bool(verdict.alarm))]
    lines += [f"\n{line}" for line in summary.legend(run)]
    lines += [f"\n> {notice}." for notice in notices(run)]
    tables = [part for section in sections for part in section.content if isinstance(part, Table)]
    tables = [table for table in tables if not table.folded and table.name.startswith(SHOWN)]
    of_studies = [table for table in tables if table.name.startswith(STUDIES)]
    for table in of_studies:
        lines += ["", f"## {table.title}", "", *table_lines(table)]
    for group in told:
        lines += ["", f"## {group.title}", "", *(f"- {line}" for line in group.sentences)]
    for table in (table for table in tables if table not in of_studies):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
    last = "Everything else: `report.html` beside this file, its numbers in `report/*.csv`."
    return "\n".join([*lines, "", last, ""])


def reward_model_markdown(run: Run) -> str:
    """The reward model's check-up as a page of its own, `reward_model.md`."""
    metrics = run.stages["reward"]
    lines = [f"# Reward model of run {run.name}", ""]
    lines += [f"- {line}" for line in checkup.verdict(metrics, run.config.reward.gate)]
    for table in stages.reward_tables(metrics):
        lines += ["", f"## {table.title}", "", *table_lines(table)]
    return "\n".join([*lines, ""])


def print_table(folder: Path) -> None:
    """The stages and the models of a run as tables on the terminal, and where the report is."""
    run, console = read(folder), terminal(200)
    judged = models.table(run, models.JUDGED | models.TEXT, "models", "") if run.models else None
    over_seeds = studies.seeds_section(run)
    shown = (stages.table(run), judged, evaluation.task_table(run), *(over_seeds.parts if over_seeds else ()))
    for table in shown:
        if isinstance(table, Table):
            print_rows(table.rows, console)
    for line in over_seeds.points if over_seeds else ():
        console.print(line, highlight=False)
    console.print(f"report: {folder / 'report.html'}   numbers: {folder / 'summary.json'}", highlight=False)
