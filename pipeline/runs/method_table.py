"""The table of a sweep over methods: what each makes of the SFT model, whether they differ, and what they cost."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from threefold.display.parts import Table
from threefold.evaluation import statistics
from threefold.fileio import read_json, read_lines
from threefold.runs import seeds
from threefold.runs.sweep_space import METHOD, Dimension, own_model
from threefold.stages import STAGES

# metrics of a model in the evaluation: heading and format
COLUMNS = {
    "gold_mean": ("gold: {judge}", ".3f"),
    "second_judge_mean": ("second: {second_judge}", ".3f"),
    "proxy_mean": ("reward model", "+.2f"),
    "kl": ("KL, nats", ".2f"),
    "length": ("characters", ".1f"),
    "ended_share": ("ended", ".1%"),
}
NOTE = (
    "Mean ± standard deviation over seeds, on test prompts. chosen: the best setting of its method on validation "
    "prompts. KL is to the SFT model, in nats per reply; that of best-of-n is its upper bound, log n − (n − 1)/n. Time "
    "and {unit} are those of one run's own stages; a device is a GPU, or on CPUs a process."
)
TESTS_NOTE = (
    "Chosen settings, paired. Over prompts: permutation test of these models on prompts that both replied to, a mean "
    "where several seeds had a prompt. Over seeds: Student's t test of means, which speaks of training again. p is "
    "corrected for all lines (Holm)."
)
SHARED_NOTE = (
    "Stages that several runs of the sweep use. Each was made once, and its time is in no line of the first table. The "
    "last line has these and the stages of all runs."
)

Results = dict[str, Any]  # the content of sweep.json
Runs = list[dict[str, Any]]


def compared(folder: Path, results: Results) -> dict[str, Any]:
    """What is measured of methods whose runs are below `folder`: models, tests and shared stages; empty without any."""
    made = [run for run in results["runs"] if run["state"] == "complete"]
    if METHOD not in results["keys"] or not made:
        return {}
    evaluation = read_json(folder / made[0]["run"] / "evaluate/metrics.json")
    shared, costs_by_run, total = costs(folder, made)
    models = [row for name in ("human", "sft") if name in evaluation["models"] for row in baselines(folder, made, name)]
    for row in results["settings"]:
        runs = [run for run in made if run["setting"] == row["setting"]]
        kept = {name: row[name] for name in ("setting", "state", "made", "runs", "best")}
        models.append({"model": own_model(row["setting"])} | kept | figures(folder, runs, own_model(row["setting"])))
        models[-1] |= {
            name: _spread([costs_by_run[run["run"]][name] for run in runs]) for name in ("seconds", "device_hours")
        }
    return {
        "judge": evaluation["judge"],
        "second_judge": evaluation["second_judge"],
        "models": models,
        "tests": tests(folder, results),
        "shared": shared,
        "total": total,
    }


def baselines(folder: Path, made: Runs, model: str) -> list[dict[str, Any]]:
    """What is measured of a model that no method changes: a row for each setting of the keys that vary with all.

    Where several runs evaluate the same SFT model by the same seed, one of them counts.
    """
    by_setting: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[str, Any]]] = defaultdict(dict)
    for run in reversed(made):
        setting = ((key, value) for key, value in run["setting"].items() if Dimension(key).method is None)
        parts = read_json(folder / run["run"] / "evaluate/manifest.json")["parts"]
        same = parts["parent.sft"], parts["evaluate.seed"]
        by_setting[tuple((key, value) for key, value in setting if key != METHOD)][same] = run
    return [
        {"model": model, "setting": dict(setting), "made": len(runs)} | figures(folder, list(runs.values()), model)
        for setting, runs in reversed(by_setting.items())
    ]


def figures(folder: Path, runs: Runs, model: str) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) of each metric of `COLUMNS` over the runs; None where they lack it."""
    measured = [read_json(folder / run["run"] / "evaluate/metrics.json")["models"][model] for run in runs]
    return {name: _spread([metrics.get(name) for metrics in measured]) for name in COLUMNS}


def _spread(values: list[float | None]) -> dict[str, float | None] | None:
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None
    return {"mean": float(np.mean(numbers)), "std": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None}


