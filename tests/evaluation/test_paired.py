"""Paired tests: level and power, an exact reference by all signs, Holm's correction, and what is compared."""

import itertools

import numpy as np
import pytest
from scipy import stats

from threefold.evaluation import statistics


def by_all_signs(differences: list[float]) -> float:
    """The share of all ways to choose the signs whose mean is at least as far from 0."""
    every = [np.mean(np.array(signs) * differences) for signs in itertools.product((1, -1), repeat=len(differences))]
    return float(np.mean([abs(mean) >= abs(np.mean(differences)) - 1e-12 for mean in every]))


def closed_testing(p: list[float]) -> list[float]:
    """Holm's procedure as the closure of Bonferroni's test: a hypothesis falls when every family with it does."""
    families = [f for n in range(1, len(p) + 1) for f in itertools.combinations(range(len(p)), n)]
    return [max(min(1.0, len(f) * min(p[j] for j in f)) for f in families if i in f) for i in range(len(p))]


@pytest.mark.parametrize("count", [2, 3, 6, 9])
def test_few_pairs_have_the_p_of_all_signs(count):
    rng = np.random.default_rng(count)
    for differences in (rng.normal(0.7, 1, count).tolist(), rng.integers(-1, 2, count).tolist()):
        assert statistics.sign_flip_p(differences, 1) == pytest.approx(by_all_signs(differences))


@pytest.mark.parametrize("count", [8, 40])  # all 256 signs are tried, and 499 are drawn
def test_models_that_are_the_same_are_called_different_in_one_of_twenty(count, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    rng, false = np.random.default_rng(1), 0
    for _ in range(300):
        ours, theirs = rng.exponential(size=(2, count))
        false += statistics.sign_flip_p((ours - theirs).tolist(), 1) <= 0.05
    low, high = stats.binom.ppf([0.001, 0.999], 300, 0.05)
    assert low <= false <= high


def test_a_known_shift_is_found_and_its_interval_holds_it():
    rng = np.random.default_rng(2)
    prompts = rng.normal(0, 3, 300)  # what is common to both models drops out
    theirs, ours = prompts + rng.normal(0, 1, 300), prompts + 0.5 + rng.normal(0, 1, 300)
    found = statistics.compare_pairs(ours.tolist(), theirs.tolist(), 1)
    assert found["p"] < 0.001 and found["ci95"][0] < 0.5 < found["ci95"][1] and found["ci95"][0] > 0
    assert found["difference"] == pytest.approx((ours - theirs).mean()) and found["pairs"] == 300
    assert found["p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=1e-3)
    assert stats.ttest_ind(ours, theirs).pvalue > 0.01  # without pairing it drowns
    assert statistics.compare_pairs(theirs.tolist(), ours.tolist(), 1)["difference"] == -found["difference"]


def test_pairs_without_a_score_take_no_part():
    found = statistics.compare_pairs([1.0, None, 2.0, 3.0], [0.5, 1.0, None, 1.0], 1)
    assert found["pairs"] == 2 and found["difference"] == 1.25
    assert statistics.compare_pairs([None], [1.0], 1) is None
    assert statistics.compare_pairs([0.5, 0.5], [0.5, 0.5], 1) == {
        "difference": 0.0,
        "ci95": None,
        "p": 1.0,
        "pairs": 2,
    }


def test_holm_is_the_closure_of_bonferroni():
    rng = np.random.default_rng(3)
    for p in ([], [0.04], [0.01, 0.04, 0.03, 0.005], rng.random(6).tolist(), [0.01, 0.01, 0.02]):
        assert statistics.holm(p) == pytest.approx(closed_testing(p))
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_each_model_meets_sft_and_aligned_models_meet_each_other_and_best_of_n():
    assert statistics.planned_comparisons(["human", "base", "sft", "dpo", "ppo"]) == [
        ("base", "sft"), ("dpo", "sft"), ("ppo", "sft"), ("ppo", "dpo"),
    ]  # fmt: skip
    with_best = statistics.planned_comparisons(["sft", "ppo", "best_of_4"])
    assert with_best == [("ppo", "sft"), ("best_of_4", "sft"), ("ppo", "best_of_4")]
    assert statistics.planned_comparisons(["human", "base"]) == []


def test_all_judges_share_one_correction():
    rng = np.random.default_rng(4)
    scores = {"sft": rng.normal(0, 1, 50).tolist(), "ppo": rng.normal(1, 1, 50).tolist(), "human": [0.0] * 50}
    found = statistics.paired_tests({"gold": scores, "second": {name: scores["sft"] for name in scores}}, 1)
    assert [(row["judge"], row["model"], row["against"], row["prompts"]) for row in found] == [
        ("gold", "ppo", "sft", 50), ("second", "ppo", "sft", 50),
    ]  # fmt: skip
    assert found[0]["p_holm"] == pytest.approx(2 * found[0]["p"]) and found[1]["p_holm"] == 1.0
