"""A reward of several parts: a weighted sum, in which a part may count only where another one passes.

For each row: sum of weight × score over the parts that count. A part counts where it applies (its function gives no
None) and every part that it `needs` passes, which means that this part counts itself and its own score, as its function
gave it, is at least the one asked for. A part that does not count adds 0; where no part applies the reward is None.
"""

from collections.abc import Callable, Mapping
from statistics import fmean, pstdev
from typing import Any

RewardFunction = Callable[..., list[float | None]]
Scores = list[float | None]  # one per row


def composed(
    functions: dict[str, RewardFunction], parts: Mapping[str, Any], gather: Callable[[Scores], Scores] = list
) -> RewardFunction:
    """The reward of `parts` (name → its `RewardPartConfig`), each scored by its function in `functions`.

    `gather` gives the scores of the whole batch where a call sees one process's share of it: `normalise` is over those.
    """

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> Scores:
        scores = {name: function(prompts, completions, **columns) for name, function in functions.items()}
        added = {name: scaled(scores[name], part, gather) for name, part in parts.items()}
        counts = counting(scores, parts)
        return [
            sum(part.weight * added[name][row] for name, part in parts.items() if counts[name][row])
            if any(of_part[row] is not None for of_part in scores.values())
            else None
            for row in range(len(completions))
        ]

    return reward


def counting(scores: dict[str, Scores], parts: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Whether each part counts, row by row; a part needs parts above it only."""
    counts: dict[str, list[bool]] = {}
    for name, part in parts.items():
        counts[name] = [
            score is not None
            and all(counts[other][row] and scores[other][row] >= least for other, least in part.needs.items())
            for row, score in enumerate(scores[name])
        ]
    return counts


def scaled(scores: Scores, part: Any, gather: Callable[[Scores], Scores] = list) -> Scores:
    """A part's scores as they are added up, but for the weight: normalised first, then clipped, where it says so.

    Normalised scores have mean 0 and standard deviation 1 over the rows of the whole batch to which the part applies,
    and are 0 where these scores are all the same.
    """
    if part.normalise:
        applicable = [score for score in gather(scores) if score is not None]
        mean, deviation = (fmean(applicable), pstdev(applicable)) if applicable else (0.0, 0.0)
        scores = [None if s is None else (s - mean) / deviation if deviation else 0.0 for s in scores]
    if part.clip:
        low, high = part.clip
        scores = [None if s is None else min(max(s, low), high) for s in scores]
    return scores
