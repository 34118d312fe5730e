"""Best-of-n from many samples: against every subset, and its KL against the formula and against enumeration."""

import itertools

import numpy as np
import pytest

from threefold.evaluation import best_of


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_expected_score_is_the_mean_over_all_subsets(n):
    generator = np.random.default_rng(n)
    ranking, values = generator.normal(size=(2, 5))
    subsets = itertools.combinations(range(5), n)
    expected = np.mean([values[max(subset, key=lambda i: ranking[i])] for subset in subsets])
    assert best_of.expected(ranking.tolist(), values.tolist(), n) == pytest.approx(expected)


def test_samples_that_rank_alike_share_their_values():
    # of the pairs (a, b), (a, c), (b, c) the last two are won by c; a and b are alike, and share the first
    assert best_of.expected([0.0, 0.0, 1.0], [2.0, 4.0, 9.0], 2) == pytest.approx((3 + 9 + 9) / 3)
    assert best_of.expected([0.0, 0.0, 1.0], [4.0, 2.0, 9.0], 2) == pytest.approx((3 + 9 + 9) / 3)


def test_the_estimate_is_without_bias():
    generator, found, truth = np.random.default_rng(0), [], []
    for _ in range(4000):
        proxy = generator.normal(size=8)
        gold = 0.5 * proxy + generator.normal(size=8)
        found.append(best_of.expected(proxy.tolist(), gold.tolist(), 4))
        drawn = generator.normal(size=4)
        truth.append(0.5 * drawn.max())  # the noise has mean 0
    error = np.hypot(np.std(found), np.std(truth)) / np.sqrt(4000)
    assert abs(np.mean(found) - np.mean(truth)) < 4 * error


def test_many_samples_are_no_trouble():
    assert best_of.expected(list(range(1200)), list(range(1200)), 512) == pytest.approx(512 / 513 * 1201 - 1)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_measured_kl_of_unlike_samples_is_that_of_the_formula(n):
    ranking = np.random.default_rng(0).normal(size=2000).tolist()
    assert best_of.kl_measured(ranking, n) == pytest.approx(best_of.kl_bound(n), rel=0.005)
    assert best_of.kl_measured(ranking, 1) == pytest.approx(0.0, abs=1e-12)


def test_the_measured_kl_of_a_policy_that_repeats_itself_is_that_of_its_few_replies_and_below_the_bound():
    # two replies at 3 : 1, the rarer one better: best of 2 is the worse one in 9 of 16 cases
    expected = 9 / 16 * np.log((9 / 16) / (3 / 4)) + 7 / 16 * np.log((7 / 16) / (1 / 4))
    assert best_of.kl_measured([0.0, 0.0, 0.0, 1.0], 2) == pytest.approx(expected)
    assert expected < best_of.kl_bound(2)
    assert best_of.kl_measured([1.0] * 4, 2) == 0.0  # replies that rank alike are chosen as often as they are sampled
