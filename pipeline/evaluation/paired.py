"""Paired tests: whether one model is better than another, by two scores for each prompt (or for each seed)."""

from typing import Any

import numpy as np
from scipy import stats

from threefold.evaluation import statistics

RESAMPLES = 9999  # sign flips that are drawn where there are too many to try all: no p is below 2 / 10,000


def compare(ours: list[float | None], theirs: list[float | None], seed: int) -> dict[str, Any] | None:
    """The mean difference of paired scores: `difference`, `ci95`, `p` and `pairs`; None where nothing is paired.

    Pairs of which one has no score are left out. `ci95` is `statistics.mean_interval`, None where all differences are
    the same. `p` is two-sided, of the paired permutation test (Fisher 1935): were both the same, each difference could
    as well have the other sign. All 2^n signs are tried where these are fewer than 10,000; n pairs can give no p below
    2 / 2^n.
    """
    found = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not found:
        return None
    differences = [a - b for a, b in found]
    return {
        "difference": float(np.mean(differences)),
        "ci95": statistics.mean_interval(differences),
        "p": sign_flip_p(differences, seed),
        "pairs": len(found),
    }


def sign_flip_p(differences: list[float], seed: int) -> float:
    """Two-sided p of the mean of `differences` under flips of their signs; 1 where there is but one, or all are 0."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    found = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p: list[float]) -> list[float]:
    """Each p corrected for all of them (Holm 1979): below 0.05 are false in at most one of 20 families of tests."""
    order, corrected, highest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def planned(models: list[str]) -> list[tuple[str, str]]:
    """Which of `models` is compared with which.

    Each with SFT, PPO with DPO, both with best-of-n, and each with what it was in an earlier run.
    """
    aligned = [name for name in ("dpo", "ppo") if name in models]
    best_of = [name for name in models if name.startswith(("best_of_", "sft_best_of_"))]
    with_sft = [(name, "sft") for name in models if name not in ("sft", "human") and "sft" in models]
    with_each_other = [("ppo", "dpo")] if len(aligned) == 2 else []
    earlier = [(name.rpartition("/")[2], name) for name in models if name.rpartition("/")[2] in models and "/" in name]
    return with_sft + with_each_other + [(name, best) for name in aligned for best in best_of] + earlier


def tests(by_judge: dict[str, dict[str, list[float | None]]], seed: int) -> list[dict[str, Any]]:
    """The planned comparisons of models by every judge (judge → model → scores); `p_holm` is corrected for all."""
    found = []
    for judge, scores in by_judge.items():
        for model, against in planned(list(scores)):
            if result := compare(scores[model], scores[against], seed):
                prompts = result.pop("pairs")
                found.append({"model": model, "against": against, "judge": judge, **result, "prompts": prompts})
    corrected = holm([row["p"] for row in found])
    return [row | {"p_holm": p} for row, p in zip(found, corrected, strict=True)]
