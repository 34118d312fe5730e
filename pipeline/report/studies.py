"""The sections of several runs together: a sweep, the frontier, seeds."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from plotly import graph_objects

from threefold.display import figures
from threefold.display.figures import colour
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import statistics
from threefold.report.models import JUDGED, TEXT
from threefold.report.run import Run
from threefold.runs import seeds, sweep_table
from threefold.runs.frontier import FORMS, NAMES, current
from threefold.stages import STAGES

OLD_SWEEP = "sweep.json was made from other stages than this run has; to make it anew, give the sweep's command again."
SWEEP_SHADES = {"settings": "reward", "best": "other"}  # what is drawn → its colour

Sweep = dict[str, Any]  # the content of sweep.json


def sweep_section(run: Run) -> Section | None:
    """What `threefold sweep` left in the run's folder; None where there was none."""
    if not (run.folder / "sweep.json").is_file():
        return None
    sweep = sweep_table.current(run.folder)
    if sweep is None:
        return Section("sweep", "Sweep", (OLD_SWEEP,))
    points = (*sweep_table.sentences(sweep), *sweep_table.failures(sweep))
    return Section("sweep", "Sweep", points=points, parts=(*sweep_table.tables(sweep), *drawn(sweep)))


def drawn(sweep: Sweep) -> list[Figure]:
    """The figures that the sweep has numbers for."""
    if not any(made(sweep)):
        return []
    drawings = [by_key(sweep, key) for key in sweep["keys"] if any(key in row["setting"] for row in made(sweep))]
    if sweep["importance"]:
        drawings.append(importance(sweep))
    if any(row["kl"] is not None for row in made(sweep)):
        drawings.append(by_kl(sweep))
    return [*drawings, *([course(sweep)] if sweep["search"] else [])]


