"""Several seeds in the report: mean and spread of every stage's and model's numbers, and what the seeds can tell."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.report.models import JUDGED, TEXT
from threefold.report.run import Run
from threefold.runs import seeds
from threefold.stages import STAGES

LEAD = (
    "Numbers are mean ± standard deviation over {count} seeds ({key}); differences between models are paired by seed."
)


def section(run: Run) -> Section | None:
    """What `seeds=N` left in the run's folder; None where it was not asked for, or stages were made anew since."""
    over_seeds = seeds.current(run.folder)
    if over_seeds is None:
        return None
    lead = LEAD.format(count=len(over_seeds["seeds"]), key=over_seeds["key"])
    parts = tuple(table for table in (stages(over_seeds), models(run, over_seeds)) if table)
    return Section("seeds", "Several seeds", (lead,), points=tuple(seeds.claims(over_seeds)), parts=parts)


def stages(over_seeds: dict[str, Any]) -> Table:
    """The main metric of every stage that the seed reaches; its data are all metrics."""
    rows = [("stage", "metric", "mean ± standard deviation", "values")]
    data = []
    for stage, metrics in over_seeds["metrics"].items():
        if main := metrics.get(STAGES[stage].metric):
            values = ", ".join(f"{value:.4g}" for value in main["values"])
            rows.append((stage, STAGES[stage].metric, f"{main['mean']:.4g} ± {main['std']:.2g}", values))
        data += [
            {"stage": stage, "metric": name, **numbers(metric, over_seeds["seeds"])} for name, metric in metrics.items()
        ]
    return Table("seeds", "Stages over seeds", rows, data, texts=2)


def numbers(metric: dict[str, Any], values: list[int]) -> dict[str, float]:
    """Mean, spread and the value of each seed."""
    by_seed = {f"seed_{seed}": value for seed, value in zip(values, metric["values"], strict=True)}
    return {"mean": metric["mean"], "std": metric["std"], **by_seed}


def models(run: Run, over_seeds: dict[str, Any]) -> Table | None:
    """The report's columns of every model, each with its spread; None where the seed does not reach the evaluation."""
    metrics, columns = over_seeds["metrics"].get("evaluate", {}), JUDGED | TEXT
    ends = {key: f".{key}" for key in columns}
    names = list(
        dict.fromkeys(
            name.removeprefix("models.").removesuffix(end)
            for name in metrics
            for end in ends.values()
            if name.startswith("models.") and name.endswith(end)
        )
    )
    if not names:
        return None
    shown = {key: label for key, label in columns.items() if any(f"models.{name}.{key}" in metrics for name in names)}
    rows = [("model", *(label.format(**run.evaluation) for label, _ in shown.values()))]
    for name in names:
        rows.append((name, *(_cell(metrics.get(f"models.{name}.{key}"), form) for key, (_, form) in shown.items())))
    data = [
        {"model": name, "metric": key, **numbers(metrics[f"models.{name}.{key}"], over_seeds["seeds"])}
        for name in names
        for key in shown
        if f"models.{name}.{key}" in metrics
    ]
    return Table("seeds_models", "Models over seeds", rows, data, models=True)


def _cell(metric: dict[str, Any] | None, form: str) -> str:
    return "–" if metric is None else f"{metric['mean']:{form}} ± {metric['std']:{form.lstrip('+')}}"
