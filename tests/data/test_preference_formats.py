"""Every format of preferences read into pairs: prompt, chosen, rejected, margin, key and split; ties counted."""

import gzip
import itertools
import json
import math
import random
from collections import Counter

import pytest
from data_helpers import DATA, A, Q, bucket, everything, lines, said, source

from threefold.columns import UnusableRowError
from threefold.config.compose import compose
from threefold.data import reading
from threefold.data.formats import FORMATS
from threefold.data.preferences import PASSAGE_CHARS, PREFERENCE_FORMATS
from threefold.errors import UserError

HH, FINEGRAINED = DATA / "hh-rlhf", DATA / "finegrained-rlhf/dev_first300.jsonl.gz"
SYSTEM, B = said("system", "s"), said("assistant", "b")


def pair(chosen="a", rejected="b", prompt=(Q,), key="q", **margin):
    return {"key": key, "prompt": list(prompt), "chosen": chosen, "rejected": rejected, **margin}


def scored(*replies):
    return {"instruction": "q", "completions": [{"response": r, "overall_score": s, "model": "m"} for r, s in replies]}


def panda(*labels, **columns):
    votes = {f"annotator{i}": label for i, label in enumerate(labels, start=1)}
    return {"instruction": "q", "input": "", "response1": "a", "response2": "b", **votes, **columns}


def battle(winner="model_a", **columns):
    return {"prompt": [Q], "response_a": "a", "response_b": "b", "winner": winner, **columns}


def talks(winner, a, b):
    return {"conversation_a": a, "conversation_b": b, "winner": winner, "model_a": "x", "model_b": "y"}


def predictions(votes, *replies, **columns):
    answers = {f"prediction {i}": reply for i, reply in enumerate(replies, start=1)}
    return {"question": "q", "passages": [], **answers, "preference": votes, "gold": "g", **columns}


# format, raw row, the pairs, what is dropped
GOOD = [
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, [pair()], {}),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}, [pair(margin=2.0)], {}),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": None}, [pair()], {}),
    ("preference", {"prompt": [Q], "chosen": [A], "rejected": [B]}, [pair()], {}),
    ("preference", {"chosen": [Q, A], "rejected": [Q, B]}, [pair()], {}),
    ("preference", {"prompt": None, "chosen": [Q, A], "rejected": [Q, B]}, [pair()], {}),
    (
        "preference",
        {"chosen": [SYSTEM, Q, A, Q, A], "rejected": [SYSTEM, Q, A, Q, B]},
        [pair(prompt=[SYSTEM, Q, A, Q])],
        {},
    ),
    (
        "preference_dialogues",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"},
        [pair()],
        {},
    ),
    ("ultrafeedback", scored(("b", 2), ("a", 4.5)), [pair(margin=2.5)], {}),
    (
        "ultrafeedback",
        scored(("a", 9), ("b", 7), ("c", 7), ("b", 1)),
        [pair(margin=2.0), pair("a", "c", margin=2.0), pair(margin=8.0), pair("c", "b", margin=6.0)],
        {"tie": 1, "same reply twice": 1},
    ),
    ("ultrafeedback", {"prompt": "q", **scored(("a", "3"), ("b", "1.5"))}, [pair(margin=1.5)], {}),
    (
        "ultrafeedback",
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 8.0, "score_rejected": 3.5},
        [pair(margin=4.5)],
        {},
    ),
    (
        "ultrafeedback",
        {"prompt": "q", "chosen": [SYSTEM, Q, A], "rejected": [SYSTEM, Q, B]},
        [pair(prompt=[SYSTEM, Q])],
        {},
    ),
    (
        "ultrafeedback",
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 5, "score_rejected": 5},
        [],
        {"tie": 1},
    ),
    ("pandalm", panda(1, 1, 1), [pair(margin=1.0)], {}),
    ("pandalm", panda(2, 2, 0), [pair("b", "a", margin=2 / 3)], {}),
    ("pandalm", panda(1, 2, 1), [pair(margin=1 / 3)], {}),
    ("pandalm", panda("1", "1.0", ""), [pair(margin=1.0)], {}),
    ("pandalm", panda(0, 0, 1), [], {"tie": 1}),
    ("pandalm", panda(0, 1, 2), [], {"tie": 1}),
    ("pandalm", panda(1, 2), [], {"tie": 1}),
    ("pandalm", panda(1, response2="a"), [], {"same reply twice": 1}),
    ("pandalm", panda(1, input=" x "), [pair(prompt=[said("user", "q\n\nx")], key="q\n\nx", margin=1.0)], {}),
    ("pandalm", panda(1, input=math.nan), [pair(margin=1.0)], {}),
    ("arena", battle(), [pair()], {}),
    ("arena", battle("model_b", prompt="q"), [pair("b", "a")], {}),
    ("arena", battle("tie"), [], {"tie": 1}),
    ("arena", battle("tie (bothbad)"), [], {"tie": 1}),
    ("arena", battle(response_b="a"), [], {"same reply twice": 1}),
    ("arena", talks("model_b", [Q, A], [Q, B]), [pair("b", "a")], {}),
    ("arena", talks("model_a", [Q, A, Q, A], [Q, A, Q, B]), [pair(prompt=[Q, A, Q])], {}),
    ("arena", talks("model_a", [Q, A, Q, A], [Q, B, Q, B]), [], {"an earlier reply differs": 1}),
    (
        "unpaired",
        {"prompt": "q", "completion": "a", "label": True},
        [{"key": "q", "prompt": [Q], "reply": "a", "label": True, "messages": [Q, A], "symmetric": False}],
        {},
    ),
    ("finegrained_rlhf", predictions([2], "b", "a"), [pair()], {}),
    (
        "finegrained_rlhf",
        predictions([1, 0, 2, 1, 2, 1], "a", "b", "c", "d"),
        [pair(), pair("d", "a"), pair("b", "c"), pair("d", "b"), pair("c", "d")],
        {"tie": 1},
    ),
    ("finegrained_rlhf", predictions([1, 1, 1], "a", "a", "b"), [pair(), pair()], {"same reply twice": 1}),
    (
        "finegrained_rlhf",
        predictions([1], "a", "b", passages=[["T", "T\n\nOne.", "Two."], ["U", "Three."]]),
        [pair(prompt=[said("user", "T: One. Two.\n\nU: Three.\n\nq")])],
        {},
    ),
]  # fmt: skip

