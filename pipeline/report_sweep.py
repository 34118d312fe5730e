"""The sweep as a page: its table, what it comes to, and plots by key, of importance, against KL and by trial."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pipeline import sweep_table

COLOURS = {"settings": "#1a73e8", "best": "#d93025"}
BAR = "#47798c"


def page(found: dict[str, Any]) -> str:
    """sweep.json as one HTML file, which makes no request to any host."""
    from plotly import io

    options = {"displayModeBar": False, "responsive": True}
    drawn = [
        io.to_html(figure, full_html=False, include_plotlyjs=place == 0, config=options)  # the first brings the library
        for place, figure in enumerate(figures(found))
    ]
    environment = Environment(loader=PackageLoader("pipeline", "."), autoescape=select_autoescape())
    return environment.get_template("report_sweep.html").render(
        run=found["run"],
        written=time.strftime("%Y-%m-%d %H:%M"),
        sentences=sweep_table.sentences(found),
        failures=sweep_table.failures(found),
        table=sweep_table.table(found),
        figures=drawn,
    )


def figures(found: dict[str, Any]) -> list[Any]:
    """Figures of plotly: the metric by each key, importance, metric against KL, and the best so far by trial."""
    if not any(row["mean"] is not None for row in found["settings"]):
        return []
    drawn = [by_key(found, key) for key in found["keys"]]
    if found["importance"]:
        drawn.append(importance(found))
    if any(row["kl"] is not None for row in found["settings"]):
        drawn.append(by_kl(found))
    if found["search"]:
        drawn.append(course(found))
    return [_styled(figure) for figure in drawn]


def by_key(found: dict[str, Any], key: str) -> Any:
    """The metric of every setting against its value of one key, with its spread over seeds."""
    figure = _figure(f"{found['metric']} by {key}", key, found["metric"])
    for name, rows in _kinds(found):
        figure.add_scatter(
            x=[row["setting"][key] for row in rows], y=[row["mean"] for row in rows], mode="markers", name=name,
            error_y={"array": [row["std"] or 0 for row in rows], "thickness": 1}, marker=_marker(name),
            text=[sweep_table.setting(row["setting"]) for row in rows], hovertemplate="%{text}<br>%{y:.4g}",
        )  # fmt: skip
    numbers = all(isinstance(row["setting"][key], int | float) for row in found["settings"])
    figure.update_xaxes(type="log" if key in found["log_keys"] else "linear" if numbers else "category")
    return figure


def importance(found: dict[str, Any]) -> Any:
    """The share of the metric's variance that each key has."""
    figure = _figure(f"share of the variance of {found['metric']} ({found['importance_by']})", "share", "")
    shares = found["importance"]
    figure.add_bar(x=list(shares.values()), y=list(shares), orientation="h", marker={"color": BAR}, showlegend=False)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickformat=".0%")
    return figure


def by_kl(found: dict[str, Any]) -> Any:
    """The metric of every setting against its KL, and the front of those that no other beats in both."""
    figure = _figure(f"{found['metric']} against KL", f"{found['kl_metric']}, nats per reply", found["metric"])
    for name, rows in _kinds(found):
        known = [row for row in rows if row["kl"] is not None]
        figure.add_scatter(
            x=[row["kl"] for row in known], y=[row["mean"] for row in known], mode="markers", name=name,
            error_y={"array": [row["std"] or 0 for row in known], "thickness": 1}, marker=_marker(name),
            text=[sweep_table.setting(row["setting"]) for row in known],
            hovertemplate="%{text}<br>KL %{x:.3g}, %{y:.4g}",
        )  # fmt: skip
    front = sorted((row["kl"], row["mean"]) for row in found["settings"] if row["front"])
    figure.add_scatter(
        x=[kl for kl, _ in front], y=[mean for _, mean in front], mode="lines", name="front",
        line={"color": COLOURS["settings"], "dash": "dot", "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    return figure


def course(found: dict[str, Any]) -> Any:
    """The metric of every trial, and the best so far."""
    figure = _figure("course of the search", "trial", found["metric"])
    for name, rows in _kinds(found):
        figure.add_scatter(
            x=[row["trial"] for row in rows], y=[row["mean"] for row in rows], mode="markers", name=name,
            marker=_marker(name), text=[sweep_table.setting(row["setting"]) for row in rows],
            hovertemplate="trial %{x}: %{text}<br>%{y:.4g}",
        )  # fmt: skip
    made = sorted((row["trial"], row["mean"]) for row in found["settings"] if row["mean"] is not None)
    better = max if found["direction"] == "maximize" else min
    figure.add_scatter(
        x=[trial for trial, _ in made], y=list(itertools.accumulate((mean for _, mean in made), better)), mode="lines",
        name="best so far", line={"color": COLOURS["settings"], "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    return figure


def _kinds(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Settings with a value: the best, and the others."""
    made = [row for row in found["settings"] if row["mean"] is not None]
    for name, best in (("settings", False), ("best", True)):
        if rows := [row for row in made if row["best"] == best]:
            yield name, rows


def _marker(name: str) -> dict[str, Any]:
    return {"color": COLOURS[name], "size": 9 if name == "best" else 7}


def _figure(title: str, x: str, y: str) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    return figure.update_layout(title={"text": title, "font": {"size": 14}}, xaxis_title=x, yaxis_title=y)


def _styled(figure: Any) -> Any:
    """In colours that suit the page in its light and its dark form."""
    figure.update_layout(
        height=320, margin={"l": 60, "r": 15, "t": 40, "b": 40}, legend={"orientation": "h", "y": -0.25},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": "#888"},
    )  # fmt: skip
    return figure.update_xaxes(gridcolor="#8883").update_yaxes(gridcolor="#8883")
