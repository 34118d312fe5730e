"""Who sees which pair, what is recorded, skipped and taken back; and how far labellers agree."""

import random
from dataclasses import asdict

import pytest
from pools import a_vote, opened, row, vote_on, write_pool
from sklearn.metrics import cohen_kappa_score

from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.labelling.votes import cohen_kappa, fleiss_kappa, in_words, summary


def test_everybody_sees_the_pairs_in_one_order_and_the_sides_in_their_own(tmp_path, votes):
    labelling = opened(write_pool(tmp_path / "pool.jsonl", [row(i) for i in range(400)]), votes)
    sides = {
        name: [labelling.shown(name, comparison).a_first for comparison in labelling.pool.values()]
        for name in ("anna", "ben")
    }
    for drawn in sides.values():
        assert 160 < sum(drawn) < 240
    assert 160 < sum(a == b for a, b in zip(*sides.values(), strict=True)) < 240
    order = list(labelling.pool)
    assert order != [f"pair-{i}" for i in range(400)]
    assert list(opened(tmp_path / "pool.jsonl", votes, seed=2).pool) != order


def test_labelling_goes_on_where_it_stopped(pool, votes):
    first = opened(pool, votes)
    for choice in ("first", "tie", "skip", "second"):
        vote_on(first, "anna", choice)
    vote_on(first, "ben", "first")
    again = opened(pool, votes)
    assert again.next("anna") == first.next("anna")
    assert asdict(again.progress("anna")) == {"done": 3, "skipped": 1, "total": 12}
    assert again.labellers() == {"anna": 3, "ben": 1}
    assert [again.next(name).comparison.pair for name in ("carl", "ben", "anna")] == [
        list(again.pool)[i] for i in (0, 1, 4)
    ]


def test_sides_are_recorded_as_the_models_of_the_pool(pool, votes):
    labelling = opened(pool, votes)
    meant = {}
    while shown := labelling.next("anna"):
        choice = random.Random(shown.comparison.pair).choice(["first", "second", "tie"])
        meant[shown.comparison.pair] = {"first": shown.first, "second": shown.second, "tie": None}[choice]
        vote_on(labelling, "anna", choice)
    assert len(meant) == 12
    for line in read_lines(votes):
        assert line.get(f"response_{line['winner'][-1]}") == meant[line["pair"]]


def test_undo_takes_back_votes_and_skips_of_oneself_alone(pool, votes):
    labelling = opened(pool, votes)
    seen = labelling.next("anna")
    vote_on(labelling, "anna", "first", "because")
    vote_on(labelling, "ben", "tie")
    assert "last vote is taken back" in labelling.undo("anna")
    assert [line["labeller"] for line in read_lines(votes)] == ["ben"]
    assert labelling.next("anna").comparison == seen.comparison and labelling.next("anna").reason == "because"
    vote_on(labelling, "anna", "second")
    skipped = labelling.next("anna")
    vote_on(labelling, "anna", "skip")
    assert "last skip is taken back" in labelling.undo("anna")
    assert labelling.next("anna").comparison == skipped.comparison
    labelling.undo("anna")
    assert labelling.undo("anna") == "There is nothing to take back."
    assert [line["labeller"] for line in read_lines(votes)] == ["ben"]


def test_undo_reaches_back_behind_a_restart(pool, votes):
    vote_on(opened(pool, votes), "anna", "first")
    again = opened(pool, votes)
    again.undo("anna")
    assert votes.read_bytes() == b"" and again.progress("anna").done == 0


def test_skipped_pairs_come_back_when_asked_for(pool, votes):
    labelling = opened(pool, votes)
    for number in range(12):
        vote_on(labelling, "anna", "skip" if number < 2 else "tie")
    assert labelling.next("anna") is None
    labelling.take_up_skipped("anna")
    assert labelling.next("anna").comparison.pair == next(iter(labelling.pool))
    assert labelling.progress("anna").skipped == 0
    labelling.undo("anna")  # the last pair comes at once, before those that wait
    assert labelling.next("anna").comparison.pair == list(labelling.pool)[11]


