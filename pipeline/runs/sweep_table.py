"""What a sweep came to: settings with their spread over seeds, the best, what mattered, and metric against KL."""

from pathlib import Path
from typing import Any

import numpy as np

from threefold.display.parts import print_rows, terminal
from threefold.fileio import read_json
from threefold.stages import STAGES


def settings(runs: list[dict[str, Any]], direction: str) -> list[dict[str, Any]]:
    """One row for each setting (in a search for each trial), the best first and those without a value last.

    `mean` and `std` (of a sample) are over its runs that have a value; `reported` is the mean of what is reported in
    its place. `best` marks the best setting of those all of whose runs were made, `front` those that no other setting
    beats in the metric and in KL.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run.get("trial", tuple(run["setting"].items())), []).append(run)
    rows = [_row(group) for group in groups.values()]
    rows.sort(key=lambda row: (row["mean"] is None, _cost(row, direction)))
    complete = [row for row in rows if row["state"] == "complete"]
    for row in rows:
        row["best"] = bool(complete) and row is complete[0]
        row["front"] = row in complete and not any(_beats(other, row, direction) for other in complete)
    return rows


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
    within settings. In a whole grid the shares and those of keys acting together add up to 1. Empty without spread.
    """
    runs = [run for run in runs if run["state"] == "complete"]
    values = np.array([run["value"] for run in runs])
    if len(runs) < 2 or np.ptp(values) == 0:
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


def lines(runs: list[dict[str, Any]], metric: str, reported: str | None = None) -> list[dict[str, Any]]:
    """A row for each run: trial, setting, seeds, state, metric, KL, folder and error."""
    return [
        {
            **({"trial": run["trial"]} if "trial" in run else {}), **run["setting"], **run["repetition"],
            "state": run["state"], metric: run["value"], **({reported: run.get("reported")} if reported else {}),
            "kl": run["kl"], "run": run["run"], "reason": run["reason"],
        }
        for run in runs
    ]  # fmt: skip


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


def table(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and a row for each setting, as text."""
    rows, search, kl = results["settings"], results["search"], any(row["kl"] is not None for row in results["settings"])
    keys, repeated = results["keys"], bool(results["repeated"])
    reported = [results["reported"]] if results.get("reported") else []  # a file of an earlier version has none
    heading = [*(["trial"] if search else []), *keys, results["metric"], *reported, *(["KL"] if kl else [])]
    heading += [*(["runs"] if repeated else []), "note"]
    cells = [
        [
            *([str(row["trial"])] if search else []), *(shown(row["setting"][key]) for key in keys), _value(row),
            *([_value(row, "reported", "reported_std")] if reported else []),
            *(["–" if row["kl"] is None else f"{row['kl']:.3g}"] if kl else []),
            *([f"{row['made']} of {row['runs']}"] if repeated else []), _mark(row, kl),
        ]
        for row in rows
    ]  # fmt: skip
    return [tuple(heading), *map(tuple, cells)]


def shown(value: Any) -> str:
    """A value of a key, floating-point numbers in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    print_rows(table(results), console)
    for line in [*sentences(results), *failures(results)]:
        console.print(line, highlight=False, soft_wrap=True)
    files = f"settings: {folder / 'sweep.json'}   runs: {folder / 'sweep.csv'}"
    console.print(files, highlight=False, soft_wrap=True)


def failures(results: dict[str, Any]) -> list[str]:
    """A line for each failed run, and how to make them."""
    if not results["failed"]:
        return []
    listed = [f"  {setting(run['setting'] | run['repetition'])}: {run['reason']}" for run in results["failed"]]
    return [f"{len(listed)} of {len(results['runs'])} runs failed; the same command makes them alone:", *listed]