DEFECTS = [
    ("preference", {"chosen": [Q, A], "rejected": [A, B]}, "chosen and rejected do not share their prompt"),
    ("preference", {"chosen": [A], "rejected": [B]}, "no column prompt"),
    ("preference", {"prompt": "q", "chosen": [Q], "rejected": "b"}, "chosen does not end with an assistant's reply"),
    ("preference", {"prompt": "x", "chosen": [Q, A], "rejected": [Q, B]}, "chosen or rejected does not go on"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0}, "margin is not above 0"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan}, "margin is not a number"),
    ("ultrafeedback", {"instruction": "q"}, "no column completions"),
    ("ultrafeedback", {"completions": scored(("a", 1), ("b", 2))["completions"]}, "no column prompt"),
    ("ultrafeedback", scored(("a", 1)), "fewer than two completions"),
    ("ultrafeedback", scored(("a", 1), ("b", None)), "overall_score is not a number"),
    ("ultrafeedback", scored(("a", 1), ("b", True)), "overall_score is not a number"),
    ("ultrafeedback", scored(("a", 1), ("", 2)), "response is empty"),
    ("ultrafeedback", {"instruction": "q", "completions": ["a", "b"]}, "completions is not a list of objects"),
    (
        "ultrafeedback",
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "score_chosen": 1, "score_rejected": 2},
        "score_rejected is above score_chosen",
    ),
    ("pandalm", panda(), "no column annotator1"),
    ("pandalm", panda(1, 3), "an annotator's label is not 0, 1 or 2"),
    ("pandalm", panda(1, True), "an annotator's label is not 0, 1 or 2"),
    ("pandalm", panda(1, response1=None), "response1 is not text"),
    ("arena", {"prompt": "q", "response_a": "a", "response_b": "b"}, "no column winner"),
    ("arena", battle("model_c"), "winner is not model_a, model_b, tie, tie (bothbad)"),
    ("arena", battle(["model_a"]), "winner is not model_a, model_b, tie, tie (bothbad)"),
    ("arena", talks("model_a", [Q, A], [said("user", "x"), B]), "conversation_a and conversation_b do not share"),
    ("arena", talks("model_a", [Q, A], [Q]), "conversation_b does not end with an assistant's reply"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "\ud800"}, "rejected has half of a character"),
    ("unpaired", {"prompt": "q", "completion": "a"}, "no column label"),
    ("finegrained_rlhf", predictions([], "a"), "fewer than two predictions"),
    ("finegrained_rlhf", predictions([1, 1, 1], "a", "b"), "preference does not hold one vote on each two predictions"),
    ("finegrained_rlhf", predictions([3], "a", "b"), "a vote of preference is not 0, 1 or 2"),
    ("finegrained_rlhf", predictions(None, "a", "b"), "preference does not hold one vote on each two predictions"),
    ("finegrained_rlhf", predictions([1], "a", "b", passages="p"), "passages is not a list of lists of text"),
]