def test_nothing_is_recorded_twice_or_for_a_page_out_of_date(pool, votes):
    labelling = opened(pool, votes)
    token = labelling.next("anna").token
    labelling.record("anna", token, "first", "")
    assert "has your answer already" in labelling.record("anna", token, "second", "")
    assert "out of date" in labelling.record("ben", token, "first", "")
    shown = labelling.next("anna")
    other = next(seed for seed in range(2, 99) if opened(pool, votes, seed).shown("anna", shown.comparison).first
                 != shown.first)  # fmt: skip
    assert "out of date" in opened(pool, votes, other).record("anna", shown.token, "first", "")
    assert len(read_lines(votes)) == 1


def test_votes_on_other_pairs_stay_and_votes_on_changed_pairs_are_refused(pool, votes, tmp_path):
    vote_on(opened(pool, votes), "anna", "first")
    other = write_pool(tmp_path / "other.jsonl", [row(i) for i in range(100, 103)])
    labelling = opened(other, votes)
    assert labelling.progress("anna").done == 0 and labelling.undo("anna") == "There is nothing to take back."
    vote_on(labelling, "anna", "tie")
    assert len(read_lines(votes)) == 2
    write_pool(pool, [row(i, response_a="another") for i in range(12)])
    with pytest.raises(UserError, match="with another content than label"):
        opened(pool, votes)


def test_cohen_kappa_is_that_of_scikit_learn():
    generator = random.Random(1)
    for _ in range(50):
        first = generator.choices(["model_a", "model_b", "tie"], [5, 3, 1], k=40)
        second = [a if generator.random() < 0.6 else generator.choice(["model_a", "model_b", "tie"]) for a in first]
        assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))


def test_cohen_kappa_by_hand():
    # 10 pairs, 7 equal; chance 0.6 · 0.5 + 0.4 · 0.5 = 0.5
    first, second = list("aaaaaabbbb"), list("aaaabbabbb")
    assert cohen_kappa(first, second) == pytest.approx((0.7 - 0.5) / 0.5)
    assert cohen_kappa(["tie"] * 5, ["tie"] * 5) is None
    assert cohen_kappa([], []) is None


def test_fleiss_kappa_by_hand():
    # Fleiss' own example (1971 as in Wikipedia's table): 10 subjects, 14 raters, 5 categories, kappa 0.210
    table = ["0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
             "6 5 2 1 0", "0 2 2 3 7"]  # fmt: skip
    answers = [[c for c, n in zip("abcde", line.split(), strict=True) for _ in range(int(n))] for line in table]
    assert fleiss_kappa(answers) == pytest.approx(0.210, abs=5e-4)
    # two pairs, three labellers: P = (1 + 1/3) / 2, chance (5/6)² + (1/6)²
    assert fleiss_kappa([list("aaa"), list("aab")]) == pytest.approx((2 / 3 - 26 / 36) / (1 - 26 / 36))
    assert fleiss_kappa([]) is None


def test_the_summary_counts_shared_pairs_alone():
    votes = [a_vote(i, "anna", "model_a" if i % 2 else "tie") for i in range(40)]
    assert summary(votes) == []
    votes += [a_vote(i, "ben", "model_a" if i % 2 else "tie") for i in range(5, 45)]
    [two] = summary(votes)
    assert (two.labellers, two.shared, two.agreeing, two.kappa) == (("anna", "ben"), 35, 1, 1)
    assert in_words(two) == "anna and ben agree on 100% of 35 shared pairs; Cohen’s kappa is 1.00."
    votes.append(a_vote(7, "carl", "tie"))
    everybody, *twos = summary(votes)
    assert everybody.shared == 1 and [two.labellers for two in twos] == [
        ("anna", "ben"),
        ("anna", "carl"),
        ("ben", "carl"),
    ]
    assert "Fleiss’" in in_words(everybody) and "Fewer than 30" in in_words(everybody)
    assert in_words(summary([a_vote(1, "a"), a_vote(2, "b")])[0]).endswith("no pair in common yet.")
