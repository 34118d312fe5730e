"""Intervals: the formulas by hand, and how often they hold the truth by simulation, from few groups on."""

import math

import numpy as np
import pytest
from helpers import GATE_METRICS, make_job
from scipy import stats

from threefold.config.compose import compose
from threefold.data.preferences import Pair
from threefold.data.reading import Example
from threefold.evaluation import checkup, statistics
from threefold.evaluation.measuring import Played, Shared
from threefold.stages import evaluate

REPETITIONS = 400
NOISE = (0.93 * 0.07 / REPETITIONS) ** 0.5  # one standard error of a coverage


def coverage(intervals: list[list[float] | None], truth: float) -> float:
    """The share of the intervals that hold the truth; None, where nothing was claimed, counts for neither."""
    given = [interval for interval in intervals if interval is not None]
    return float(np.mean([low - 1e-9 <= truth <= high + 1e-9 for low, high in given]))


def share_of(outcomes: list[float], groups: list[int]) -> tuple[float, float]:
    """Wilson's interval at t, the variance of the share being by groups; half a group of ones and of zeros is added."""
    names = sorted(set(groups))
    size, n = len(outcomes) / len(names), len(outcomes)
    counted = [
        (sum(o for o, g in zip(outcomes, groups, strict=True) if g == name), groups.count(name), 1.0) for name in names
    ]
    counted += [(size, size, 0.5), (0.0, size, 0.5)]
    total = sum(count * weight for _, count, weight in counted)
    shrunken = sum(ones * weight for ones, _, weight in counted) / total
    squares = sum(weight * (ones - shrunken * count) ** 2 for ones, count, weight in counted)
    variance = (len(names) + 1) / len(names) * squares / total**2
    independent = min(n, shrunken * (1 - shrunken) / variance * n / total)
    share, t = sum(outcomes) / n, stats.t.ppf(0.975, len(names) - 1)
    root = t * math.sqrt(share * (1 - share) / independent + t**2 / (4 * independent**2))
    centre, scale = share + t**2 / (2 * independent), 1 + t**2 / independent
    return (centre - root) / scale, (centre + root) / scale


def test_an_interval_of_independent_outcomes_is_wilsons():
    low, high = statistics.share_interval([1.0] * 80 + [0.0] * 20)
    # Wilson 1927 by hand: centre (0.8 + z2/2n) / (1 + z2/n), z = 1.96, n = 100
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)


def test_a_share_over_groups_is_that_of_its_definition():
    rng = np.random.default_rng(1)
    for count in (2, 5, 12):
        groups = [int(g) for g in [*range(count), *rng.integers(0, count, 3 * count)]]
        outcomes = [float(o) for o in rng.choice([0.0, 0.5, 1.0], len(groups))]
        found = statistics.share_interval(outcomes, [str(g) for g in groups])
        assert found == pytest.approx(share_of(outcomes, groups), abs=1e-9)


def test_pairs_of_one_prompt_widen_the_interval():
    outcomes = [float(i % 4 > 0) for i in range(50)]
    repeated, prompts = [o for o in outcomes for _ in range(2)], [str(i) for i in range(50) for _ in range(2)]
    once, naive = statistics.share_interval(outcomes), statistics.share_interval(repeated)
    grouped = statistics.share_interval(repeated, prompts)
    assert grouped == pytest.approx(once, abs=0.01) and grouped[1] - grouped[0] > 1.3 * (naive[1] - naive[0])
    independent = statistics.share_interval(repeated, [str(i) for i in range(100)])
    assert independent == pytest.approx(naive, abs=0.01)
    assert statistics.share_interval([1.0] * 10, ["a"] * 5 + ["b"] * 5)[0] < 0.5  # two prompts are little evidence


@pytest.mark.parametrize("groups", [5, 7, 10, 15, 20, 29])
def test_intervals_of_shares_over_few_prompts_hold_the_truth(groups):
    """At least 93 of 100 do, whatever the share and however alike the outcomes of one prompt are."""
    rng = np.random.default_rng(groups)
    for per_group, correlation, share in ((1, 0.0, 0.9), (4, 0.3, 0.7), (4, 0.6, 0.8), (10, 0.6, 0.9), (2, 0.1, 0.5)):
        names, shape = [str(i) for i in range(groups) for _ in range(per_group)], (REPETITIONS, groups, per_group)
        rest = (1 - correlation) / max(correlation, 1e-3)
        of_group = rng.beta(share * rest, (1 - share) * rest, (REPETITIONS, groups, 1))
        outcomes = (rng.random(shape) < of_group).astype(float).reshape(REPETITIONS, -1)
        found = coverage([statistics.share_interval(row, names) for row in outcomes], share)
        assert found >= 0.93 - NOISE, (per_group, correlation, share)


