"""The frontier in the report: gold and reward model against the distance from the SFT model, with the fitted laws."""

from typing import Any

import numpy as np

COLOURS = {"best_of_n": "#8a6d00", "dpo": "#1a73e8", "ppo": "#d93025"}
NAMES = {"best_of_n": "best-of-n", "dpo": "DPO", "ppo": "PPO"}


def figures(frontier: dict[str, Any]) -> list[Any]:
    """A figure for each score: its gain over the SFT model against the square root of KL, points, laws and bands."""
    titles = {
        "gold": f"gold judge ({frontier['judges']['gold']})",
        "proxy": "the reward model, which PPO is trained on",
        "second": f"second judge ({frontier['judges']['second']})",
    }
    return [figure(frontier, score, title) for score, title in titles.items()]


def figure(frontier: dict[str, Any], score: str, title: str) -> Any:
    """One score of all methods."""
    from plotly import graph_objects

    drawn = graph_objects.Figure()
    for method, laws in frontier["laws"].items():
        curve = laws[score]["curve"]
        distance = np.sqrt(curve["kl"]).tolist()
        drawn.add_trace(band(distance, curve, COLOURS[method]))
        drawn.add_trace(
            graph_objects.Scatter(
                x=distance, y=curve["gain"], mode="lines", line={"color": COLOURS[method]}, name=NAMES[method]
            )
        )
        own = gains(frontier["points"], method, score)
        drawn.add_trace(
            graph_objects.Scatter(
                x=[np.sqrt(row["kl"]) for row in own], y=[row["gain"] for row in own], mode="markers",
                marker={"color": COLOURS[method], "size": 6}, name=NAMES[method], showlegend=False,
                text=[row["setting"] for row in own], hovertemplate="%{text}<br>√KL %{x:.2f}, gain %{y:.3f}",
            )
        )  # fmt: skip
    drawn.update_layout(
        title={"text": f"frontier: gain by {title}", "font": {"size": 14}},
        xaxis_title="√KL to the SFT model, nats", yaxis_title="gain over the SFT model",
        legend={"orientation": "h", "y": -0.25},
    )  # fmt: skip
    return drawn


def band(distance: list[float], curve: dict[str, list[float]], colour: str) -> Any:
    """The 95 % band of a law as a closed shape."""
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=[*distance, *reversed(distance)], y=[*curve["high"], *reversed(curve["low"])], fill="toself",
        fillcolor=colour, opacity=0.15, line={"width": 0}, hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def gains(points: list[dict[str, Any]], method: str, score: str) -> list[dict[str, Any]]:
    """KL, gain over the SFT model of the same run, and setting of every point of a method."""
    own, found = [point for point in points if point["method"] == method], []
    for point in own:
        same = [each for each in own if run_of(each) == run_of(point)]
        found.append({"kl": point["kl"], "gain": point[score] - same[0][score], "setting": setting(point)})
    return found


def run_of(point: dict[str, Any]) -> tuple[Any, ...]:
    """What the points of one artifact have in common; the first of them is the SFT model."""
    return tuple(point.get(key) for key in ("seed", "beta", "kl_coef"))


def setting(point: dict[str, Any]) -> str:
    """What a point was made with."""
    named = {"n": "n", "beta": "β", "kl_coef": "KL coefficient", "trained": "trained", "seed": "seed"}
    return ", ".join(f"{name} {point[key]:.3g}" for key, name in named.items() if key in point)


def tables(frontier: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and a row for each method: the fitted law of the gold judge, and where it peaks."""
    heading = ("method", "law of the gain in gold, d = √KL", "farthest KL", "gold peaks at KL", "resamples with a peak")
    forms = {"best_of_n": "d ({:.3f} − {:.3f} d)", "rl": "d ({:.3f} − {:.3f} log d)"}
    rows = []
    for method, laws in frontier["laws"].items():
        law = laws["gold"]
        peak = "beyond" if law["peak_kl"] is None else f"{law['peak_kl']:.1f}"
        if law["peak_kl"] is not None and law["peak_kl_ci95"]:
            peak += " [{:.1f}, {:.1f}]".format(*law["peak_kl_ci95"])
        said = forms[law["form"]].format(law["alpha"], law["beta"])
        rows.append((NAMES[method], said, f"{law['farthest_kl']:.1f}", peak, f"{law['peak_share']:.0%}"))
    return [heading, *rows]
