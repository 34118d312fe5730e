"""Intervals: every share and mean that is reported comes with one."""

import numpy as np
from scipy import stats


def share_interval(successes: float, trials: int) -> list[float]:
    """Wilson's 95 % interval of a share, as [low, high]; ties may count one half."""
    interval = stats.binomtest(round(successes), trials).proportion_ci(confidence_level=0.95, method="wilson")
    return [interval.low, interval.high]


def mean_interval(values: list[float], resamples: int, seed: int) -> list[float]:
    """Percentile bootstrap 95 % interval of the mean of `values`, as [low, high]."""
    if len(set(values)) < 2:
        return [values[0], values[0]]
    found = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=100,
    ).confidence_interval
    return [float(found.low), float(found.high)]
