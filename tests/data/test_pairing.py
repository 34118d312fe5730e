"""Pairs: the better reply is chosen, pairings take what they say, gaps and limits hold, noise is counted."""

import itertools

import numpy as np
import pytest

from threefold.data.pairing import Answer, candidates, judged, labelled, pool_row, taken, usable, with_label_noise
from threefold.data.preferences import Pair

SCORES = {"bad": 0.0, "poor": 0.2, "fine": 0.5, "good": 0.9, "great": 1.0, "mute": None}


def judge(prompts, completions, **columns):
    return [SCORES[text] for text in completions]


def group(prompt, *replies):
    return [Answer([{"role": "user", "content": prompt}], reply, f"model {i}") for i, reply in enumerate(replies)]


def pairs_of(answers, most=100, min_gap=0.0, pairing="best_worst", scored=None, seed=1):
    """What the stage makes of one group: (chosen, rejected) in the order in which pairs are taken."""
    found = candidates(answers, judged([answers], judge)[0], scored)
    found = taken([c for c in found if usable(c, min_gap)], most, pairing, np.random.default_rng(seed))
    return [(pair.chosen, pair.rejected) for pair in (labelled(c, "samples") for c in found)]


def test_the_reply_with_the_higher_score_is_chosen_whatever_the_order():
    for replies in itertools.permutations(["bad", "fine", "great"]):
        found = pairs_of(group("q", *replies))
        assert found[0] == ("great", "bad")
        assert set(found) == {("great", "bad"), ("great", "fine"), ("fine", "bad")}


def test_a_labelled_pair_has_its_prompt_gap_and_source():
    answers = group("q", "bad", "good")
    (candidate,) = candidates(answers, [0.0, 0.9])
    assert labelled(candidate, "people") == Pair(answers[0].prompt, "good", "bad", 0.9, "people")


def test_the_largest_gaps_are_taken_up_to_the_limit():
    wanted = [("great", "bad"), ("good", "bad"), ("great", "poor")]
    assert pairs_of(group("q", *list(SCORES)[:5]), most=3) == wanted


def test_gaps_below_the_minimum_are_left_out_and_the_minimum_is_inclusive():
    # gaps: 0.2, 0.5, 1.0, 0.3, 0.8, 0.5
    found = pairs_of(group("q", "bad", "poor", "fine", "great"), min_gap=0.5)
    assert sorted(found) == [("fine", "bad"), ("great", "bad"), ("great", "fine"), ("great", "poor")]


def test_equal_replies_ties_and_replies_without_a_score_make_no_pair():
    assert set(pairs_of(group("q", "good", "good", "mute", "bad"))) == {("good", "bad")}
    assert pairs_of(group("q", "mute", "good")) == [] == pairs_of(group("q", "good", "good"))
    (tie,) = candidates(group("q", "one", "another"), [1.0, 1.0])
    assert not usable(tie, 0.0)


def test_without_a_judge_every_pair_of_different_replies_is_usable():
    found = candidates(group("q", "one", "two", "two"), None)
    assert [usable(c, 0.3) for c in found] == [True, True, False] and {c.gap for c in found} == {None}


def test_the_judge_sees_every_reply_once_beside_the_conversation_that_it_answers():
    seen = []

    def noting(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return judge(prompts, completions)

    context = [{"role": "system", "content": "topic"}, {"role": "user", "content": "last"}]
    groups = [[Answer(context, "good", "a"), Answer(context, "bad", "a")], [], group("q", "fine")]
    assert judged(groups, noting) == [[0.9, 0.0], [], [0.5]]
    assert seen == [(context, "good"), (context, "bad"), (groups[2][0].prompt, "fine")]


def test_random_pairing_takes_every_pair_equally_often_and_repeats_itself():
    answers, counts = group("q", "bad", "poor", "fine", "good"), {}
    for seed in range(1200):
        (pair,) = pairs_of(answers, most=1, pairing="random", seed=seed)
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 6 and all(abs(count - 200) < 5 * 200**0.5 for count in counts.values())
    assert pairs_of(answers, pairing="random", seed=3) == pairs_of(answers, pairing="random", seed=3)


def test_a_scorer_decides_which_pair_is_best_and_worst_and_the_judge_which_reply_is_better():
    scored = np.array([[3.0, 3.0], [0.0, 0.0], [1.0, 1.0]])  # of bad, fine and great: not the judge's order
    assert pairs_of(group("q", "bad", "fine", "great"), most=1, scored=scored) == [("fine", "bad")]


def test_uncertain_pairing_takes_the_pair_on_which_members_differ_most():
    # members agree that 0 is far better than 1; about 2 they differ
    scored = np.array([[5.0, 5.0], [0.0, 0.0], [-4.0, 3.0]])
    found = pairs_of(group("q", "bad", "fine", "great"), most=2, pairing="uncertain", scored=scored)
    assert set(found) == {("great", "bad"), ("great", "fine")}


@pytest.mark.parametrize("swap", [False, True])
def test_a_pair_for_people_has_both_replies_their_models_and_one_name_in_either_order(swap):
    one, other = group("q", "good", "bad")
    (candidate,) = candidates([one, other], None)
    row = pool_row(candidate, "test", swap)
    sides = {(row["response_a"], row["model_a"]), (row["response_b"], row["model_b"])}
    assert sides == {("good", "model 0"), ("bad", "model 1")} and (row["response_a"] == "bad") == swap
    assert row["split"] == "test" and row["prompt"] == one.prompt
    assert row["pair"] == pool_row(candidate, "test", not swap)["pair"] and len(row["pair"]) == 12
    (different,) = candidates(group("another", "good", "bad"), None)
    assert row["pair"] != pool_row(different, "test", swap)["pair"]


def numbered(count):
    return [Pair([{"role": "user", "content": str(i)}], f"good {i}", f"bad {i}", 0.5, "samples") for i in range(count)]


def test_label_noise_exchanges_about_its_share_and_counts_them():
    pairs = numbered(10_000)
    noisy, flipped = with_label_noise(pairs, 0.2, np.random.default_rng(1))
    exchanged = [i for i, (old, new) in enumerate(zip(pairs, noisy, strict=True)) if old != new]
    assert len(exchanged) == flipped
    assert abs(flipped - 2000) < 5 * (10_000 * 0.2 * 0.8) ** 0.5
    for i in exchanged:
        assert noisy[i] == Pair(pairs[i].prompt, f"bad {i}", f"good {i}", 0.5, "samples")
    # spread over the pairs, not the first ones
    assert abs(sum(i < 5000 for i in exchanged) - flipped / 2) < 5 * flipped**0.5


def test_no_label_noise_changes_nothing_and_a_seed_repeats_itself():
    pairs = numbered(200)
    assert with_label_noise(pairs, 0.0, np.random.default_rng(1)) == (pairs, 0)
    one, two, other = (with_label_noise(pairs, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one == two != other