@pytest.mark.parametrize(("kind", "raw", "pairs", "dropped"), GOOD)
def test_what_comes_out_of_a_row(kind, raw, pairs, dropped, tmp_path):
    counts = Counter()
    assert (FORMATS[kind](raw, counts), dict(counts)) == (pairs, dropped)
    if not pairs:
        return
    found = source(lines(tmp_path / "rows.jsonl", [raw]), kind)
    assert everything(found) == pairs
    assert reading.load(found, "train").unusable == {why: {"count": n} for why, n in dropped.items()}


@pytest.mark.parametrize(("kind", "raw", "reason"), DEFECTS)
def test_each_defect_has_its_reason(kind, raw, reason):
    with pytest.raises(UnusableRowError) as caught:
        FORMATS[kind](raw, Counter())
    assert str(caught.value).startswith(reason)


def test_every_format_of_preferences_is_tried():
    assert {kind for kind, *_ in GOOD} == set(PREFERENCE_FORMATS) <= set(FORMATS)


def test_the_majority_of_annotators_decides_as_counting_says():
    for count in (1, 2, 3, 5):
        for labels in itertools.product((0, 1, 2), repeat=count):
            found = FORMATS["pandalm"](panda(*labels), Counter())
            votes = [labels.count(label) for label in (0, 1, 2)]
            winners = [label for label in (0, 1, 2) if votes[label] == max(votes)]
            assert [row["chosen"] for row in found] == (["?ab"[winners[0]]] if len(winners) == 1 and winners[0] else [])
            assert all(0 < row["margin"] <= 1 for row in found)


def test_votes_on_predictions_are_in_the_order_of_the_first_and_then_the_second():
    ranks = {"a": 3, "b": 1, "c": 2, "d": 0, "e": 4}
    votes = [1 if ranks[x] < ranks[y] else 2 for x, y in itertools.combinations("abcde", 2)]
    found = FORMATS["finegrained_rlhf"](predictions(votes, *"abcde"), Counter())
    assert len(found) == 10 and all(ranks[row["chosen"]] < ranks[row["rejected"]] for row in found)


def test_passages_are_shortened_by_whole_sentences_of_each_in_turn():
    passages = [["T", "a" * 300, "b" * 190, "c"], ["U", "d" * 100], ["V"]]
    (row,) = FORMATS["finegrained_rlhf"](predictions([1], "a", "b", passages=passages), Counter())
    assert row["prompt"][0]["content"] == f"T: {'a' * 300} {'b' * 190} c\n\nU: {'d' * 100}\n\nq"
    chance = random.Random(1)
    for _ in range(200):
        texts = [
            [f"T{i}", *("x" * chance.randrange(1, 400) for _ in range(chance.randrange(5)))]
            for i in range(chance.randrange(5))
        ]
        (row,) = FORMATS["finegrained_rlhf"](predictions([1], "a", "b", passages=texts), Counter())
        *context, question = row["prompt"][0]["content"].split("\n\n")
        assert (question, row["key"]) == ("q", "q")
        kept = {text.split(": ")[0]: text.split(": ")[1].split(" ") for text in context}
        assert sum(len(s) for said in kept.values() for s in said) <= PASSAGE_CHARS
        counts = [len(kept.get(title, [])) for title, *_ in texts]
        for (title, *said_), count in zip(texts, counts, strict=True):
            assert kept.get(title, []) == said_[:count]
            # none lags more than a sentence behind, unless it has no more
            assert count == len(said_) or count >= max(counts) - 1


def test_only_ties_are_no_pairs_and_no_defect(tmp_path):
    rows = [battle("tie")] * 99 + [battle()]
    found = source(lines(tmp_path / "rows.jsonl", rows), "arena", max_unusable_share=0.0)
    assert len(everything(found)) == 1
    assert reading.load(found, "train").unusable == {"tie": {"count": 99}}
    with pytest.raises(UserError, match=r"none of its 3 rows is left \(tie: 3\)"):
        reading.load(source(lines(tmp_path / "ties.jsonl", [battle("tie")] * 3), "arena"), "train")


VOTE = {
    "pair": "7", "prompt": [SYSTEM, Q], "response_a": "a", "response_b": "b", "model_a": "sft", "model_b": "ppo",
    "winner": "model_b", "split": "test", "labeller": "me", "reason": "", "time": "2026-01-01T00:00:00",
}  # fmt: skip


