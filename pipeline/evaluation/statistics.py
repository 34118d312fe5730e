"""Intervals: every share and mean that is reported comes with one, or with None where too little was seen for one."""

import functools

import numpy as np
from scipy import stats


def share_interval(outcomes: list[float], groups: list[str] | None = None) -> list[float] | None:
    """Wilson's 95 % interval of the share of outcomes that are 1, as [low, high]; ties may count one half.

    Outcomes of one group (replies to one prompt) are not independent: with `groups` the interval is that of as many
    independent outcomes as would leave the mean as uncertain as these do, by the variance between groups, at Student's
    t of as many groups (Korn and Graubard 1998). None where there is one group: nothing is known of another.
    """
    share, count, z = float(np.mean(outcomes)), float(len(outcomes)), 1.959964
    if groups is not None:
        distinct = len(set(groups))
        if distinct < 2:
            return None
        count, z = _independent_count(np.asarray(outcomes, dtype=float), groups), students_t(distinct)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))]  # rounding


def _independent_count(outcomes: np.ndarray, groups: list[str]) -> float:
    """How many independent outcomes would leave the mean as uncertain as these in two or more groups do.

    The variance is taken with half a group of ones and half a group of zeros added, as Agresti and Coull (1998) add
    outcomes: few groups near 0 or 1 look more alike than they are.
    """
    sums, sizes = _by_group(outcomes, groups)
    distinct, total = len(sums) + 1, len(outcomes)
    size = total / len(sums)  # of the group that is added
    share = (sums.sum() + size / 2) / (total + size)
    squares = ((sums - share * sizes) ** 2).sum() + size**2 * ((1 - share) ** 2 + share**2) / 2
    variance = distinct / (distinct - 1) * squares / (total + size) ** 2
    return float(min(total, share * (1 - share) / variance * total / (total + size)))


def mean_interval(values: list[float], groups: list[str] | None = None) -> list[float] | None:
    """Student's t 95 % interval of the mean of `values`, as [low, high], made longer towards the longer tail.

    With `groups` it goes by the spread between groups, at the t of as many groups. Where values are skewed, the end on
    their longer side is Johnson's (1978), which is corrected for skewness. None where there are fewer than two values
    or groups, or all are alike: that says nothing of how far the mean of others may be.
    """
    sums, sizes = _by_group(np.asarray(values, dtype=float), groups or list(range(len(values))))
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    if count < 2:
        return None
    deviations = (sums - mean * sizes) / sizes.mean()
    deviation = deviations.std(ddof=1)
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return None
    t, third = students_t(count), (deviations**3).sum() * count / ((count - 1) * max(1, count - 2))
    skew = third / deviation**2 * (1 / 6 + t**2 / 3) / count
    half = t * deviation / np.sqrt(count)
    return [float(mean - half + min(0.0, skew)), float(mean + half + max(0.0, skew))]


def difference_interval(differences: list[float], groups: list[str]) -> list[float] | None:
    """`mean_interval` of differences of two shares, -1 to 1, and where all groups are alike what a sign test supports.

    When n groups are all alike, at least 0.025^(1/n) of all groups are so at 97.5 % (Clopper and Pearson 1934), and the
    others lie between -1 and 1. None where there is one group.
    """
    count, mean = len(set(groups)), float(np.mean(differences))
    if (interval := mean_interval(differences, groups)) or count < 2:
        return interval
    alike = 0.025 ** (1 / count)
    return [alike * mean - (1 - alike), alike * mean + (1 - alike)]


@functools.cache
def students_t(count: int) -> float:
    """How many standard errors each end of a 95 % interval is away from the mean of `count` independent values."""
    return float(stats.t.ppf(0.975, count - 1))


def _by_group(values: np.ndarray, groups: list) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values of each group, and how many these are."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return np.bincount(numbers, values), np.bincount(numbers)


def shown(interval: list[float] | tuple[float, float] | None, form: str) -> str:
    """An interval as text, [0.123, 0.456]; [–] where there is none."""
    return f"[{', '.join(format(end, form) for end in interval)}]" if interval else "[–]"


def ends(interval: list[float] | tuple[float, float] | None) -> tuple[float | None, float | None]:
    """Both ends of an interval; None and None where there is none."""
    return tuple(interval) if interval else (None, None)
