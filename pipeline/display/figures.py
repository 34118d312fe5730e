"""Figures: colours that a model keeps throughout, and the kinds of plot that the report draws with plotly.

Colours are given as those of the light scheme; the page exchanges them for those of the dark one (`page.js`).
"""

import json
from typing import Any

from plotly import graph_objects

from threefold.display.parts import Figure

# name → colour in the light scheme, and in the dark one; models first, then what else is drawn
PALETTE = {
    "human": ("#6f6962", "#b5afa4"),
    "base": ("#80640f", "#d6b45a"),
    "sft": ("#2a66ad", "#82b4f2"),
    "best": ("#7d51a6", "#c4a3e8"),
    "dpo": ("#b1540c", "#f0a267"),
    "ppo": ("#12705f", "#66cdb8"),
    "reward": ("#3c6e82", "#93c4d6"),
    "one": ("#1e665f", "#8fd2c8"),
    "other": ("#a34434", "#f0988a"),
    "ink": ("#1f1e1b", "#eae7df"),
    "quiet": ("#5f5a51", "#aaa599"),
    "line": ("#e1ddd3", "#3a3833"),
}


def colour(name: str) -> str:
    """The colour of a model, or of what else is drawn, in the light scheme; models without one are best-of-n."""
    return PALETTE.get(name, PALETTE["best"])[0]


def drawing(figure: graph_objects.Figure, x_title: str, y_title: str, **layout: Any) -> dict[str, Any]:
    """Data and layout of a figure of plotly in the manner of the page, as JSON holds them."""
    axis = {
        "gridcolor": colour("line"), "zeroline": False, "linecolor": colour("line"), "automargin": True,
        "tickfont": {"color": colour("quiet")},
        "title": {"font": {"color": colour("quiet"), "size": 12}, "standoff": 8},
    }  # fmt: skip
    manner = {
        "height": 250, "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "dragmode": False, "separators": ".,",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False,
        "font": {"color": colour("ink"), "size": 12}, "hoverlabel": {"font": {"size": 12}},
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "font": {"color": colour("quiet")}},
        "xaxis": titled(axis, x_title) | {"showgrid": False, "ticks": "outside", "tickcolor": colour("line")},
        "yaxis": titled(axis, y_title),
    }  # fmt: skip
    figure.layout.template = None  # plotly's own, which the page has no use for
    drawn = json.loads(figure.to_json(validate=False))  # checking each of these values takes a tenth of a second
    axes = {name: drawn["layout"].get(name, {}) | manner[name] for name in ("xaxis", "yaxis")}  # types and ticks stay
    return {"data": drawn["data"], "layout": drawn["layout"] | manner | axes | layout}


def titled(axis: dict[str, Any], title: str) -> dict[str, Any]:
    """An axis with its title."""
    return axis | {"title": axis["title"] | {"text": title}}


def lines(name: str, title: str, note: str, data: list[dict[str, Any]], columns: dict[str, tuple[str, str]],
          x: str = "step", y_title: str = "") -> Figure:  # fmt: skip
    """Curves over column `x` of `data`; `columns` are the others that are drawn, with their label and colour."""
    figure = graph_objects.Figure()
    for column, (label, shade) in columns.items():
        rows = [row for row in data if row.get(column) is not None]
        figure.add_scatter(
            x=[row[x] for row in rows], y=[row[column] for row in rows], mode="lines", name=label,
            line={"color": colour(shade), "width": 2}, hovertemplate="%{y:.4g}",
        )  # fmt: skip
    drawn = drawing(figure, x, y_title, showlegend=len(columns) > 1, hovermode="x unified")
    return Figure(name, title, note, drawn, data)


def intervals(name: str, title: str, note: str, data: list[dict[str, Any]], value: str, x_title: str,
              reference: float | None = None) -> Figure:  # fmt: skip
    """A mark with its interval for each row's model: columns model, `value`, `value`_low and `value`_high."""
    figure = graph_objects.Figure()
    for row in data:
        whiskers = {
            "type": "data", "symmetric": False, "thickness": 2, "width": 0, "color": colour(row["model"]),
            "array": [reach(row[f"{value}_high"], row[value])], "arrayminus": [reach(row[f"{value}_low"], row[value])],
        }  # fmt: skip
        figure.add_scatter(
            x=[row[value]], y=[row["model"]], error_x=whiskers, mode="markers", name=row["model"],
            marker={"color": colour(row["model"]), "size": 10}, hovertemplate="%{x:.4g}",
        )  # fmt: skip
    if reference is not None:
        figure.add_vline(reference, line={"color": colour("quiet"), "width": 1, "dash": "dot"})
    drawn = drawing(figure, x_title, "", height=70 + 34 * len(data))
    drawn["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category", "showgrid": False}
    drawn["layout"]["xaxis"] |= {"showgrid": True}
    return Figure(name, title, note, drawn, data)


