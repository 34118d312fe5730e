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
    subsets = comb(len(order), n)
    weights = np.array([comb(i, n - 1) / subsets for i in range(len(order))])
    return float(weights @ shared)


def kl_bound(n: int) -> float:
    """KL(best-of-n, policy) in nats where no two samples are alike: log n - (n - 1) / n; otherwise it is less.

    Stiennon et al. 2020, arXiv 2009.01325; that it is a bound: Beirami et al. 2024, arXiv 2401.01879.
    """
    return log(n) - (n - 1) / n


def kl(ranking: list[float], n: int) -> float:
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
