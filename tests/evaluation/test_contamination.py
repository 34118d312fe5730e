"""Copies of evaluation texts in training are found, exact, near and reformatted; clean texts are not flagged."""

import random
import unicodedata

import numpy as np
import pytest

from threefold.evaluation import contamination

WORDS = [f"word{i}" for i in range(500)]


def sentences(count: int, length: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


CLEAN, TRAINED = sentences(40, 30, 1), sentences(400, 60, 2)


def planted(text: str) -> list[str]:
    """The training texts, one of them with `text` in its middle."""
    return [*TRAINED[:7], f"{TRAINED[7]}\n{text}\n{TRAINED[8]}", *TRAINED[9:]]


def test_clean_texts_are_not_flagged():
    found = contamination.shares(CLEAN, TRAINED)
    assert not contamination.flagged(found).any() and found.max() == 0
    assert contamination.counts(found) == {"copies": 0, "near_copies": 0, "clean": 40, "too_short": 0}


@pytest.mark.parametrize(
    ("copy", "kind"),
    [
        (lambda text: text, "copies"),
        (lambda text: text.upper().replace(" ", ",\n  "), "copies"),
        (lambda text: text.replace(text.split()[15], "other"), "near_copies"),
        (lambda text: " ".join(text.split()[:24]), "near_copies"),
    ],
    ids=["exact", "reformatted", "a word changed", "its beginning"],
)
def test_a_planted_copy_is_found(copy, kind):
    found = contamination.shares(CLEAN, planted(copy(CLEAN[5])))
    assert contamination.flagged(found).nonzero()[0].tolist() == [5]
    assert contamination.counts(found)[kind] == 1


def test_the_share_is_that_of_its_eight_grams():
    half = contamination.shares(CLEAN, planted(" ".join(CLEAN[5].split()[:15])))  # 8 of 23 eight-grams
    assert half[5] == pytest.approx(8 / 23)
    assert np.isnan(contamination.shares(["too short to tell", ""], TRAINED)).all()
    assert np.isnan(contamination.shares(["one two three four five six seven eight"], [])).all()


def test_every_training_stage_is_counted_by_itself():
    trained = {"pretrain": planted(CLEAN[0]), "sft": planted(CLEAN[1]), "dpo": TRAINED}
    sets = {"first": CLEAN[:1], "rest": CLEAN[1:], "none": []}
    by_set = contamination.against(sets, trained)
    copies = {name: [found[stage]["copies"] for stage in trained] for name, (found, _) in by_set.items()}
    assert copies == {"first": [1, 0, 0], "rest": [0, 1, 0], "none": [0, 0, 0]}
    assert {name: flags.nonzero()[0].tolist() for name, (_, flags) in by_set.items()} == {
        "first": [0], "rest": [0], "none": []
    }  # fmt: skip


CHANGES = [
    str.upper,
    str.title,
    lambda text: f"  {text} ...",
    lambda text: f"\u201c{text}\u201d!",
    lambda text: text.replace(" ", ", "),
    lambda text: text.replace("'", "\u2019").replace(" ", "\n\t"),
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in text),  # full-width letters
]
SPOKEN = ["haha", "oh no", "that's true", "caf\u00e9?", "what play was it", *(sentence[:40] for sentence in CLEAN)]


@pytest.mark.parametrize("change", CHANGES)
def test_every_prompt_that_is_in_training_but_for_case_and_punctuation_is_found(change):
    rng = random.Random(3)
    replies = [[" ".join(rng.choices(WORDS, k=5)) for _ in SPOKEN] for _ in range(2)]
    half = len(SPOKEN) // 2
    evaluated = [f"{prompt}\n{reply}" for prompt, reply in zip(SPOKEN, replies[0], strict=True)]
    trained = [change(prompt) for prompt in SPOKEN[:half]]
    texts = [f"{prompt}\n{reply}" for prompt, reply in zip(trained, replies[1][:half], strict=True)]
    counts, flags = contamination.against({"p": evaluated}, {"sft": texts}, {"p": SPOKEN}, {"sft": trained})["p"]
    assert flags.tolist() == [True] * half + [False] * (len(SPOKEN) - half) and counts["sft"]["copies"] == half


@pytest.mark.parametrize(
    ("one", "other"),
    [("7-5", "7+5"), ("7*5", "7-5"), ("7 / 5", "7 % 5"), ("-5", "5"), ("x = 5", "x 5"), ("?", "..."), ("yes", "no"),
     ("\u0915\u093f", "\u0915\u0940"), ("x - 5", "x * 5"), ("12", "1 2"), ("it", "its"),
     ("1.5", "1 5"), ("1.5", "15"), ("3,000", "3"), ("1,5", "15"), ("3.000", "3,000")],
)  # fmt: skip
def test_other_texts_are_not_the_same(one, other):
    assert contamination.same([one, one], [other, one.upper()]).tolist() == [True, True]
    assert contamination.same([one], [other]).tolist() == [False]


@pytest.mark.parametrize(
    ("one", "other"),
    [("don't", "dont"), ("Don\u2019t I?", "dont i"), ("3,000", "3000"), ("1,234,567.5!", "1234567.5"),
     ("well-known", "well known"), ("well-known", "wellknown"), ("I don't: well-known.", "i dont well known")],
)  # fmt: skip
def test_signs_within_a_word_or_a_number_do_not_count(one, other):
    assert contamination.same([one, other], [other]).tolist() == [True, True]
    assert contamination.same([other], [one]).tolist() == [True]


def test_a_text_too_short_for_eight_grams_is_a_copy_of_its_like_alone():
    short, trained = ["7+5\n12", "Spell  DOG\nd o g", "7-5\n2", "spell do"], ["7+5\n12", "spell dog d o g", *TRAINED]
    found = contamination.shares(short, trained)
    assert contamination.flagged(found).tolist() == [True, True, False, False]
    assert contamination.counts(found) == {"copies": 2, "near_copies": 0, "clean": 0, "too_short": 2}
    assert [contamination.long_enough(text) for text in (CLEAN[0], "a b c d e f g", "a b, c d. e f g h")] == [1, 0, 1]
