"""The arena: strengths against scikit-learn's fit and against players of known strength, ranks, win rates, length."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from threefold.evaluation import arena

MODELS = ["base", "sft", "dpo", "ppo"]
ELO = {"base": 850.0, "sft": 1000.0, "dpo": 1080.0, "ppo": 1200.0}


def played(prompts: int, seed: int, ties: float = 0.0) -> np.ndarray:
    """Wins of players with the strengths ELO: each two meet once at each prompt."""
    rng, found = np.random.default_rng(seed), np.zeros((prompts, 4, 4))
    for i in range(4):
        for j in range(i):
            chance = 1 / (1 + 10 ** ((ELO[MODELS[j]] - ELO[MODELS[i]]) / 400))
            won = np.where(rng.random(prompts) < ties, 0.5, rng.random(prompts) < chance)
            found[:, i, j], found[:, j, i] = won, 1 - won
    return found


def test_strengths_are_those_of_a_logistic_regression():
    wins = played(200, 1, ties=0.2)
    rows, labels, weights = [], [], []
    for i in range(4):
        for j in range(4):
            if i != j:
                row = np.zeros(4)
                row[i], row[j] = 1, -1
                rows += [row, row]
                labels += [1, 0]
                weights += [wins[:, i, j].sum(), wins[:, j, i].sum()]
    model = LogisticRegression(fit_intercept=False, C=1e9, tol=1e-10, max_iter=10_000)
    model.fit(np.array(rows), labels, sample_weight=weights)
    expected = model.coef_[0] - model.coef_[0].mean()
    assert arena.strengths(wins.sum(0), prior=0.0) == pytest.approx(expected, abs=1e-4)


def test_two_players_have_the_strengths_of_their_win_rate():
    theta = arena.strengths(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0.0)
    assert theta[0] - theta[1] == pytest.approx(np.log(3))


def test_known_strengths_lie_inside_their_intervals():
    """A 95 % interval holds the truth in at least 93 of 100 repetitions, for each player that has an interval."""
    inside = dict.fromkeys(MODELS, 0)
    for seed in range(100):
        for standing in arena.standings(played(300, seed), MODELS, "sft"):
            inside[standing.model] += standing.ci95[0] <= ELO[standing.model] <= standing.ci95[1]
    assert inside["sft"] == 100 and min(inside.values()) >= 93, inside


def test_standings_are_in_order_with_ranks_by_overlap_and_votes():
    found = arena.standings(played(400, 3), MODELS, "sft")
    assert [s.model for s in found] == ["ppo", "dpo", "sft", "base"] and {s.votes for s in found} == {1200}
    assert [s.rank for s in found] == [1, 2, 3, 4]
    few = arena.standings(played(8, 3), MODELS, "sft")
    assert few[0].rank == few[1].rank == 1  # intervals overlap


def test_known_strengths_lie_inside_the_intervals_of_few_prompts():
    inside = dict.fromkeys(MODELS, 0)
    for seed in range(200):
        for standing in arena.standings(played(8, seed), MODELS, "sft"):
            inside[standing.model] += standing.ci95[0] <= ELO[standing.model] <= standing.ci95[1]
    assert min(inside.values()) >= 0.93 * 200, inside


def test_half_a_win_is_added_for_both_so_that_who_never_lost_stays_finite():
    wins = np.zeros((10, 2, 2))
    wins[:, 0, 1] = 1
    never_lost, _ = arena.standings(wins, ["a", "b"], "b")
    assert never_lost.elo == pytest.approx(1000 + 400 * np.log10(10.5 / 0.5))  # 529 points above
    low, high = never_lost.ci95
    assert low < 1250 and high > 1750  # 10 of 10: a true chance of 0.8 (241 points) often gives as much


def test_of_one_prompt_there_is_no_interval_and_nobody_is_ahead_for_sure():
    wins = np.zeros((1, 2, 2))
    wins[0, 0, 1] = 1
    found = arena.standings(wins, ["a", "b"], "b")
    assert [(s.model, s.ci95, s.rank) for s in found] == [("a", None, 1), ("b", (1000.0, 1000.0), 1)]


def test_the_spread_of_two_models_is_that_of_their_win_rate():
    """With many votes the interval is the delta method's: the log-odds of a share, se 1 / sqrt(n p (1 - p))."""
    wins = np.zeros((400, 2, 2))
    wins[:300, 0, 1], wins[300:, 1, 0] = 1, 1
    low, high = arena.standings(wins, ["a", "b"], "b")[0].ci95
    assert (high - low) / 2 == pytest.approx(1.966 * arena.POINTS / np.sqrt(400 * 0.75 * 0.25), rel=0.01)


def test_scores_make_wins_ties_and_nothing_where_there_is_no_score():
    wins = arena.wins_by_scores({"a": [1.0, 0.5, None], "b": [0.0, 0.5, 1.0], "c": [1.0, 0.0, 0.0]})
    assert wins[0].tolist() == [[0, 1, 0.5], [0, 0, 0], [0.5, 1, 0]]
    assert wins[1].tolist() == [[0, 0.5, 1], [0.5, 0, 1], [0, 0, 0]]
    assert wins[2].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    rates = arena.win_rates(wins, ["a", "b", "c"])
    assert rates["a"] == {"b": 0.75, "c": 0.75} and rates["c"] == {"a": 0.25, "b": 1 / 3}


def test_a_win_rate_that_comes_from_length_alone_is_one_half_at_equal_lengths():
    rng = np.random.default_rng(1)
    lengths = rng.normal(30, 40, 4000)  # longer on average, and judged by length alone
    shares = (rng.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std())))).astype(float)
    assert shares.mean() > 0.65
    assert arena.length_controlled_rate(shares, 1 - shares, lengths) == pytest.approx(0.5, abs=0.03)
    better = (rng.random(4000) < 0.8).astype(float)  # whatever the lengths
    assert arena.length_controlled_rate(better, 1 - better, lengths) == pytest.approx(0.8, abs=0.03)
    assert arena.length_controlled_rate(np.ones(5), np.zeros(5), np.arange(5.0)) == 1.0