def test_a_row_that_names_its_split_belongs_to_it(tmp_path):
    votes = [
        VOTE | {"pair": str(i), "prompt": f"q {i}", "split": ("train", "test", "validation", None, "")[i % 5]}
        for i in range(500)
    ]
    found = source(lines(tmp_path / "votes.jsonl", votes), "arena")
    for split, wanted in {"test": range(5), "validation": range(5, 10), "train": range(10, 100)}.items():
        keys = [row["key"] for row in reading.load(found, split).rows]
        assert keys == [
            v["prompt"] for v in votes if v["split"] == split or (not v["split"] and bucket(v["prompt"]) in wanted)
        ]
    assert {row["split"] for row in reading.load(found, "test").rows if "split" in row} == {"test"}


def test_a_split_of_another_name_is_a_defect_and_files_of_splits_decide_alone(tmp_path):
    file = lines(tmp_path / "votes.jsonl", [VOTE, VOTE | {"split": "dev"}])
    with pytest.raises(UserError, match=r"split is not test, validation, train \(first in votes.jsonl, line 2\)"):
        reading.load(source(file, "arena"), "train")
    found = source(tmp_path, "arena", splits={"train": "votes.jsonl", "test": "votes.jsonl"})
    assert len(reading.load(found, "test").rows) == 2 and "split" not in reading.load(found, "test").rows[0]


def test_a_prompt_is_a_text_once_and_a_chosen_reply_to_it_an_example_once(tmp_path):
    raw = predictions([1, 1, 1, 1, 1, 1], "aa", "bb", "cc", "dd")
    found = source(lines(tmp_path / "rows.jsonl", [raw]), "finegrained_rlhf")
    assert reading.texts(everything(found)) == ["q\naa"]
    dialogue = compose(["data=finegrained"]).data.dialogue
    replies = [e.reply for split in ("train", "validation", "test") for e in reading.examples(found, split, dialogue)]
    assert replies == ["aa", "bb", "cc"]


def raw_rows(file):
    with gzip.open(file) as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.skipif(not HH.is_dir(), reason=f"{HH} is not there")
def test_human_comparisons_load_with_what_was_left_out(monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", str(DATA))
    preferences = compose(["experiment=hh"]).data.preferences
    loaded = {split: reading.load(preferences, split) for split in ("train", "validation", "test")}
    raw = {split: raw_rows(HH / f"{split}.jsonl.gz") for split in ("train", "test")}
    usable = len(raw["train"]) - sum(entry["count"] for entry in loaded["train"].unusable.values())
    assert len(loaded["train"].rows) + len(loaded["validation"].rows) == usable >= 0.99 * len(raw["train"])
    assert len(loaded["test"].rows) == len(raw["test"]) == 200
    # only numbers of rows in what a failure prints: the texts are offensive in part
    pairs = list(zip(loaded["test"].rows, raw["test"], strict=True))
    for side in ("chosen", "rejected"):
        assert [i for i, (row, given) in enumerate(pairs) if not given[side].rstrip().endswith(row[side])] == []
    assert {(row["prompt"][0]["role"], row["prompt"][-1]["role"]) for row, _ in pairs} == {("user", "user")}


@pytest.mark.skipif(not FINEGRAINED.is_file(), reason=f"{FINEGRAINED} is not there")
def test_human_votes_on_answers_load_with_every_vote_that_is_no_tie(monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", str(DATA))
    preferences = compose(["experiment=finegrained"]).data.preferences
    loaded = {split: reading.load(preferences, split) for split in ("train", "validation", "test")}
    raw = raw_rows(FINEGRAINED)
    votes = [vote for row in raw for vote in row["preference"]]
    assert loaded["train"].unusable == {"tie": {"count": votes.count(0)}}
    pairs = [row for split in loaded.values() for row in split.rows]
    assert len(pairs) == len(votes) - votes.count(0) > 1600
    answers = {row["question"]: [row[f"prediction {i}"].strip() for i in range(1, 5)] for row in raw}
    assert all({pair["chosen"], pair["rejected"]} <= set(answers[pair["key"]]) for pair in pairs)
    assert all(pair["prompt"][0]["content"].endswith(pair["key"]) for pair in pairs)
    # the votes of one person are transitive in this order of the pairs, and in no order that mixes them
    better = {(pair["key"], pair["chosen"], pair["rejected"]) for pair in pairs}
    for question, four in answers.items():
        for a, b, c in itertools.permutations(four, 3):
            assert not ((question, a, b) in better and (question, b, c) in better and (question, c, a) in better)
    assert max(len(pair["prompt"][0]["content"]) for pair in pairs) < PASSAGE_CHARS + 300
    keys = [{pair["key"] for pair in split.rows} for split in loaded.values()]
    assert all(keys) and sum(map(len, keys)) == len(set().union(*keys))
