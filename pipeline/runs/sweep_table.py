"""What a sweep came to: settings with their spread over seeds, the best, what mattered, and metric against KL."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from threefold.artifacts.artifact import COSTS
from threefold.display.parts import Table, print_rows, terminal
from threefold.fileio import numbers, read_json
from threefold.runs import method_table
from threefold.runs.method_table import shown
from threefold.stages import STAGES

OF_MODEL = re.compile(r"(validation\.)?models\.([^.]+)\.(.+)")  # metrics of the evaluation that are of one model


def settings(runs: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """One row for each setting (in a search for each trial), the best first and those without a value last.

    With several methods those of one stand together, in the order of the runs.

    `mean` and `std` (of a sample) are over its runs that have a value; `reported` is the mean of what is reported in
    its place. `best` marks the best setting (of each method) of those all of whose runs were made, `front` those that
    no other setting beats in the metric and in KL.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run.get("trial", tuple(run["setting"].items())), []).append(run)
    rows = [_row(group) for group in groups.values()]
    methods = list(dict.fromkeys(map(method, rows)))
    rows.sort(key=lambda row: (methods.index(method(row)), row["mean"] is None, _cost(row, direction)))
    complete = [row for row in rows if row["state"] == "complete"]
    for row in rows:
        row["best"] = row is next((other for other in complete if method(other) == method(row)), None)
        row["front"] = row in complete and not any(_beats(other, row, direction) for other in complete)
    return rows


def method(row: dict[str, Any]) -> str | None:
    """The method of a setting or run; None in a sweep without methods."""
    return row["setting"].get("method")


