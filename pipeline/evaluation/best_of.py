"""Best-of-n from many samples, and the laws by which reward grows, and falls, with the distance from the SFT model.

The laws are those of Gao et al. 2022 (arXiv 2210.10760). With d the square root of KL(policy, SFT model), best-of-n
gains d (alpha - beta d) and RL gains d (alpha - beta log d). Both are linear in alpha and beta, which least squares
finds. P: points, G: places of a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, log
from typing import Any

import numpy as np

FARTHEST = 100.0  # log of the largest distance that is computed

# by form: the factor of -beta at distances d
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "best_of_n": lambda d: d * d,
    "rl": lambda d: d * np.log(np.maximum(d, 1e-12)),
}


def expected(ranking: list[float], values: list[float], n: int) -> float:
    """The expected value of the sample that `ranking` puts highest among n, from all subsets of the N samples at hand.

    Of the sample with the i-th lowest rank C(i - 1, n - 1) of the C(N, n) subsets have it highest (Nakano et al.
    2021, arXiv 2112.09332): without bias, and with less variance than one draw of n. Samples that rank alike share
    their values evenly.
    """
    order = np.argsort(ranking, kind="stable")
    _, ties = np.unique(np.asarray(ranking)[order], return_inverse=True)
    sorted_values = np.asarray(values, dtype=float)[order]
    shared = (np.bincount(ties, sorted_values) / np.bincount(ties))[ties]
    subsets = comb(len(order), n)
    weights = np.array([comb(i, n - 1) / subsets for i in range(len(order))])
    return float(weights @ shared)


def kl_bound(n: int) -> float:
    """KL(best-of-n, policy) in nats where no two samples are alike: log n - (n - 1) / n; otherwise it is less.

    Stiennon et al. 2020, arXiv 2009.01325; that it is a bound: Beirami et al. 2024, arXiv 2401.01879.
    """
    return log(n) - (n - 1) / n


def kl_measured(ranking: list[float], n: int) -> float:
    """KL(best-of-n, policy) in nats of the distribution that N samples of one prompt come to.

    Replies that rank alike share their chance evenly, so it is below `kl_bound` where the policy repeats itself; it is
    somewhat below it too where n is not much smaller than N. `ranking` is that of `expected`: equal replies have equal
    scores.
    """
    counts = np.unique(ranking, return_counts=True)[1].astype(float)
    upper = counts.cumsum() / counts.sum()
    policy, chosen = counts / counts.sum(), np.diff(upper**n, prepend=0.0)
    seen = chosen > 0  # far down the ranking the chance is below the smallest number
    return float((chosen[seen] * np.log(chosen[seen] / policy[seen])).sum())


# Laws of over-optimisation


@dataclass(frozen=True)
class Law:
    """A fitted form; `form` is a key of `FORMS`."""

    form: str
    alpha: float
    beta: float

    def gain(self, kl: np.ndarray) -> np.ndarray:
        """The gain over the SFT model at each KL [P] (in nats)."""
        distance = np.sqrt(kl)
        return self.alpha * distance - self.beta * FORMS[self.form](distance)

    def peak(self) -> float | None:
        """The KL, in nats, at which the gain is highest; None for a law without such a place."""
        if self.beta <= 0 or (self.alpha <= 0 and self.form == "best_of_n"):
            return None
        exponent = min(self.alpha / self.beta - 1, FARTHEST)  # almost straight laws peak beyond all numbers
        distance = self.alpha / (2 * self.beta) if self.form == "best_of_n" else np.exp(exponent)
        return float(distance**2)


def fit_law(form: str, kl: np.ndarray, gain: np.ndarray) -> Law:
    """The law of `form` nearest to gains [P] at KL [P], by least squares."""
    distance = np.sqrt(kl)
    columns = np.stack([distance, -FORMS[form](distance)], 1)
    alpha, beta = np.linalg.lstsq(columns, gain, rcond=None)[0]
    return Law(form, float(alpha), float(beta))


def resampled_laws(points: list[dict[str, Any]], score: str, form: str, resamples: int, seed: int) -> list[Law]:
    """Laws fitted to bootstrap resamples: of the prompts, which all points share, and of the training seeds.

    `points` have `kl`, `seed` and `gains`: for each score the gain over the SFT model at every prompt.
    """
    generator, seeds = np.random.default_rng(seed), sorted({point["seed"] for point in points})
    kl, gains = np.array([point["kl"] for point in points]), np.array([point["gains"][score] for point in points])
    of_seed = {s: [i for i, point in enumerate(points) if point["seed"] == s] for s in seeds}
    laws = []
    for _ in range(resamples):
        rows = [i for s in generator.choice(seeds, len(seeds)) for i in of_seed[s]]
        prompts = generator.integers(gains.shape[1], size=gains.shape[1])
        laws.append(fit_law(form, kl[rows], gains[rows][:, prompts].mean(1)))
    return laws


def band(laws: list[Law], kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % band [G] of the gain at each KL [G]: lower and upper bound."""
    curves = np.stack([law.gain(kl) for law in laws])
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return low, high


def trend(law: Law, farthest: float) -> str:
    """What a law's gain does up to the KL `farthest`: rises, peaks before it, or falls from the start."""
    gain = law.gain(np.linspace(0, np.sqrt(farthest), 201) ** 2)
    highest = int(gain.argmax())
    return "falls" if highest == 0 else "rises" if highest == len(gain) - 1 else "peaks"


def law_summary(points: list[dict[str, Any]], score: str, form: str, resamples: int, seed: int) -> dict[str, Any]:
    """The law of a score with its band on a grid up to the farthest point, and what it does up to there.

    `trend` is that of the law, and `trend_share` the share of resamples with the same. `peak_kl` is where the gain is
    highest, None unless it peaks; `peak_kl_ci95` holds the middle 95 % of the resamples that peak at all.
    """
    kl = np.array([point["kl"] for point in points])
    law = fit_law(form, kl, np.array([np.mean(point["gains"][score]) for point in points]))
    laws, grid = resampled_laws(points, score, form, resamples, seed), np.linspace(0, np.sqrt(kl.max()), 60) ** 2
    low, high = band(laws, grid)
    course, courses = trend(law, kl.max()), [trend(other, kl.max()) for other in laws]
    peaks = [
        peak for other, word in zip(laws, courses, strict=True) if word == "peaks" if (peak := other.peak()) is not None
    ]
    return {
        "form": form,
        "alpha": law.alpha,
        "beta": law.beta,
        "farthest_kl": float(kl.max()),
        "trend": course,
        "trend_share": courses.count(course) / len(courses),
        "peak_kl": law.peak() if course == "peaks" else None,
        "peak_kl_ci95": np.quantile(peaks, [0.025, 0.975]).tolist() if peaks else None,
        "curve": {"kl": grid.tolist(), "gain": law.gain(grid).tolist(), "low": low.tolist(), "high": high.tolist()},
    }