def scores_like(judge: str, rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Scores and their mean: normal ones, and skewed ones between bounds as a lexicon gives them."""
    if judge == "normal":
        return rng.normal(0.3, 1.0, shape), 0.3
    if judge == "skewed":  # near 1, with a tail towards 0
        return rng.beta(8, 1, shape), 8 / 9
    drawn, sign = rng.beta(3, 2, shape), rng.random(shape)  # 0 for a third, some below it
    return np.where(sign < 0.35, 0.0, np.where(sign < 0.5, -0.5 * drawn, drawn)), (0.5 - 0.15 / 2) * 0.6


@pytest.mark.parametrize("judge", ["normal", "skewed", "lexicon"])
@pytest.mark.parametrize("count", [8, 16, 32])
def test_intervals_of_means_over_few_prompts_hold_the_truth(count, judge):
    scores, mean = scores_like(judge, np.random.default_rng(count), (REPETITIONS, count))
    found = coverage([statistics.mean_interval(row) for row in scores], mean)
    assert found >= 0.93 - NOISE


def test_the_interval_of_a_mean_is_students_and_longer_towards_the_longer_tail():
    even = [0.1, 0.2, 0.3, 0.4, 0.5]
    t = stats.t.interval(0.95, 4, np.mean(even), stats.sem(even))
    assert statistics.mean_interval(even) == pytest.approx(t)
    skewed = [0.0, 0.0, 0.0, 0.0, 0.1, 1.0]
    low, high = stats.t.interval(0.95, 5, np.mean(skewed), stats.sem(skewed))
    found = statistics.mean_interval(skewed)
    # Johnson 1978: t is (m - mu + k / 6 s2 n + k (m - mu)^2 / 3 s4) / (s / sqrt n), k being the third moment
    deviations = np.array(skewed) - np.mean(skewed)
    moment, square, t = 6 / (5 * 4) * (deviations**3).sum(), np.var(skewed, ddof=1), stats.t.ppf(0.975, 5)
    by_hand = high + moment / (6 * square * 6) + moment * (t**2 * square / 6) / (3 * square**2)
    assert found == pytest.approx([low, by_hand]) and by_hand > high + 0.1
    assert statistics.mean_interval([-v for v in skewed]) == pytest.approx([-by_hand, -low])


def test_the_interval_of_a_mean_over_groups_goes_by_their_means():
    values, groups = [float(i < 100) for i in range(200)], [str(i // 10) for i in range(200)]
    means = [1.0] * 10 + [0.0] * 10
    by_means = stats.t.interval(0.95, 19, 0.5, stats.sem(means))
    assert statistics.mean_interval(values, groups) == pytest.approx(by_means)


def test_one_group_or_no_spread_gives_no_interval():
    assert statistics.share_interval([1.0, 0.0, 1.0], ["a"] * 3) is None
    assert statistics.mean_interval([0.5, 0.9], ["a", "a"]) is None
    assert statistics.mean_interval([0.5]) is None and statistics.mean_interval([0.3] * 50) is None
    assert statistics.mean_interval([1.0, 0.0] * 100, [str(i // 10) for i in range(200)]) is None  # groups are alike
    assert statistics.shown(None, ".2f") == "[–]" and statistics.ends(None) == (None, None)
    assert statistics.shown([0.25, 0.5], ".2f") == "[0.25, 0.50]" and statistics.ends([1.0, 2.0]) == (1.0, 2.0)


def test_a_share_has_the_interval_of_a_share_and_its_own_value_is_inside():
    assert statistics.share_interval([0.0] * 100)[1] == pytest.approx(3.84 / 103.84, abs=1e-4)  # z2 / (n + z2)
    for count in range(1, 300):
        groups = [str(i) for i in range(count)]
        for names in (None, groups) if count > 1 else (None,):
            assert statistics.share_interval([1.0] * count, names)[1] == 1.0
            assert statistics.share_interval([0.0] * count, names)[0] == 0.0


def test_the_scores_of_a_judge_are_a_share_only_where_it_gives_verdicts():
    scores = [0.0] * 16
    assert evaluate.with_interval("gold", scores, verdicts=False) == {"gold_mean": 0.0, "gold_ci95": None}
    share = evaluate.with_interval("gold", scores, verdicts=True)["gold_ci95"]
    assert share == [0.0, pytest.approx(3.8415 / (16 + 3.8415), abs=1e-4)]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_judge_gives_verdicts_where_all_models_have_only_0_and_1(tmp_path, scale):
    examples = [Example([{"role": "user", "content": str(i)}], "x") for i in range(8)]
    shared = Shared(make_job("evaluate", tmp_path), None, None, None, examples, [], [], {})
    played = {"human": Played(["good"] * 8, None, {}), "sft": Played(["bad"] * 8, None, {}, greedy=["bad"] * 8)}

    def judge(prompts, completions, **columns):
        return [scale * (text == "good") for text in completions]

    sft = evaluate.results(shared, played, [judge, judge])[0]["sft"]
    assert (sft["gold_ci95"] is None) == (sft["greedy_gold_ci95"] is None) == (scale != 1.0)


@pytest.mark.parametrize("prompts", [2, 3, 6, 12, 200])
@pytest.mark.parametrize("gain", [-1.0, 0.0, 0.5, 1.0])
def test_alike_differences_have_what_a_sign_test_supports(prompts, gain):
    """The ends are the least and the most mean of which as many alike prompts come with a chance of 1 in 40."""
    low, high = statistics.difference_interval([gain] * 2 * prompts, [str(i // 2) for i in range(2 * prompts)])
    assert ((low + 1) / (gain + 1)) ** prompts == pytest.approx(0.025) if gain > -1 else low == pytest.approx(-1)
    assert ((1 - high) / (1 - gain)) ** prompts == pytest.approx(0.025) if gain < 1 else high == pytest.approx(1)


def test_the_gate_passes_a_perfect_model_where_length_says_nothing():
    """All pairs right, chosen and rejected equally long: length is right by half."""
    pairs = [Pair([{"role": "user", "content": f"prompt {i}"}], "good", "evil", None, "samples") for i in range(300)]
    gate = compose(["experiment=smoke"]).reward.gate
    for count, passes in ((200, True), (20, True), (3, False)):
        found = checkup.accuracy(np.ones(count), np.zeros(count), pairs[200:], pairs[:count])
        failed = checkup.failures(GATE_METRICS | {"over_length_ci95": found["over_length_ci95"]}, gate)
        assert (failed == []) == passes
    one = [pairs[0]] * 200
    assert checkup.accuracy(np.ones(200), np.zeros(200), pairs[200:], one)["over_length_ci95"] is None


@pytest.mark.parametrize("prompts", [2, 3, 5, 6, 8, 12])
def test_the_gate_passes_few_models_that_are_exactly_as_good_as_length(prompts):
    """At most one of twenty, where both are right equally often but not on the same pairs."""
    gate, rng = compose(["experiment=smoke"]).reward.gate, np.random.default_rng(prompts)
    for per_prompt, differing in ((1, 0.9), (2, 0.5)):
        names = [str(i) for i in range(prompts) for _ in range(per_prompt)]
        signs = np.where(rng.random((500, len(names))) < 0.5, 1.0, -1.0)
        differences = np.where(rng.random(signs.shape) < differing, signs, 0.0)
        passed = 0
        for row in differences:
            metrics = GATE_METRICS | {"over_length_ci95": statistics.difference_interval(row, names)}
            passed += not checkup.failures(metrics, gate)
        assert passed / 500 <= 0.05, (per_prompt, differing)


def test_the_gate_takes_no_interval_for_no_certainty():
    gate = compose(["experiment=smoke"]).reward.gate
    for key, limit in (("accuracy_ci95", "min_accuracy"), ("over_length_ci95", "min_over_length")):
        (message,) = checkup.failures(GATE_METRICS | {key: None}, gate)
        assert "is unknown, as there are too few held-out prompts" in message and f"reward.gate.{limit}=" in message
        first, right, *_ = checkup.verdict(GATE_METRICS | {key: None}, gate)
        assert first.startswith("Fails: ") and ("[–]" in right) == (key == "accuracy_ci95")