def reach(end: float | None, value: float) -> float:
    """How far the end of an interval is from its value: a whisker, of length 0 where there is no interval."""
    return 0.0 if end is None else abs(end - value)


def gains_by_kl(name: str, title: str, note: str, data: list[dict[str, Any]], y_title: str) -> Figure:
    """Each model's score with its interval against its KL: columns model, kl, gold_mean and its ends."""
    figure = graph_objects.Figure()
    for row in data:
        up, down = (reach(row[f"gold_mean_{end}"], row["gold_mean"]) for end in ("high", "low"))
        whiskers = {"type": "data", "symmetric": False, "array": [up], "arrayminus": [down], "thickness": 2, "width": 0}
        figure.add_scatter(
            x=[row["kl"]], y=[row["gold_mean"]], error_y=whiskers | {"color": colour(row["model"])}, name=row["model"],
            mode="markers+text", text=[row["model"]], textposition="middle right", cliponaxis=False,
            textfont={"color": colour(row["model"])}, marker={"color": colour(row["model"]), "size": 10},
        )  # fmt: skip
    drawn = drawing(figure, "KL to the SFT model, nats per reply", y_title)
    far = max(row["kl"] for row in data) or 1.0
    drawn["layout"]["xaxis"] |= {"range": [-0.05 * far, 1.2 * far]}
    return Figure(name, title, note, drawn, data)


def reliability(name: str, title: str, note: str, data: list[dict[str, Any]]) -> Figure:
    """How often a model is right against how sure it is: columns confidence, accuracy, low and high."""
    whiskers = {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 0, "color": colour("reward"),
        "array": [reach(row["high"], row["accuracy"]) for row in data],
        "arrayminus": [reach(row["low"], row["accuracy"]) for row in data],
    }  # fmt: skip
    dotted = {"dash": "dot", "color": colour("quiet"), "width": 1}
    even = graph_objects.Scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", line=dotted, hoverinfo="skip")
    marks = graph_objects.Scatter(
        x=[row["confidence"] for row in data], y=[row["accuracy"] for row in data], error_y=whiskers, mode="markers",
        marker={"size": 9, "color": colour("reward")}, hovertemplate="sure %{x:.1%}, right %{y:.1%}<extra></extra>",
    )  # fmt: skip
    drawn = drawing(graph_objects.Figure([even, marks]), "confidence in the reply that it prefers", "share right")
    for axis in ("xaxis", "yaxis"):
        drawn["layout"][axis] |= {"tickformat": ".0%"}
    return Figure(name, title, note, drawn, data)


def shares(name: str, title: str, note: str, data: list[dict[str, Any]], label: str, value: str, x_title: str,
           limit: str) -> Figure:  # fmt: skip
    """Bars of shares, one for each row, with a mark at the row's limit where it has one."""
    names = [row[label] for row in data]
    above = [row[limit] is not None and row[value] > row[limit] for row in data]
    bars = graph_objects.Bar(
        x=[row[value] for row in data], y=names, orientation="h", hovertemplate="%{x:.1%}<extra></extra>",
        marker={"color": [colour("other" if is_above else "reward") for is_above in above]},
    )  # fmt: skip
    limits = graph_objects.Scatter(
        x=[row[limit] for row in data], y=names, mode="markers", hovertemplate="limit %{x:.0%}<extra></extra>",
        marker={"symbol": "line-ns-open", "size": 18, "line": {"width": 2}, "color": colour("ink")},
    )  # fmt: skip
    drawn = drawing(graph_objects.Figure([bars, limits]), x_title, "", height=60 + 26 * len(data), bargap=0.35)
    drawn["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    drawn["layout"]["xaxis"] |= {"tickformat": ".0%", "range": [0, 1.02], "showgrid": True}
    return Figure(name, title, note, drawn, data)
