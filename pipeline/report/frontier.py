"""The frontier in the report: gold and reward model against the distance from the SFT model, with the fitted laws."""

from typing import Any

import numpy as np
from plotly import graph_objects

from threefold.display import figures
from threefold.display.figures import colour
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import statistics
from threefold.report.run import Run
from threefold.runs.frontier import FORMS, NAMES, current

LEAD = (
    "Best-of-n, DPO and PPO are pushed ever further from the SFT model. Where the gold judge's score falls while the "
    "reward model's still rises, the reward model is over-optimised. Lines are the laws of Gao et al. 2022, fitted to "
    "one half of the prompts, by which advice is given, with 95 % bands over prompts and seeds; points are of the "
    "other half, which had no part in a choice."
)
OLD = "frontier.json is of another SFT or reward model than this run has; to make it anew: make frontier."
SHADES = {"best_of_n": "best", "dpo": "dpo", "ppo": "ppo"}  # method → its colour
ADVICE = {"best_of_n": "d ({alpha:.3f} − {beta:.3f} d)", "rl": "d ({alpha:.3f} − {beta:.3f} log d)"}


def section(run: Run) -> Section | None:
    """What `threefold frontier` left in the run's folder; None where it was not run."""
    if not (run.folder / "frontier.json").is_file():
        return None
    frontier = current(run.folder)
    if frontier is None:
        return Section("frontier", "Frontier", (OLD,))
    lead = (LEAD, *([f"Runs that are missing: {', '.join(frontier['missing'])}."] if frontier["missing"] else []))
    titles = {
        "gold": f"Gold judge: {frontier['judges']['gold']}",
        "proxy": "The reward model",
        "second": f"Second judge: {frontier['judges']['second']}",
    }
    drawn = [figure(frontier, score, title) for score, title in titles.items()]
    return Section("frontier", "Frontier", lead, points=tuple(frontier["advice"]), parts=(*drawn, laws(frontier)))


def figure(frontier: dict[str, Any], score: str, title: str) -> Figure:
    """One score of all methods: points, law and band of each."""
    drawn, data = graph_objects.Figure(), []
    for method in dict.fromkeys(point["method"] for point in frontier["points"]):
        rows, fitted = gains(frontier["points"], method, score), frontier["laws"].get(method)
        shade = colour(SHADES[method])
        curve = law(fitted[score]["curve"], shade) if fitted else []
        for trace in (*curve, points(rows, method, shade)):
            drawn.add_trace(trace)
        data += rows
    seen = [row["gain"] for row in data]
    room = 0.1 * (max(seen) - min(seen)) or 0.1  # so a wide band around few points does not squeeze them
    note = "How far can it be pushed before it falls, and which method gets most out of a nat of KL?"
    layout = figures.drawing(
        drawn, "√KL to the SFT model, nats", "gain over the SFT model", showlegend=True, height=340
    )
    layout["layout"]["yaxis"] |= {"range": [min(seen) - room, max(seen) + room]}
    return Figure(f"frontier_{score}", title, note, layout, data)


def law(curve: dict[str, list[float]], shade: str) -> list[graph_objects.Scatter]:
    """A law's curve, below it its band as a closed shape."""
    distance = np.sqrt(curve["kl"]).tolist()
    band = graph_objects.Scatter(
        x=[*distance, *reversed(distance)], y=[*curve["high"], *reversed(curve["low"])], fill="toself",
        fillcolor=shade, opacity=0.15, line={"width": 0}, hoverinfo="skip", showlegend=False, mode="lines",
    )  # fmt: skip
    line = graph_objects.Scatter(
        x=distance, y=curve["gain"], mode="lines", line={"color": shade, "width": 2}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    return [band, line]


def points(rows: list[dict[str, Any]], method: str, shade: str) -> graph_objects.Scatter:
    """The points of one method."""
    return graph_objects.Scatter(
        x=[np.sqrt(row["kl"]) for row in rows], y=[row["gain"] for row in rows], mode="markers", name=NAMES[method],
        marker={"color": shade, "size": 7}, text=[row["setting"] for row in rows],
        hovertemplate="%{text}<br>√KL %{x:.2f}, gain %{y:.3f}<extra></extra>",
    )  # fmt: skip


def gains(measured: list[dict[str, Any]], method: str, score: str) -> list[dict[str, Any]]:
    """Method, setting, KL and gain over the SFT model of the same run, of every point of a method."""
    of_method, rows = [point for point in measured if point["method"] == method], []
    for point in of_method:
        start = next(other for other in of_method if run_of(other) == run_of(point))
        gain = point[score] - start[score]
        rows.append({"method": method, "setting": setting(point), "kl": point["kl"], "gain": gain})
    return rows


def run_of(point: dict[str, Any]) -> tuple[Any, ...]:
    """What the points of one artifact have in common; the first of them is the SFT model."""
    return tuple(point.get(key) for key in ("seed", "beta", "kl_coef"))


def setting(point: dict[str, Any]) -> str:
    """What a point was made with."""
    named = {"n": "n", "beta": "β", "kl_coef": "KL coefficient", "episodes": "episodes", "seed": "seed"}
    return ", ".join(f"{name} {point[key]:.3g}" for key, name in named.items() if key in point)


def laws(frontier: dict[str, Any]) -> Table:
    """The fitted law of the gold judge for each method, and where it peaks."""
    heading = ("method", "law of the gain in gold, d = √KL", "farthest KL", "up to there gold", "resamples that agree")
    rows, data = [], []
    for method, fitted in frontier["laws"].items():
        gold = {key: value for key, value in fitted["gold"].items() if key != "curve"}
        formula = ADVICE[FORMS[method]].format(**gold)
        rows.append((NAMES[method], formula, f"{gold['farthest_kl']:.1f}", peak(gold), f"{gold['trend_share']:.0%}"))
        data.append({"method": method, **gold})
    return Table("frontier_laws", "Laws of over-optimisation, gold judge", [heading, *rows], data, texts=2)


def peak(gold: dict[str, Any]) -> str:
    """What gold does up to the farthest point, and where it peaks, with the interval."""
    if gold["peak_kl"] is None:
        return gold["trend"]
    return f"peaks at {gold['peak_kl']:.1f} {statistics.shown(gold['peak_kl_ci95'], '.1f')}"