def costs(folder: Path, made: Runs) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, Any]]:
    """Seconds and device hours of stages that several runs use, of each run's own, and of all, each counted once.

    Seconds are those of the execution that finished a stage. Hours are None where a manifest does not say on how many
    devices it ran, as those of earlier versions.
    """
    manifests, used = {}, defaultdict(set)
    for run, stage in itertools.product(made, STAGES):
        file = folder / run["run"] / stage / "manifest.json"
        if file.is_file():
            manifest = read_json(file)
            manifests[stage, manifest["fingerprint"]] = manifest
            used[stage, manifest["fingerprint"]].add(run["run"])
    shared = [
        {"stage": stage}
        | _cost([manifest for key, manifest in manifests.items() if key[0] == stage and len(used[key]) > 1])
        for stage in STAGES
    ]
    costs_by_run = {
        run["run"]: _cost([manifest for key, manifest in manifests.items() if used[key] == {run["run"]}])
        for run in made
    }
    return [row for row in shared if row["artifacts"]], costs_by_run, _cost(list(manifests.values()))


def _cost(manifests: Runs) -> dict[str, Any]:
    counted = all("devices" in manifest for manifest in manifests)
    return {
        "artifacts": len(manifests),
        "seconds": sum(m["seconds"] for m in manifests),
        "device_hours": sum(m["seconds"] * m["devices"]["count"] for m in manifests) / 3600 if counted else None,
        "devices": sorted({m["devices"]["type"] for m in manifests if "devices" in m}),
    }


def tests(folder: Path, results: Results) -> list[dict[str, Any]]:
    """Paired tests of each two methods at their chosen settings, and of each against the SFT model, by both judges."""
    made = [run for run in results["runs"] if run["state"] == "complete"]
    sides = {}
    for row in results["settings"]:
        if row["best"]:
            runs = [run for run in made if run["setting"] == row["setting"]]
            sides[row["setting"][METHOD]] = runs, own_model(row["setting"])
    pairs = [*itertools.combinations(sides, 2), *((name, "sft") for name in sides)]
    rows: list[dict[str, Any]] = []
    for judge, (name, other) in itertools.product(("gold", "second"), pairs):
        against = (sides[name][0], "sft") if other == "sft" else sides[other]
        if test := compare(folder, sides[name], against, judge):
            rows.append({"method": name, "against": other, "judge": judge} | test)
    for key in ("p", "seeds_p"):
        tested = [row for row in rows if row[key] is not None]
        for row, corrected in zip(tested, statistics.holm([row[key] for row in tested]), strict=True):
            row[f"{key}_holm"] = corrected
    return rows


def compare(folder: Path, ours: tuple[Runs, str], theirs: tuple[Runs, str], judge: str) -> dict[str, Any] | None:
    """Paired difference of two players over prompts and over seeds; None where they have no prompt in common.

    Runs are paired by the seeds that both have, those of their methods being the same seed; without any, each run is
    paired with each. Over seeds a pair is the mean of all pairs with the same seeds, so that no run counts as several.
    """
    by_prompt: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_seeds: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for one, other in itertools.product(ours[0], theirs[0]):
        a, b = seeds_of(one), seeds_of(other)
        common_seeds = [key for key in a if key in b]
        if all(a[key] == b[key] for key in common_seeds):
            left, right = scores(folder, one, ours[1], judge), scores(folder, other, theirs[1], judge)
            common = [prompt for prompt in left if prompt in right]
            for prompt in common:
                by_prompt[prompt].append((left[prompt], right[prompt]))
            if common:
                pair = float(np.mean([left[p] for p in common])), float(np.mean([right[p] for p in common]))
                by_seeds[tuple(a[key] for key in common_seeds)].append(pair)
    paired = np.array([np.mean(values, 0) for values in by_prompt.values()]).reshape(-1, 2).T.tolist()
    test = statistics.compare_pairs(*paired, seed=0)
    if test is None:
        return None
    means = [np.mean(pairs, 0) for pairs in by_seeds.values()]
    over_seeds = {"seeds": len(means), "seeds_difference": None, "seeds_ci95": None, "seeds_p": None}
    if len(means) > 1 and np.ptp(np.subtract(*np.transpose(means))) > 0:
        over_seeds |= {f"seeds_{name}": value for name, value in seeds.t_test(*np.transpose(means).tolist()).items()}
    return test | over_seeds


def seeds_of(run: dict[str, Any]) -> dict[str, Any]:
    """The seeds of a run by key; a key of the run's method, as ppo.seed, is called after no method."""
    return {
        key if Dimension(key).method is None else f"{METHOD}.{key.partition('.')[2]}": value
        for key, value in run["repetition"].items()
    }


def scores(folder: Path, run: dict[str, Any], model: str, judge: str) -> dict[str, float]:
    """The judge's score of a player's reply by prompt, of replies that have one."""
    rows = read_lines(folder / run["run"] / "evaluate/samples.jsonl")
    return {json.dumps(row["prompt"]): row[model][judge] for row in rows if row[model][judge] is not None}


