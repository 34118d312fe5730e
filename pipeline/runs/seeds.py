"""The same run with several seeds: what of its numbers is the method, and what is luck.

runs/<run>/variants/<key>-<n>   the run of each seed
runs/<run>/seeds.json           mean, standard deviation and values of every metric that the seed reaches
"""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from threefold import chain
from threefold.artifacts.artifact import COSTS
from threefold.chain.plans import Member
from threefold.errors import UserError
from threefold.evaluation import statistics
from threefold.fileio import numbers, read_json, write_json
from threefold.runs import variants
from threefold.runs.variants import Variant
from threefold.stages import STAGES, depending_on


def run(config: DictConfig, overrides: list[str]) -> Path:
    """Make the run with `seeds` seeds, and write seeds.json; returns the run's folder."""
    folder, wanted = Path(config.runs) / config.run, variants_of(config)
    chain.keep_choices(config, overrides, chain.wanted(config))
    made = variants.make(config, overrides, wanted)
    for entry in made[0].planned.values():  # of the command's own seed
        entry.artifact.link_into(folder)
    folders = [Path(config.runs) / member.config.run for member in made]
    write_json(folder / "seeds.json", {"key": seeded_key(config), "seeds": seed_values(config)} | summary(folders))
    return folder


def variants_of(config: DictConfig) -> list[Variant]:
    """The run of each seed."""
    key, wanted = seeded_key(config), last_made(config, Path(config.runs) / config.run)
    return [Variant(f"variants/{key}-{value}", (f"{key}={value}",), wanted) for value in seed_values(config)]


def composed(config: DictConfig, overrides: list[str]) -> list[Member]:
    """The run of each seed, composed from `overrides`."""
    return [variant.member(config, overrides) for variant in variants_of(config)]


def seed_values(config: DictConfig) -> list[int]:
    """The seeds: that of the configuration, and those that follow it."""
    first = OmegaConf.select(config, seeded_key(config))
    return list(range(first, first + config.seeds))


def seeded_key(config: DictConfig) -> str:
    """The seed that is varied: that of the target alone, or of all stages."""
    if config.target is None:
        return "seed"
    if OmegaConf.select(config, f"{config.target}.seed") is None:
        raise UserError(f"seeds={config.seeds}: stage {config.target} has no seed; choose another target, or none")
    return f"{config.target}.seed"


def last_made(config: DictConfig, folder: Path) -> str | None:
    """The stage to make with every seed: the target, or the last one that depends on it and that the run has."""
    if config.target is None or not config.dependents or config.takeover:
        return config.target
    made = [name for name in depending_on(config.target, config) if (folder / name).exists()]
    return made[-1] if made else config.target


def summary(folders: list[Path]) -> dict[str, Any]:
    """Metrics over the runs in `folders`, one for each seed: by stage and name, and differences between models.

    Stages that all runs share have no spread, and are left out; so are metrics that not every run has.
    """
    metrics, fingerprints, between = {}, {}, []
    for stage in STAGES:
        files = [folder / stage / "metrics.json" for folder in folders]
        if not all(file.is_file() for file in files):
            continue
        contents = [read_json(file) for file in files]
        prints = [content["fingerprint"] for content in contents]
        if len(set(prints)) > 1:
            fingerprints[stage] = prints
            metrics[stage] = spread([numbers(content, COSTS) for content in contents])
            if stage == "evaluate":
                between = differences([numbers(content, COSTS) for content in contents])
    return {"fingerprints": fingerprints, "metrics": metrics, "differences": between}


def spread(runs: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (of a sample) and values of every number that all runs have.

    What is equal in all of them the seed does not reach: it is left out.
    """
    names = [name for name in runs[0] if all(name in run for run in runs)]
    columns = {name: [run[name] for run in runs] for name in names if len({run[name] for run in runs}) > 1}
    return {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "values": values}
        for name, values in columns.items()
    }


def differences(runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Gold of each trained model less the SFT model's, and PPO's less DPO's, paired by seed (Student's t test).

    `runs` are the evaluation's numbers, one for each seed; differences that the seed does not reach are left out.
    `p_holm` is corrected for all that are there.
    """
    pairs = [("dpo", "sft"), ("ppo", "sft"), ("ppo", "dpo")]
    missing = float("nan")  # its differences have no range above 0
    gold = {name: [run.get(f"models.{name}.gold_mean", missing) for run in runs] for pair in pairs for name in pair}
    rows: list[dict[str, Any]] = [
        {"model": model, "against": other} | t_test(gold[model], gold[other])
        for model, other in pairs
        if np.ptp(np.subtract(gold[model], gold[other])) > 0
    ]
    corrected = statistics.holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def t_test(values: list[float], others: list[float]) -> dict[str, Any]:
    """The mean difference of two figures of the same seeds, its 95 % interval, and p of no difference."""
    from scipy import stats

    difference, test = np.subtract(values, others), stats.ttest_rel(values, others)
    interval = test.confidence_interval()
    return {
        "difference": float(difference.mean()),
        "ci95": [float(interval.low), float(interval.high)],
        "p": float(test.pvalue),
    }


def current(folder: Path) -> dict[str, Any] | None:
    """seeds.json of a run, unless a stage in it has been made anew since."""
    file = folder / "seeds.json"
    if not file.is_file():
        return None
    content = read_json(file)
    for stage, prints in content["fingerprints"].items():
        made = folder / stage / "metrics.json"
        if not made.is_file() or read_json(made)["fingerprint"] not in prints:
            return None
    return content


def claims(seeds: dict[str, Any]) -> list[str]:
    """What the differences between models come to, in words."""
    sentences = []
    for row in seeds["differences"]:
        low, high = row["ci95"]
        verdict = "not distinguishable" if row["p_holm"] >= 0.05 else "higher" if row["difference"] > 0 else "lower"
        sentences.append(
            f"gold of {row['model']} less {row['against']}: {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] over "
            f"{len(seeds['seeds'])} seeds, p {row['p_holm']:.2g} (Holm): {verdict}"
        )
    return sentences
