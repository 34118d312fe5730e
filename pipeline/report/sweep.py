"""The sweep in the report: its table, what it comes to, and plots by key, of importance, against KL and by trial."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from plotly import graph_objects

from threefold.display import figures
from threefold.display.figures import colour
from threefold.display.parts import Figure, Section, Table
from threefold.report.run import Run
from threefold.runs import sweep_table

OLD = "sweep.json was made from other stages than this run has; to make it anew, give the sweep's command again."
SHADES = {"settings": "reward", "best": "other"}  # what is drawn → its colour

Sweep = dict[str, Any]  # the content of sweep.json


def section(run: Run) -> Section | None:
    """What `threefold sweep` left in the run's folder; None where there was none."""
    if not (run.folder / "sweep.json").is_file():
        return None
    sweep = sweep_table.current(run.folder)
    if sweep is None:
        return Section("sweep", "Sweep", (OLD,))
    points = (*sweep_table.sentences(sweep), *sweep_table.failures(sweep))
    return Section("sweep", "Sweep", points=points, parts=(settings(sweep), *drawn(sweep)))


def settings(sweep: Sweep) -> Table:
    """A row for each setting, the best first."""
    rows, places = sweep_table.table(sweep), ("trial", "state", "made", "mean", "std", "kl")
    data = [row["setting"] | {place: row[place] for place in places if place in row} for row in sweep["settings"]]
    return Table("sweep", f"Settings by {sweep['metric']}", rows, data, texts=0)


def drawn(sweep: Sweep) -> list[Figure]:
    """The figures that the sweep has numbers for."""
    if not any(made(sweep)):
        return []
    drawings = [by_key(sweep, key) for key in sweep["keys"]]
    if sweep["importance"]:
        drawings.append(importance(sweep))
    if any(row["kl"] is not None for row in made(sweep)):
        drawings.append(by_kl(sweep))
    return [*drawings, *([course(sweep)] if sweep["search"] else [])]


def by_key(sweep: Sweep, key: str) -> Figure:
    """The metric of every setting against its value of one key, with its spread over seeds."""
    figure = marks(made(sweep), lambda row: row["setting"][key])
    numbers = all(type(row["setting"][key]) in (int, float) for row in made(sweep))
    if key in sweep["log_keys"]:
        ticks = log_ticks([row["setting"][key] for row in made(sweep)])
        figure.update_xaxes(type="log", tickmode="array", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    else:
        figure.update_xaxes(type="linear" if numbers else "category")
    layout = figures.drawing(figure, key, sweep["metric"], showlegend=True)
    data = [{key: row["setting"][key], "mean": row["mean"], "std": row["std"]} for row in made(sweep)]
    note = "Which values do well, whatever the other keys are? Whiskers are standard deviations over seeds."
    return Figure(f"sweep_by_{key.replace('/', '_')}", f"By {key}", note, layout, data)


def log_ticks(values: list[float]) -> list[float]:
    """Round numbers around `values` for a logarithmic axis: 1, 2, 5 times powers of ten; of many powers these alone."""
    exponents = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [step * 10.0**exponent for exponent in exponents for step in ((1, 2, 5) if len(exponents) < 5 else (1,))]


def importance(sweep: Sweep) -> Figure:
    """The share of the metric's variance that each key has."""
    shares = sweep["importance"]
    bars = graph_objects.Bar(
        x=list(shares.values()), y=list(shares), orientation="h", marker={"color": colour("reward")},
        hovertemplate="%{x:.1%}<extra></extra>",
    )  # fmt: skip
    layout = figures.drawing(graph_objects.Figure(bars), "share of the variance", "", height=70 + 30 * len(shares))
    layout["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["layout"]["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero", "showgrid": True}
    data = [{"key": key, "share": share} for key, share in shares.items()]
    note = f"Which keys matter ({sweep['importance_by']})?"
    return Figure("sweep_importance", "Importance", note, layout, data)


def by_kl(sweep: Sweep) -> Figure:
    """The metric of every setting against its KL, and the front of those that no other beats in both."""
    rows = [row for row in made(sweep) if row["kl"] is not None]
    figure = marks(rows, lambda row: row["kl"])
    front = sorted((row["kl"], row["mean"]) for row in rows if row["front"])
    figure.add_scatter(
        x=[kl for kl, _ in front], y=[mean for _, mean in front], mode="lines", name="front", hoverinfo="skip",
        line={"color": colour("quiet"), "dash": "dot", "shape": "hv"},
    )  # fmt: skip
    layout = figures.drawing(figure, f"{sweep['kl_metric']}, nats per reply", sweep["metric"], showlegend=True)
    data = [row["setting"] | {name: row[name] for name in ("kl", "mean", "front")} for row in rows]
    note = "What does a nat of KL buy? No setting beats those on the front in both."
    return Figure("sweep_by_kl", "Metric against KL", note, layout, data)


def course(sweep: Sweep) -> Figure:
    """The metric of every trial, and the best so far."""
    figure = marks(made(sweep), lambda row: row["trial"])
    means = sorted((row["trial"], row["mean"]) for row in made(sweep))
    better = max if sweep["direction"] == "maximize" else min
    figure.add_scatter(
        x=[trial for trial, _ in means], y=list(itertools.accumulate((mean for _, mean in means), better)),
        mode="lines", name="best so far", line={"color": colour("quiet"), "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    layout = figures.drawing(figure, "trial", sweep["metric"], showlegend=True)
    data = [{"trial": trial, "mean": mean} for trial, mean in means]
    return Figure("sweep_course", "Course of the search", "Would more trials help?", layout, data)


def marks(rows: list[dict[str, Any]], place: Any) -> graph_objects.Figure:
    """A mark for each of `rows` at `place(row)` and its mean, the best in a colour of its own."""
    figure = graph_objects.Figure()
    for name, some in kinds(rows):
        whiskers = {"array": [row["std"] or 0 for row in some], "thickness": 1, "width": 0}
        figure.add_scatter(
            x=[place(row) for row in some], y=[row["mean"] for row in some], mode="markers", name=name,
            error_y=whiskers, marker={"color": colour(SHADES[name]), "size": 9},
            text=[sweep_table.setting(row["setting"]) for row in some], hovertemplate="%{text}<br>%{y:.4g}",
        )  # fmt: skip
    return figure


def kinds(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The best of `rows`, and the others."""
    for name, best in (("settings", False), ("best", True)):
        if some := [row for row in rows if row["best"] == best]:
            yield name, some


def made(sweep: Sweep) -> list[dict[str, Any]]:
    """Settings that have a value."""
    return [row for row in sweep["settings"] if row["mean"] is not None]
