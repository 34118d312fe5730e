"""An arena of models: pairwise votes on replies to the same prompts, strengths in Elo points, and who is ahead of whom.

M: models, P: prompts. Votes are counted as wins [.., M, M]: entry (i, j) is how often i won against j, a tie being half
a win for both. People may vote on a pair several times.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from threefold.evaluation.statistics import students_t

POINTS = 400 / np.log(10)  # Elo points of one unit of the Bradley-Terry model's log-strength
ANCHOR = 1000.0  # Elo of the model that the others are measured against
PRIOR = 0.5  # wins added to each of two models that met, so that the strength of one that never lost stays finite
STEPS = 50  # of Newton's method, at most; it needs fewer than ten


@dataclass(frozen=True)
class Standing:
    """A model's place: Elo with its interval, votes that it was part of, and its rank by intervals."""

    model: str
    elo: float
    ci95: tuple[float, float] | None
    votes: int
    rank: int


def wins_by_scores(scores: dict[str, list[float | None]]) -> np.ndarray:
    """Wins [P, M, M] by a judge's score of each model's reply to each prompt, in the order of `scores`.

    Equal scores are a tie; a reply without a score (None) takes no part.
    """
    columns = np.array([[np.nan if s is None else s for s in column] for column in scores.values()], dtype=float).T
    difference = columns[:, :, None] - columns[:, None, :]
    wins = (difference > 0) + 0.5 * (difference == 0)
    wins[np.isnan(difference)] = 0.0
    wins[:, np.arange(len(scores)), np.arange(len(scores))] = 0.0
    return wins


def connected(wins: np.ndarray, models: list[str], anchor: str) -> list[str]:
    """The models that votes [P, M, M] link to `anchor`, directly or by others: whose strengths can be compared."""
    from scipy.sparse.csgraph import connected_components

    groups = connected_components(wins.sum(0), directed=False)[1]
    return [name for name, group in zip(models, groups, strict=True) if group == groups[models.index(anchor)]]