def _row(group: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting that the runs of `group` repeat."""
    values = [run["value"] for run in group if run["state"] == "complete"]
    reported = [run["reported"] for run in group if run["state"] == "complete" and run.get("reported") is not None]
    kls = [run["kl"] for run in group if run["state"] == "complete" and run["kl"] is not None]
    states = {run["state"] for run in group}
    return {
        **({"trial": group[0]["trial"]} if "trial" in group[0] else {}),
        "setting": group[0]["setting"],
        "state": next(state for state in ("failed", "pruned", "complete") if state in states),
        "runs": len(group),
        "made": len(values),
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "reported": float(np.mean(reported)) if reported else None,
        "reported_std": float(np.std(reported, ddof=1)) if len(reported) > 1 else None,
        "kl": float(np.mean(kls)) if kls else None,
        "values": values,
    }


def _cost(row: dict[str, Any], direction: str) -> float:
    """What is least for the best row."""
    if row["mean"] is None:
        return 0.0
    return -row["mean"] if direction == "maximize" else row["mean"]


def _beats(other: dict[str, Any], row: dict[str, Any], direction: str) -> bool:
    """Whether `other` is at least as good in the metric and in KL, and better in one of them."""
    if row["kl"] is None or other["kl"] is None:
        return row["kl"] is None  # nothing without a KL is on the front
    ours, theirs = (_cost(row, direction), row["kl"]), (_cost(other, direction), other["kl"])
    return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]


def variance_shares(runs: list[dict[str, Any]]) -> dict[str, float]:
    """For each key its share of the metric's variance over all runs, largest first, and that of `seeds`.

    Of a key: the variance between the means of its values (analysis of variance, main effects); of the seeds: that
    within settings. In a whole grid the shares and those of keys acting together add up to 1. Empty without spread, and
    where methods have keys of their own.
    """
    runs = [run for run in runs if run["state"] == "complete"]
    values = np.array([run["value"] for run in runs])
    if len(runs) < 2 or np.ptp(values) == 0 or len({tuple(run["setting"]) for run in runs}) > 1:
        return {}
    total = ((values - values.mean()) ** 2).sum()
    shares = {}
    for key in runs[0]["setting"]:
        means = _means([run["setting"][key] for run in runs], values)
        shares[key] = float(((means - values.mean()) ** 2).sum() / total)
    shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
    labels = [tuple(run["setting"].values()) for run in runs]
    within = float(((values - _means(labels, values)) ** 2).sum() / total)
    return shares | ({"seeds": within} if len(set(labels)) < len(labels) else {})


def _means(labels: list[Any], values: np.ndarray) -> np.ndarray:
    """For each of `values` [R] the mean of those that have the same label; R: runs."""
    same = np.array([[one == other for other in labels] for one in labels], dtype=float)
    return same @ values / same.sum(1)


def lines(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number that the stages of each run below `folder` measured, and one for each run without any.

    Columns: run, trial, setting, seeds, state and error, stage, model (of those that the evaluation compares), metric
    and value.
    """
    rows = []
    for run in runs:
        about = {
            "run": run["run"], **({"trial": run["trial"]} if "trial" in run else {}), **run["setting"],
            **run["repetition"], "state": run["state"], "reason": run["reason"],
        }  # fmt: skip
        of_run = list(measured(folder / run["run"])) if run["state"] == "complete" else [{}]
        rows += [about | dict.fromkeys(("stage", "model", "metric", "value")) | number for number in of_run]
    return rows


def measured(folder: Path) -> Iterator[dict[str, Any]]:
    """Every number of a run: stage, model, metric and value. Those on validation prompts are validation.METRIC."""
    for stage in STAGES:
        file = folder / stage / "metrics.json"
        for name, value in (numbers(read_json(file), COSTS) if file.is_file() else {}).items():
            of_model = OF_MODEL.fullmatch(name) if stage == "evaluate" else None
            split, model, metric = of_model.groups(default="") if of_model else ("", None, name)
            yield {"stage": stage, "model": model, "metric": split + metric, "value": value}


def made_from(folder: Path, runs: list[dict[str, Any]]) -> dict[str, str]:
    """The fingerprint of every stage that all finished runs below `folder` have in common."""
    folders = [folder / run["run"] for run in runs if run["state"] == "complete"]
    shared = {}
    for stage in STAGES:
        first, *others = {fingerprint(folder, stage) for folder in folders} or {None}
        if first is not None and not others:
            shared[stage] = first
    return shared


def fingerprint(folder: Path, stage: str) -> str | None:
    """The fingerprint of a run's stage; None where it has none."""
    file = folder / stage / "manifest.json"
    return read_json(file)["fingerprint"] if file.is_file() else None


def current(folder: Path) -> dict[str, Any] | None:
    """sweep.json of a run; None without one, and where the run has other stages by now than its runs were made from."""
    file = folder / "sweep.json"
    content = read_json(file) if file.is_file() else None
    if content and all(fingerprint(folder, stage) in (made, None) for stage, made in content["made_from"].items()):
        return content
    return None


def tables(results: dict[str, Any]) -> list[Table]:
    """What stands on the terminal, in the report, and in the files for a page and for a paper."""
    return method_table.tables(results) or [settings_table(results)]


def settings_table(results: dict[str, Any]) -> Table:
    """A row for each setting, the best first."""
    places = ("trial", "state", "made", "mean", "std", "kl")
    data = [row["setting"] | {place: row[place] for place in places if place in row} for row in results["settings"]]
    return Table("sweep", f"Settings by {results['metric']}", table(results), data, texts=0)


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and a row for each setting, as text."""
    rows, search, kl = results["settings"], results["search"], any(row["kl"] is not None for row in results["settings"])
    keys, repeated = results["keys"], bool(results["repeated"])
    reported = [results["reported"]] if results.get("reported") else []  # a file of an earlier version has none
    heading = [*(["trial"] if search else []), *keys, results["metric"], *reported, *(["KL"] if kl else [])]
    heading += [*(["runs"] if repeated else []), "note"]
    cells = [
        [
            *([str(row["trial"])] if search else []), *(shown(row["setting"].get(key, "–")) for key in keys),
            _value(row),
            *([_value(row, "reported", "reported_std")] if reported else []),
            *(["–" if row["kl"] is None else f"{row['kl']:.3g}"] if kl else []),
            *([f"{row['made']} of {row['runs']}"] if repeated else []), _mark(row, kl),
        ]
        for row in rows
    ]  # fmt: skip
    return [tuple(heading), *map(tuple, cells)]


def _value(row: dict[str, Any], mean: str = "mean", std: str = "std") -> str:
    if row[mean] is None:
        return "–"
    return f"{row[mean]:.4g}" + ("" if row[std] is None else f" ± {row[std]:.2g}")


def _mark(row: dict[str, Any], kl: bool) -> str:
    if row["state"] != "complete":
        return row["state"]
    return ", ".join([*(["best"] if row["best"] else []), *(["front"] if kl and row["front"] else [])])


def sentences(results: dict[str, Any]) -> list[str]:
    """In words: the best setting, what mattered, and what the marks mean."""
    parts = [f"{results['metric']}, {'higher' if results['direction'] == 'maximize' else 'lower'} is better."]
    for row in results["settings"]:
        if row["best"]:
            spread = f" ± {row['std']:.2g} over {row['made']} runs" if row["std"] is not None else " in one run"
            parts.append(f"Best: {setting(row['setting'])}, {row['mean']:.4g}{spread}.")
            parts.append(_reported(results, row))
    if results["importance"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in results["importance"].items())
        parts.append(f"Share of the variance ({results['importance_by']}): {shares}.")
    if any(row["front"] for row in results["settings"]):
        parts.append(f"front: no other setting is at least as good at no more {results['kl_metric']}.")
    return parts


def _reported(results: dict[str, Any], best: dict[str, Any]) -> str:
    """What the best setting reaches in a number that had no part in the choice, or that there is no such number."""
    if results.get("reported"):
        value = _value(best, "reported", "reported_std")
        return f"Of it {results['reported']}, on the test prompts, which had no part in the choice: {value}."
    return (
        "It was chosen by this very number, which is therefore rather too good: the best of several is lucky as well."
    )


def setting(values: dict[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items()) or "the run's own setting"


def print_result(results: dict[str, Any], folder: Path) -> None:
    """The table on the terminal, what it comes to, failed runs with their first error line, and where the files are."""
    console = terminal()
    for part in tables(results):
        print_rows(part.rows, console)
        for line in filter(None, ("", part.note)):
            console.print(line, highlight=False, soft_wrap=True)
    for line in [*sentences(results), *failures(results)]:
        console.print(line, highlight=False, soft_wrap=True)
    files = f"settings: {folder / 'sweep.json'}   every number: {folder / 'sweep.csv'}   table: {folder / 'sweep.tex'}"
    console.print(files, highlight=False, soft_wrap=True)


def failures(results: dict[str, Any]) -> list[str]:
    """A line for each failed run, and how to make them."""
    if not results["failed"]:
        return []
    listed = [f"  {setting(run['setting'] | run['repetition'])}: {run['reason']}" for run in results["failed"]]
    return [f"{len(listed)} of {len(results['runs'])} runs failed; the same command makes them alone:", *listed]
