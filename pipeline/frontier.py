"""The frontier of a run: best-of-n, DPO and PPO, pushed ever further from the SFT model, against two judges.

runs/<run>/variants/frontier-<method and setting>-seed<n>   the run of every point or curve
runs/<run>/frontier.json                                    all points, the fitted laws, and what they advise
"""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

import rewards
from pipeline import overoptimisation, variants
from pipeline.artifact import read_json, read_lines, write_json
from pipeline.variants import Variant

FORMS = {"best_of_n": "best_of_n", "dpo": "rl", "ppo": "rl"}  # DPO as RL: Rafailov et al. 2024, arXiv 2406.02900
SCORES = ("gold", "second", "proxy")
SURE = 0.95  # share of resamples with a peak from which the advice says that there is one
NAMES = {"best_of_n": "best-of-n", "dpo": "DPO", "ppo": "PPO"}


def write(config: DictConfig, overrides: list[str]) -> Path:
    """Make every point that is missing, fit the laws, and write frontier.json; returns the run's folder."""
    wanted = members(config.frontier)
    made = variants.make(config, [*config.frontier.overrides, *overrides], list(wanted))
    points = [
        {"method": variant.overrides[0].partition("=")[2], **setting, **point}
        for (variant, setting), each in zip(wanted.items(), made, strict=True)
        for point in read_points(Path(each.runs) / each.run / "frontier")
    ]
    folder = Path(config.runs) / config.run
    write_json(folder / "frontier.json", fitted(points, config.frontier) | {"judges": judges(config.evaluate)})
    return folder


def members(frontier: DictConfig) -> dict[Variant, dict[str, Any]]:
    """Every run that the frontier needs, with the setting that its points are of."""
    kept = f"ppo.snapshots={frontier.snapshots}"
    settings = [("best_of_n", {}, [])]
    settings += [("dpo", {"beta": beta}, [f"dpo.beta={beta}"]) for beta in frontier.betas]
    settings += [("ppo", {"kl_coef": coef}, [f"ppo.kl_coef={coef}", kept]) for coef in frontier.kl_coefs]
    found = {}
    for method, setting, overrides in settings:
        for seed in frontier.seeds:
            label = "-".join([method, *(f"{key}{value:g}" for key, value in setting.items()), f"seed{seed}"])
            seeded = [f"frontier.method={method}", f"frontier.seed={seed}", *overrides]
            seeded += [f"{method}.seed={seed}"] if method != "best_of_n" else []
            found[Variant(f"variants/frontier-{label}", tuple(seeded), "frontier")] = {**setting, "seed": seed}
    return found


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The points of one artifact, with `gains` over the SFT model, its first point, by score and prompt."""
    points = read_lines(folder / "points.jsonl")
    start = {name: np.array(points[0][name]) for name in SCORES}
    return [
        point | {"gains": {name: (np.array(point[name]) - start[name]).tolist() for name in SCORES}} for point in points
    ]


def fitted(points: list[dict[str, Any]], frontier: DictConfig) -> dict[str, Any]:
    """What frontier.json holds: points by their means, laws by method and score, and advice."""
    laws = {}
    for method in dict.fromkeys(point["method"] for point in points):
        own = [point for point in points if point["method"] == method and point["kl"] > 0]
        laws[method] = {
            score: overoptimisation.summary(own, score, FORMS[method], frontier.bootstrap, frontier.seed)
            for score in SCORES
        }
    means = [
        {key: float(np.mean(value)) if key in SCORES else value for key, value in point.items() if key != "gains"}
        for point in points
    ]
    return {"points": means, "laws": laws, "advice": advice(means, laws), "prompts": len(points[0]["gold"])}


def judges(evaluate: DictConfig) -> dict[str, str]:
    """What the scores are called."""
    named = {"gold": evaluate.judge, "second": evaluate.second_judge}
    found = {score: rewards.name(judge).rpartition(":")[2] for score, judge in named.items()}
    return found | {"proxy": "the reward model"}


def print_advice(folder: Path) -> None:
    """The frontier's advice on the terminal."""
    for line in read_json(folder / "frontier.json")["advice"]:
        print(line)


def advice(points: list[dict[str, Any]], laws: dict[str, Any]) -> list[str]:
    """In words: for each method how far gold follows the reward model, and what each gains at a KL that all reach."""
    found = [_peak(method, points, laws[method]["gold"]) for method in laws]
    common = min(law["gold"]["farthest_kl"] for law in laws.values())
    if len(laws) > 1:
        gains = {method: _law(law["gold"]).gain(np.array([common]))[0] for method, law in laws.items()}
        listed = ", ".join(f"{NAMES[method]} {gain:+.3f}" for method, gain in gains.items())
        found.append(f"At KL {common:.1f}, the farthest that all reached, gold gains: {listed}.")
    return found


def _peak(method: str, points: list[dict[str, Any]], law: dict[str, Any]) -> str:
    own = [point for point in points if point["method"] == method]
    best = max(own, key=lambda point: point["gold"])
    seen = f"The highest that was measured is {best['gold']:.3f} at KL {best['kl']:.1f} ({_setting(best)})."
    if law["peak_kl"] is None:
        return (
            f"{NAMES[method]}: by the fitted law gold still rises at the farthest point, KL {law['farthest_kl']:.1f}; "
            f"it can be pushed further before it is over-optimised. {seen}"
        )
    low, high = law["peak_kl_ci95"] or [law["peak_kl"]] * 2
    sure = "peaks" if law["peak_share"] >= SURE else "may peak"
    return (
        f"{NAMES[method]}: by the fitted law gold {sure} at KL {law['peak_kl']:.1f} ({low:.1f} to {high:.1f}, in "
        f"{law['peak_share']:.0%} of resamples); past it the reward model is over-optimised: stop there. {seen}"
    )


def _setting(point: dict[str, Any]) -> str:
    words = {"n": "n", "beta": "beta", "kl_coef": "KL coefficient", "seed": "seed"}
    said = [f"{word} {point[key]:g}" for key, word in words.items() if key in point]
    if "kl_coef" in point:
        said.append(f"after {point['trained']:.0%} of training")
    return ", ".join(said)


def _law(law: dict[str, Any]) -> overoptimisation.Law:
    return overoptimisation.Law(law["form"], law["alpha"], law["beta"])