def tables(results: Results) -> list[Table]:
    """Methods by setting, the paired tests, and what stages cost that several runs share; none without methods."""
    measured = results.get("methods")  # a file of an earlier version has none
    if not measured:
        return []
    return [table for table in (of_models(measured), of_tests(measured), of_shared(measured)) if len(table.rows) > 1]


def of_models(measured: dict[str, Any]) -> Table:
    """A row for people, the SFT model, and each setting of each method."""
    columns = {name: column for name, column in COLUMNS.items() if any(row[name] for row in measured["models"])}
    heading = ["method", "setting", *(title.format(**measured) for title, _ in columns.values())]
    rows = [(*heading, "runs", "time", unit(measured), "note")]
    data = []
    for row in measured["models"]:
        method = row["setting"].get(METHOD, {"human": "people", "sft": "SFT"}.get(row["model"]))
        setting = ", ".join(f"{key} {shown(value)}" for key, value in row["setting"].items() if key != METHOD)
        note = "" if "best" not in row else "chosen" if row["best"] else row["state"].replace("complete", "")
        hours = _plus_minus(row.get("device_hours"), ".2g")
        cells = (_plus_minus(row[name], form) for name, (_, form) in columns.items())
        runs = f"{row['made']} of {row['runs']}" if row["made"] < row.get("runs", 0) else str(row["made"])
        rows.append((method, setting or "–", *cells, runs, _duration(row.get("seconds")), hours, note))
        spreads = {name: row.get(name) or {} for name in (*columns, "seconds", "device_hours")}
        numbers = {f"{name}_{end}": spread.get(end) for name, spread in spreads.items() for end in ("mean", "std")}
        data.append({METHOD: method, "model": row["model"], "runs": row["made"]} | row["setting"] | numbers)
    return Table("sweep_methods", "Methods and settings", rows, data, NOTE.format(unit=unit(measured)), texts=2)


def of_tests(measured: dict[str, Any]) -> Table:
    """A row for each comparison."""
    heading = (
        "method",
        "against",
        "judge",
        "difference",
        "95% over prompts",
        "p",
        "prompts",
        "95% over seeds",
        "p, seeds",
    )
    rows = [heading]
    for row in measured["tests"]:
        pair = row["method"], row["against"].replace("sft", "SFT"), row["judge"]
        prompts = statistics.shown(row["ci95"], "+.3f"), _p(row.get("p_holm")), str(row["pairs"])
        over_seeds = statistics.shown(row["seeds_ci95"], "+.3f"), _p(row.get("seeds_p_holm"))
        rows.append((*pair, f"{row['difference']:+.3f}", *prompts, *over_seeds))
    data = []
    for row in measured["tests"]:
        intervals = {f"{name}ci95": statistics.ends(row[f"{name}ci95"]) for name in ("", "seeds_")}
        ends = {f"{name}_{end}": pair[i] for name, pair in intervals.items() for i, end in enumerate(("low", "high"))}
        data.append({name: value for name, value in row.items() if name not in intervals} | ends)
    return Table("sweep_methods_tests", "Paired tests", rows, data, TESTS_NOTE, texts=3)


def of_shared(measured: dict[str, Any]) -> Table:
    """A row for each stage that several runs share."""
    rows = [("shared stage", "artifacts", "time", unit(measured))]
    for row in (*measured["shared"], {"stage": "the whole sweep"} | measured["total"]):
        hours = "–" if row["device_hours"] is None else f"{row['device_hours']:.2g}"
        rows.append((row["stage"], str(row["artifacts"]), _duration({"mean": row["seconds"], "std": None}), hours))
    data = [
        row | {"devices": " ".join(row["devices"])}
        for row in (*measured["shared"], {"stage": "all"} | measured["total"])
    ]
    return Table("sweep_methods_shared", "Shared stages", rows, data, SHARED_NOTE)


def unit(measured: dict[str, Any]) -> str:
    """What time on devices is called: GPU hours only where all of it was on GPUs."""
    return "GPU hours" if measured["total"]["devices"] == ["cuda"] else "device hours"


def shown(value: Any) -> str:
    """A value of a key, floating-point numbers in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plus_minus(spread: dict[str, Any] | None, form: str) -> str:
    if spread is None:
        return "–"
    return f"{spread['mean']:{form}}" + ("" if spread["std"] is None else f" ± {spread['std']:{form.lstrip('+')}}")


def _duration(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "–"
    size, name = next((size, name) for size, name in ((3600, "h"), (60, "min"), (0, "s")) if spread["mean"] >= 2 * size)
    return _plus_minus({end: value and value / (size or 1) for end, value in spread.items()}, ".1f") + f" {name}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
