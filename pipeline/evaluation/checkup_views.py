"""The reward model's check-up as trackers see it: figures, and tables of what is in them and of the probes."""

from typing import Any

from plotly import graph_objects

from threefold.display import figures
from threefold.evaluation import checkup, statistics
from threefold.tracking.values import Table


def reliability(rows: list[dict[str, Any]]) -> graph_objects.Figure:
    """How often the model is right against how sure it is, on held-out pairs."""
    data = [row | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True)) for row in rows]
    return graph_objects.Figure(**figures.reliability("reliability", "", "", data).drawing)


def accuracy_by_gap(metrics: dict[str, Any]) -> Any:
    """Accuracy by quarters of the score gap, and of the labels' gap where each pair has one, as a figure."""
    figure = graph_objects.Figure()
    labels = {"accuracy_by_score_gap": "the model's score gap", "accuracy_by_gap": "the gap of the labels"}
    for key, label in labels.items():
        if rows := metrics.get(key):
            bars = {"type": "data", "symmetric": False}
            ends = [statistics.ends(row["ci95"]) for row in rows]
            bars["array"] = [figures.reach(high, row["accuracy"]) for (_, high), row in zip(ends, rows, strict=True)]
            bars["arrayminus"] = [figures.reach(low, row["accuracy"]) for (low, _), row in zip(ends, rows, strict=True)]
            quarters, shares = list(range(1, len(rows) + 1)), [row["accuracy"] for row in rows]
            figure.add_bar(x=quarters, y=shares, error_y=bars, name=label)
    title = {"text": "reward: share right by quarters of the gap, held-out pairs", "font": {"size": 14}}
    figure.update_layout(title=title, xaxis_title="quarter, from the smallest gaps to the largest")
    return figure


def views(metrics: dict[str, Any]) -> dict[str, Any]:
    """What trackers see of the check-up: both figures, and tables of what is in them and of the probes."""
    probes = [(checkup.PROBE_NAMES[name], *probe.values()) for name, probe in metrics["probes"].items()]
    heading = ("probe", "prompts", "score_mean", "below_chosen", "preferred_share")
    parts = {"accuracy_by_score_gap": "score gap", "accuracy_by_gap": "label gap"}
    quarters = [(parts[key], *_numbers(row)) for key in parts for row in metrics.get(key, ())]
    bins = [_numbers(row) for row in metrics["reliability"]]
    interval = ("pairs", "accuracy", "from", "to")
    return {
        "reliability": reliability(metrics["reliability"]),
        "accuracy_by_gap": accuracy_by_gap(metrics),
        "probes": Table(heading, probes),
        "accuracy_by_gap_table": Table(("gap", "gap_from", "gap_to", *interval), quarters),
        "reliability_table": Table(("pairs", "confidence", *interval[1:]), bins),
    }


def _numbers(row: dict[str, Any]) -> tuple[float | None, ...]:
    """The numbers of a row, an interval being two of them; neither is known where there is none."""
    spread = [statistics.ends(value) if name == "ci95" else (value,) for name, value in row.items()]
    return tuple(number for values in spread for number in values)
