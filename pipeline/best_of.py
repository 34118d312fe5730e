"""Best-of-n from many samples: expected scores without bias, and how far it is from the policy that it samples."""

from math import comb, log

import numpy as np


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
    weights = np.array([comb(i, n - 1) for i in range(len(order))], dtype=float) / comb(len(order), n)
    return float(weights @ shared)


def kl_bound(n: int) -> float:
    """KL(best-of-n, policy) in nats where no two samples are alike: log n - (n - 1) / n; otherwise it is less.

    Stiennon et al. 2020, arXiv 2009.01325; that it is a bound: Beirami et al. 2024, arXiv 2401.01879.
    """
    return log(n) - (n - 1) / n


def kl(ranking: list[float], replies: list[list[int]], n: int) -> float:
    """KL(best-of-n, policy) in nats of the distribution that N samples of one prompt come to.

    Equal replies are one outcome, so it is below `kl_bound` where the policy repeats itself; it is somewhat below it
    too where n is not much smaller than N. `ranking` is that of `expected`.
    """
    outcomes: dict[tuple[int, ...], tuple[float, int]] = {}
    for score, reply in zip(ranking, replies, strict=True):
        outcomes[tuple(reply)] = (score, outcomes.get(tuple(reply), (score, 0))[1] + 1)
    counts = np.array([count for _, count in sorted(outcomes.values())], dtype=float)
    upper = counts.cumsum() / counts.sum()
    policy, chosen = counts / counts.sum(), np.diff(upper**n, prepend=0.0)
    seen = chosen > 0  # far down the ranking the chance is below the smallest number
    return float((chosen[seen] * np.log(chosen[seen] / policy[seen])).sum())
