"""Held-out prompts with every model's reply: searched, filtered and sorted on the page, whole without a script."""

from typing import Any

from markupsafe import Markup

from threefold.display.parts import Section
from threefold.report.names import in_order
from threefold.report.run import Run


def section(run: Run) -> Section | None:
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
    return Section("samples", title, (lead,), html=cards(run, rows))


def judges(run: Run, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The judges that scored any of these replies, with their names."""
    names = {"gold": run.evaluation["judge"], "second": run.evaluation["second_judge"], "reward_model": "reward model"}
    seen = {key for row in rows for model, scores in row.items() if model != "prompt" for key in scores}
    return {judge: name for judge, name in names.items() if judge in seen}


def cards(run: Run, rows: list[dict[str, Any]]) -> Markup:
    """The controls and a card for each prompt."""
    from threefold.report.page import template

    models = in_order({model for row in rows for model in row if model != "prompt"})
    judge_names = judges(run, rows)
    scores = [{model: {j: row[model].get(j) for j in judge_names} for model in models if model in row} for row in rows]
    return Markup(template("samples.html").render(rows=rows, models=models, judges=judge_names, scores=scores))