def by_key(sweep: Sweep, key: str) -> Figure:
    """The metric of every setting that has the key against its value, with its spread over seeds."""
    rows = [row for row in made(sweep) if key in row["setting"]]
    figure = marks(rows, lambda row: row["setting"][key])
    numbers = all(type(row["setting"][key]) in (int, float) for row in rows)
    if key in sweep["log_keys"]:
        ticks = log_ticks([row["setting"][key] for row in rows])
        figure.update_xaxes(type="log", tickmode="array", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    else:
        figure.update_xaxes(type="linear" if numbers else "category")
    layout = figures.drawing(figure, key, sweep["metric"], showlegend=True)
    data = [{key: row["setting"][key], "mean": row["mean"], "std": row["std"]} for row in rows]
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
            error_y=whiskers, marker={"color": colour(SWEEP_SHADES[name]), "size": 9},
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


FRONTIER_LEAD = (
    "Best-of-n, DPO and PPO are pushed ever further from the SFT model. Where the gold judge's score falls while the "
    "reward model's still rises, the reward model is over-optimised. Lines are the laws of Gao et al. 2022, fitted to "
    "one half of the prompts, by which advice is given, with 95 % bands over prompts and seeds; points are of the "
    "other half, which had no part in a choice."
)
OLD_FRONTIER = "frontier.json is of another SFT or reward model than this run has; to make it anew: make frontier."
FRONTIER_SHADES = {"best_of_n": "best", "dpo": "dpo", "ppo": "ppo"}  # method → its colour
ADVICE = {"best_of_n": "d ({alpha:.3f} − {beta:.3f} d)", "rl": "d ({alpha:.3f} − {beta:.3f} log d)"}


def frontier_section(run: Run) -> Section | None:
    """What `threefold frontier` left in the run's folder; None where it was not run."""
    if not (run.folder / "frontier.json").is_file():
        return None
    frontier = current(run.folder)
    if frontier is None:
        return Section("frontier", "Frontier", (OLD_FRONTIER,))
    lead = (
        FRONTIER_LEAD,
        *([f"Runs that are missing: {', '.join(frontier['missing'])}."] if frontier["missing"] else []),
    )
    titles = {
        "gold": f"Gold judge: {frontier['judges']['gold']}",
        "proxy": "The reward model",
        "second": f"Second judge: {frontier['judges']['second']}",
    }
    drawn = [frontier_figure(frontier, score, title) for score, title in titles.items()]
    parts = (measured(frontier), laws(frontier), *drawn)
    told = tuple(frontier["advice"]) if run.evaluation else ()  # otherwise the report begins with it
    return Section("frontier", "Frontier", lead, points=told, parts=parts)


def measured(frontier: dict[str, Any]) -> Table:
    """A row for each method and setting with KL and all scores, mean ± standard deviation over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in frontier["points"]:
        words = setting({key: value for key, value in point.items() if key != "seed"})
        groups.setdefault((point["method"], words), []).append(point)
    forms = {"kl": ".2f", "gold": ".3f", "second": ".3f", "proxy": "+.2f"}
    rows, data = [], []
    for (method, words), some in groups.items():
        spread = {key: (np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None)
                  for key in forms for values in [[point[key] for point in some]]}  # fmt: skip
        cells = [
            f"{mean:{form}}" + ("" if std is None else f" ± {std:{form.lstrip('+')}}")
            for form, (mean, std) in zip(forms.values(), spread.values(), strict=True)
        ]
        rows.append((NAMES[method], words, *cells))
        stds = {f"{key}_std": None if std is None else float(std) for key, (_, std) in spread.items()}
        data.append({"method": method, "setting": words} | {k: float(mean) for k, (mean, _) in spread.items()} | stds)
    judges = frontier["judges"]
    heading = ("method", "setting", "KL, nats per reply", f"gold: {judges['gold']}", f"second: {judges['second']}")
    note = "Mean ± standard deviation over seeds; 0 episodes, or n = 1, is the SFT model."
    return Table("frontier_points", "Points", [(*heading, "reward model"), *rows], data, note, texts=2)


def frontier_figure(frontier: dict[str, Any], score: str, title: str) -> Figure:
    """One score of all methods: points, law and band of each."""
    drawn, data = graph_objects.Figure(), []
    for method in dict.fromkeys(point["method"] for point in frontier["points"]):
        rows, fitted = gains(frontier["points"], method, score), frontier["laws"].get(method)
        shade = colour(FRONTIER_SHADES[method])
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


SEEDS_LEAD = (
    "Numbers are mean ± standard deviation over {count} seeds ({key}); differences between models are paired by seed."
)


def seeds_section(run: Run) -> Section | None:
    """What `seeds=N` left in the run's folder; None where it was not asked for, or stages were made anew since."""
    over_seeds = seeds.current(run.folder)
    if over_seeds is None:
        return None
    lead = SEEDS_LEAD.format(count=len(over_seeds["seeds"]), key=over_seeds["key"])
    parts = tuple(table for table in (seeds_of_stages(over_seeds), seeds_of_models(run, over_seeds)) if table)
    return Section("seeds", "Several seeds", (lead,), points=tuple(seeds.claims(over_seeds)), parts=parts)


def seeds_of_stages(over_seeds: dict[str, Any]) -> Table:
    """The main metric of every stage that the seed reaches; its data are all metrics."""
    rows = [("stage", "metric", "mean ± standard deviation", "values")]
    data = []
    for stage, metrics in over_seeds["metrics"].items():
        if main := metrics.get(STAGES[stage].metric):
            values = ", ".join(f"{value:.4g}" for value in main["values"])
            rows.append((stage, STAGES[stage].metric, f"{main['mean']:.4g} ± {main['std']:.2g}", values))
        data += [
            {"stage": stage, "metric": name, **seed_numbers(metric, over_seeds["seeds"])}
            for name, metric in metrics.items()
        ]
    return Table("seeds", "Stages over seeds", rows, data, texts=2)


def seed_numbers(metric: dict[str, Any], values: list[int]) -> dict[str, float]:
    """Mean, spread and the value of each seed."""
    by_seed = {f"seed_{seed}": value for seed, value in zip(values, metric["values"], strict=True)}
    return {"mean": metric["mean"], "std": metric["std"], **by_seed}


def seeds_of_models(run: Run, over_seeds: dict[str, Any]) -> Table | None:
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
        {"model": name, "metric": key, **seed_numbers(metrics[f"models.{name}.{key}"], over_seeds["seeds"])}
        for name in names
        for key in shown
        if f"models.{name}.{key}" in metrics
    ]
    return Table("seeds_models", "Models over seeds", rows, data, models=True)


def _cell(metric: dict[str, Any] | None, form: str) -> str:
    return "–" if metric is None else f"{metric['mean']:{form}} ± {metric['std']:{form.lstrip('+')}}"
