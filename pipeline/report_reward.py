"""The reward model's check-up in the report: verdict, tables and the reliability plot."""

from pathlib import Path
from typing import Any

from pipeline import checkup
from pipeline.artifact import write_text
from pipeline.tracked import Table


def section(metrics: dict[str, Any], gate: Any) -> dict[str, Any]:
    """What the page shows of the metrics of stage `reward` under the limits `reward.gate`."""
    return {
        "passes": not checkup.failures(metrics, gate),
        "verdict": checkup.verdict(metrics, gate),
        "tables": tables(metrics),
        "figure": reliability(metrics["reliability"]),
    }


def tables(metrics: dict[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """Title → heading and rows: accuracy by parts of the held-out pairs, and the probes."""
    by_gap = {"accuracy_by_score_gap": "the model's score gap", "accuracy_by_gap": "the gap of the labels"}
    found = {}
    for key, said in by_gap.items():
        if key in metrics:
            rows = [(f"{row['from']:.2f} to {row['to']:.2f}", *_part(row)) for row in metrics[key]]
            found[f"Accuracy by {said}, in quarters"] = [("gap", "pairs", "accuracy", "95 % interval"), *rows]
    rows = [(row["pairs_where"], *_part(row)) for row in metrics["accuracy_by_length"]]
    found["Accuracy by length"] = [("pairs where", "pairs", "accuracy", "95 % interval"), *rows]
    rows = [
        (
            checkup.PROBE_NAMES[name],
            f"{probe['prompts']}",
            f"{probe['score_mean']:+.2f}",
            f"{probe['preferred_share']:.0%}",
        )
        for name, probe in metrics["probes"].items()
    ]
    found["Probes: replies that are no better than the chosen one"] = [
        ("probe", "prompts", "mean score", "beats the chosen reply"),
        *rows,
    ]
    return found


def _part(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['pairs']:,}", f"{row['accuracy']:.1%}", f"{row['ci95'][0]:.1%} to {row['ci95'][1]:.1%}"


def reliability(rows: list[dict[str, Any]]) -> Any:
    """The reliability plot as a figure: how often the model is right against how sure it is."""
    from plotly import graph_objects

    sure, right = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [row["ci95"][1] - row["accuracy"] for row in rows],
        "arrayminus": [row["accuracy"] - row["ci95"][0] for row in rows],
    }
    figure = graph_objects.Figure(
        [
            graph_objects.Scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", line={"dash": "dot", "color": "#888"}),
            graph_objects.Scatter(x=sure, y=right, mode="markers", error_y=bars, marker={"size": 8}),
        ]
    )
    figure.update_layout(
        title={"text": "reward: share right against confidence, held-out pairs", "font": {"size": 14}},
        showlegend=False,
        xaxis_title="confidence of the model in the reply that it prefers",
    )
    return figure


def accuracy_by_gap(metrics: dict[str, Any]) -> Any:
    """Accuracy by quarters of the score gap, and of the labels' gap where each pair has one, as a figure."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for key, said in (("accuracy_by_score_gap", "the model's score gap"), ("accuracy_by_gap", "the gap of the labels")):
        if rows := metrics.get(key):
            bars = {"type": "data", "symmetric": False}
            bars["array"] = [row["ci95"][1] - row["accuracy"] for row in rows]
            bars["arrayminus"] = [row["accuracy"] - row["ci95"][0] for row in rows]
            quarters, shares = list(range(1, len(rows) + 1)), [row["accuracy"] for row in rows]
            figure.add_bar(x=quarters, y=shares, error_y=bars, name=said)
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


def _numbers(row: dict[str, Any]) -> list[float]:
    """The numbers of a row, an interval being two of them."""
    return [number for value in row.values() for number in (value if isinstance(value, list) else [value])]


def write_verdict(file: Path, run: str, metrics: dict[str, Any], gate: Any) -> None:
    """The check-up as one page of Markdown."""
    lines = [f"# Reward model of run {run}", "", *(f"- {line}" for line in checkup.verdict(metrics, gate))]
    for title, (heading, *rows) in tables(metrics).items():
        lines += ["", f"## {title}", "", _row(heading), _row(["---"] * len(heading)), *(_row(row) for row in rows)]
    write_text(file, "\n".join(lines) + "\n")


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
