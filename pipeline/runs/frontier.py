"""The frontier of a run: best-of-n, DPO and PPO, pushed ever further from the SFT model, against two judges.

runs/<run>/variants/frontier-<method and setting>-seed<n>   the run of every point or curve
runs/<run>/frontier.json                                    all points, the fitted laws, and what they advise
"""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from threefold import chain, rewards
from threefold.errors import UserError
from threefold.evaluation import best_of
from threefold.fileio import read_json, read_lines, write_json
from threefold.runs import variants
from threefold.runs.variants import Variant
from threefold.stages import needed_by

FORMS = {"best_of_n": "best_of_n", "dpo": "rl", "ppo": "rl"}  # DPO as RL: Rafailov et al. 2024, arXiv 2406.02900
SCORES = ("gold", "second", "proxy")
FORM = 2  # of frontier.json
SETTINGS = 3  # with fewer, a law of two parameters says nothing
SURE = 0.95  # share of resamples with a peak from which the advice says that there is one
NAMES = {"best_of_n": "Best-of-n", "dpo": "DPO", "ppo": "PPO"}


def write(config: DictConfig, overrides: list[str]) -> Path:
    """Make every point that is missing, fit the laws, and write frontier.json; returns the run's folder.

    Where runs fail, those that are done are written with the names of the others; then `UserError` is raised.
    """
    if config.seeds is not None or config.target is not None:
        raise UserError("threefold frontier: takes neither seeds nor target; frontier.seeds has the seeds of its runs")
    wanted, failure = variants_of(config.frontier), None
    chain.keep_choices(config, overrides, needed_by("frontier", config))
    try:
        variants.make(config, [*config.frontier.overrides, *overrides], list(wanted))
    except UserError as error:
        failure = error
    folder = Path(config.runs) / config.run
    points, missing = collected(folder, wanted)
    if points:
        content = fitted(points, config.frontier) | {"judges": judges(config.evaluate), "missing": missing}
        write_json(folder / "frontier.json", content | {"form": FORM, "made_from": made_from(folder)})
    if failure is not None:
        raise failure
    return folder