def strengths(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Log-strengths [M] of the Bradley-Terry model, of mean 0, that are most likely given wins [M, M].

    Each of two models that met has `prior` wins against the other added (Bradley and Terry 1952; Newton's method on the
    log-likelihood).
    """
    wins = wins + prior * (wins + wins.T > 0)
    met, theta = wins + wins.T, np.zeros(len(wins))
    for _ in range(STEPS):
        gradient = (wins - met * _chances(theta)).sum(-1)
        step = np.linalg.solve(_information(met, theta), gradient)
        theta = theta + step
        if np.abs(step).max() < 1e-10:
            break
    return theta - theta.mean()


def _chances(theta: np.ndarray) -> np.ndarray:
    """The chance [M, M] that the model of the row wins against that of the column."""
    return 1 / (1 + np.exp(theta[None, :] - theta[:, None]))


def _information(met: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The negative second derivative [M, M] of the log-likelihood of meetings [M, M], made invertible.

    Strengths are free up to a constant: 1 / M everywhere takes that direction out.
    """
    chance = _chances(theta)
    information = -met * chance * (1 - chance)
    np.fill_diagonal(information, -information.sum(-1) + information.diagonal())
    return information + 1 / len(met)


def covariance(wins: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The covariance [M, M] of the log-strengths `theta` that wins [P, M, M] give, by the spread between prompts.

    All votes at one prompt are one observation (Liang and Zeger 1986, the sandwich of an M-estimator). The wins that
    `PRIOR` adds are observations as well, so the width is not 0 where all votes go one way.
    """
    total, prompts, chance = wins.sum(0), len(wins), _chances(theta)
    met = total + total.T > 0
    scores = (wins - (wins + np.swapaxes(wins, 1, 2)) * chance).sum(-1)
    added = -(PRIOR**2) * met * (chance**2 + chance.T**2)
    np.fill_diagonal(added, -added.sum(-1) + added.diagonal())
    inverse = np.linalg.inv(_information(total + total.T + 2 * PRIOR * met, theta))
    return inverse @ (prompts / (prompts - 1) * scores.T @ scores + added) @ inverse


def standings(wins: np.ndarray, models: list[str], anchor: str) -> list[Standing]:
    """The table of an arena, best first, from wins [P, M, M]; `anchor` has 1000 points.

    Intervals are 95 % intervals by Student's t over prompts, of the difference to the anchor; one prompt gives none.
    A model's rank is 1 and the number of models whose whole interval is above its own.
    """
    at, theta = models.index(anchor), strengths(wins.sum(0))
    elo = ANCHOR + POINTS * (theta - theta[at])
    half = np.full(len(models), np.inf)
    half[at] = 0.0
    if len(wins) > 1:
        spread = covariance(wins, theta)
        variance = spread.diagonal() + spread[at, at] - 2 * spread[at]
        half = students_t(len(wins)) * POINTS * np.sqrt(np.maximum(variance, 0.0))
    low, high = elo - half, elo + half
    votes = (wins + np.swapaxes(wins, -1, -2)).sum((0, 2))
    table = [
        Standing(
            name, float(elo[i]), (float(low[i]), float(high[i])) if np.isfinite(half[i]) else None, round(votes[i]),
            1 + int((low > high[i]).sum()),
        )
        for i, name in enumerate(models)
    ]  # fmt: skip
    return sorted(table, key=lambda standing: -standing.elo)


def win_rates(wins: np.ndarray, models: list[str]) -> dict[str, dict[str, float]]:
    """From wins [P, M, M] how often each model wins against each other one that it met, ties being one half."""
    total = wins.sum(0)
    met = total + total.T
    return {
        a: {b: float(total[i, j] / met[i, j]) for j, b in enumerate(models) if met[i, j] > 0}
        for i, a in enumerate(models)
    }


def length_controlled_rate(won: np.ndarray, lost: np.ndarray, lengths: np.ndarray) -> float | None:
    """How often a model would win against another at equal lengths.

    None where its replies are always the longer ones, or always the shorter ones: nothing was seen of equal lengths.

    `won` [P] are its wins at each prompt and `lost` [P] the other's, a tie being half a win for both; `lengths` [P] the
    length of its reply less that of the other one. A logistic regression on the length difference, squashed at its
    standard deviation, is read at a difference of 0 (the length term of Dubois et al. 2024, arXiv 2404.04475).
    """
    if len(lengths) > 1 and (lengths.min() > 0 or lengths.max() < 0):
        return None
    squashed = np.tanh(lengths / max(lengths.std(), 1e-9))[:, None]
    features, labels = np.concatenate([squashed, squashed]), np.repeat([1, 0], len(won))
    weights = np.concatenate([won, lost])
    if won.sum() == 0 or lost.sum() == 0:
        return float(won.sum() / (won + lost).sum())
    from sklearn.linear_model import LogisticRegression  # half a second, which a report does not need

    model = LogisticRegression(C=1e3, max_iter=1000).fit(features, labels, sample_weight=weights)
    return float(model.predict_proba(np.zeros((1, 1)))[0, 1])


def summary(wins: np.ndarray, models: list[str], lengths: dict[str, list[int]], anchor: str) -> dict[str, Any]:
    """The arena of one judge as metrics: standings, win rates, and the rate against `anchor` at equal lengths.

    `wins` [P, M, M] are in the order of `models`; `lengths` are those of each model's reply to each prompt, in
    characters. Prompts without a vote take no part, nor do models that no vote links to the anchor: `not_linked`.
    """
    linked, voted = connected(wins, models, anchor), wins.any((1, 2))
    kept = [models.index(name) for name in linked]
    wins = wins[voted][:, kept][:, :, kept]
    of_linked = {name: np.array(lengths[name], dtype=float)[voted] for name in linked}
    missing = [name for name in models if name not in linked]
    return _summary(wins, linked, of_linked, anchor) | ({"not_linked": missing} if missing else {})


def _summary(wins: np.ndarray, models: list[str], lengths: dict[str, np.ndarray], anchor: str) -> dict[str, Any]:
    """`summary` of wins [P, M, M] and lengths [P] of models that are all linked, at prompts that all have a vote."""
    at, controlled = models.index(anchor), {}
    for i, name in enumerate(models):
        won, lost = wins[:, i, at], wins[:, at, i]
        met = won + lost > 0
        if i != at and met.any():
            longer = (lengths[name] - lengths[anchor])[met]
            controlled[name] = length_controlled_rate(won[met], lost[met], longer)
    return {
        "anchor": anchor,
        "standings": [asdict(s) for s in standings(wins, models, anchor)],
        "win_rates": win_rates(wins, models),
        "length_controlled": controlled,
    }