def collected(folder: Path, wanted: dict[Variant, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The points of all runs that are done, with their settings, and the names of those that are not."""
    points, missing = [], []
    for variant, setting in wanted.items():
        artifact = folder / variant.name / "frontier"
        if (artifact / "points.jsonl").is_file():
            method = variant.overrides[0].partition("=")[2]
            points += [{"method": method, **setting, **point} for point in read_points(artifact)]
        else:
            missing.append(variant.name.rpartition("/")[2])
    return points, missing


def made_from(folder: Path) -> dict[str, str]:
    """The fingerprints of what all points share: the models that they are measured against."""
    files = {stage: folder / stage / "manifest.json" for stage in ("sft", "reward")}
    return {stage: read_json(file)["fingerprint"] for stage, file in files.items() if file.is_file()}


def current(folder: Path) -> dict[str, Any] | None:
    """frontier.json of a run; None without one, and where the run has another SFT or reward model by now."""
    file = folder / "frontier.json"
    content = read_json(file) if file.is_file() else {}
    return content if content.get("form") == FORM and content["made_from"] == made_from(folder) else None


def variants_of(frontier: DictConfig) -> dict[Variant, dict[str, Any]]:
    """Every run that the frontier needs, with the setting that its points are of."""
    kept = f"ppo.snapshots={frontier.snapshots}"
    settings = [("best_of_n", {}, [])]
    settings += [("dpo", {"beta": beta}, [f"dpo.beta={beta}"]) for beta in frontier.betas]
    settings += [("ppo", {"kl_coef": coef}, [f"ppo.kl_coef={coef}", kept]) for coef in frontier.kl_coefs]
    wanted = {}
    for method, setting, overrides in settings:
        for seed in frontier.seeds:
            label = "-".join([method, *(f"{key}{value:g}" for key, value in setting.items()), f"seed{seed}"])
            seeded = [f"frontier.method={method}", f"frontier.seed={seed}", *overrides]
            seeded += [f"{method}.seed={seed}"] if method != "best_of_n" else []
            wanted[Variant(f"variants/frontier-{label}", tuple(seeded), "frontier")] = {**setting, "seed": seed}
    return wanted


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The points of one artifact, with `gains` over the SFT model, its first point, by score and prompt."""
    points = read_lines(folder / "points.jsonl")
    start = {name: np.array(points[0][name]) for name in SCORES}
    return [
        point | {"gains": {name: (np.array(point[name]) - start[name]).tolist() for name in SCORES}} for point in points
    ]


def fitted(points: list[dict[str, Any]], frontier: DictConfig) -> dict[str, Any]:
    """What frontier.json holds: points by their means, laws by method and score, and advice.

    One half of the prompts is for choosing: laws are fitted to it, and advice and `gold_chosen_by` come from it. The
    means of points are over the other half, so that the figures of the chosen point are not too good.
    """
    if len(points[0]["gold"]) < 2:
        raise UserError(
            "frontier: one held-out prompt is too few to choose by some and to report others; give more data"
        )
    choosing, reported = ([_every_second(point, first) for point in points] for first in (0, 1))
    laws = {}
    for method in dict.fromkeys(point["method"] for point in points):
        trained = [point for point in choosing if point["method"] == method and point["kl"] > 0]
        if len({_setting(point | {"seed": 0}) for point in trained}) >= SETTINGS:
            laws[method] = {
                score: best_of.law_summary(trained, score, FORMS[method], frontier.bootstrap, frontier.seed)
                for score in SCORES
            }
    means = [
        {key: float(np.mean(value)) if key in SCORES else value for key, value in point.items() if key != "gains"}
        | {"gold_chosen_by": float(np.mean(chosen_by["gold"]))}
        for point, chosen_by in zip(reported, choosing, strict=True)
    ]
    prompts = {"prompts": len(reported[0]["gold"]), "chosen_by_prompts": len(choosing[0]["gold"])}
    return {"points": means, "laws": laws, "advice": advice(means, laws)} | prompts


def _every_second(point: dict[str, Any], first: int) -> dict[str, Any]:
    """A point with the scores and gains of every second prompt from number `first` on."""
    scores = {name: point[name][first::2] for name in SCORES}
    return point | scores | {"gains": {name: gains[first::2] for name, gains in point["gains"].items()}}


def judges(evaluate: DictConfig) -> dict[str, str]:
    """What the scores are called."""
    named = {"gold": evaluate.judge, "second": evaluate.second_judge}
    return {score: rewards.name(judge).rpartition(":")[2] for score, judge in named.items()} | {
        "proxy": "the reward model"
    }


def print_advice(folder: Path) -> None:
    """The frontier's advice on the terminal."""
    for line in read_json(folder / "frontier.json")["advice"]:
        print(line)


def advice(points: list[dict[str, Any]], laws: dict[str, Any]) -> list[str]:
    """In words: for each method what gold does as it goes further, and what each gains at a KL that all reach."""
    methods = dict.fromkeys(point["method"] for point in points)
    sentences = [_of_method(method, points, laws.get(method, {}).get("gold")) for method in methods]
    if len(laws) > 1:
        gold = {method: law["gold"] for method, law in laws.items()}
        common = min(law["farthest_kl"] for law in gold.values())
        fits = {method: best_of.Law(law["form"], law["alpha"], law["beta"]) for method, law in gold.items()}
        gains = {method: law.gain(np.array([common]))[0] for method, law in fits.items()}
        listed = ", ".join(f"{NAMES[method]} {gain:+.3f}" for method, gain in gains.items())
        sentences.append(f"At KL {common:.1f}, the farthest that all reached, the laws give gold gains of: {listed}.")
    return sentences


def _of_method(method: str, points: list[dict[str, Any]], law: dict[str, Any] | None) -> str:
    best = max((point for point in points if point["method"] == method), key=lambda point: point["gold_chosen_by"])
    seen = (
        f"Chosen by one half of the prompts, the point at KL {best['kl']:.1f} ({_setting(best)}) has "
        f"{best['gold']:.3f} on the other half."
    )
    if law is None:
        return f"{NAMES[method]}: fewer than {SETTINGS} settings, so no law is fitted. {seen}"
    sure, share = law["trend_share"] >= SURE, f"in {law['trend_share']:.0%} of resamples"
    farthest = f"the farthest point, KL {law['farthest_kl']:.1f}"
    course = {
        "rises": f"gold still rises at {farthest}",
        "falls": f"gold falls from the start to {farthest}",
        "peaks": f"gold peaks at KL {law['peak_kl'] or 0:.1f}{_interval(law)}",
    }[law["trend"]]
    counsel = {
        "rises": "; it can be pushed further before it is over-optimised",
        "falls": ": the reward model does not lead to what the judge likes",
        "peaks": "; past it the reward model is over-optimised: stop there",
    }[law["trend"]]
    judged = counsel if sure else ", which is not certain"
    return f"{NAMES[method]}: by the fitted law {course} ({share}){judged}. {seen}"


def _interval(law: dict[str, Any]) -> str:
    return " [{:.1f}, {:.1f}] where it peaks at all".format(*law["peak_kl_ci95"]) if law["peak_kl_ci95"] else ""


def _setting(point: dict[str, Any]) -> str:
    words = {"n": "n", "beta": "beta", "kl_coef": "KL coefficient", "seed": "seed"}
    parts = [f"{word} {point[key]:g}" for key, word in words.items() if key in point]
    if "kl_coef" in point:
        parts.append(f"after {point['episodes']:,} episodes")
    return ", ".join(parts)
