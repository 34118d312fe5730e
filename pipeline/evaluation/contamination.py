"""Whether texts of the evaluation occur in what was trained on: word n-grams in common, whatever the formatting."""

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

WORDS = 8  # of an n-gram: long enough that two people do not write the same by chance
NEAR = 0.5  # share of a text's n-grams in training from which it counts as a near copy
SLOTS = 2**30  # of the hash of n-grams; a million different ones collide with one in a thousand


def shares(evaluated: list[str], trained: list[str], bar: Any = None) -> np.ndarray:
    """The share of each evaluated text's different word 8-grams that occur in a trained text [evaluated].

    Case, punctuation and white space do not count, so a reformatted copy is a copy. A text without an 8-gram has 1
    where it is `same` as a trained text, and otherwise nan.
    """
    grams = HashingVectorizer(
        preprocessor=_folded, token_pattern=r"\w+", ngram_range=(WORDS, WORDS), n_features=SLOTS, binary=True,
        norm=None, alternate_sign=False,
    )  # fmt: skip
    if not evaluated or not trained:
        return np.full(len(evaluated), np.nan)
    # sorted and looked up: numpy's unique, and isin by it, hash millions of values far more slowly
    trained_grams = np.append(np.sort(grams.transform(read(trained, bar)).indices), SLOTS)
    of_text = grams.transform(evaluated)
    occurs = trained_grams[np.searchsorted(trained_grams, of_text.indices)] == of_text.indices
    counts = np.diff(of_text.indptr)
    sums = np.add.reduceat(np.append(occurs, 0), np.minimum(of_text.indptr[:-1], len(occurs)))
    short = np.where(same(evaluated, trained), 1.0, np.nan)
    return np.where(counts > 0, sums / np.maximum(counts, 1), short)


def read(texts: list[str], bar: Any) -> Iterator[str]:
    """The texts, counted by a progress bar where there is one."""
    for text in texts:
        yield text
        if bar is not None:
            bar.update(1)


def long_enough(text: str) -> bool:
    """Whether a text has a word 8-gram."""
    return len(re.findall(r"\w+", text)) >= WORDS


def same(evaluated: Sequence[str | None], trained: list[str]) -> np.ndarray:
    """Which evaluated texts [evaluated] are a trained text: have a form of `plain` in common with it; None is none."""
    forms = {form for text in trained for form in plain(text)}
    return np.array([text is not None and not plain(text).isdisjoint(forms) for text in evaluated], dtype=bool)


OPERATOR = re.compile(r"(?<=\d)(\s*)([-*/%])|([-*/%])(?=\s*\d)")  # beside a number: 7-5 and 7*5 are two texts
KEPT = dict(zip("-*/%.", "\ue000\ue001\ue002\ue003\ue004", strict=True))  # what stands for an operator: no punctuation


UNWRITTEN = re.compile(r"(?<=[^\W\d])['’](?=[^\W\d])|(?<=\d),(?=\d{3}(?!\d))")  # don't is dont, and 3,000 is 3000
DECIMAL = re.compile(r"(?<=\d)\.(?=\d)")  # 1.5 and 1 5 are two texts
WITHIN = re.compile(r"(?<=[^\W\d])(?:[^\w\s]|_)(?=[^\W\d])")  # a sign between two letters


def plain(text: str) -> set[str]:
    """A text without what a copy may change: case, forms of a letter, white space and punctuation.

    It has two forms, for a sign between letters may go (wellknown) or become a space (well known). Operators beside a
    number and the point within one stay, and so do other symbols (+ and =). A text of punctuation alone stays as it is.
    """
    folded = _folded(text)
    numbers = DECIMAL.sub(KEPT["."], UNWRITTEN.sub("", folded))
    marked = OPERATOR.sub(lambda sign: f" {KEPT[sign[2] or sign[3]]} ", numbers)
    forms = marked, WITHIN.sub(lambda sign: sign[0].translate(_punctuation()).strip(), marked)
    return {" ".join(form.translate(_punctuation()).split()) or " ".join(folded.split()) for form in forms}


@functools.cache
def _punctuation() -> dict[int, str]:
    """A space for every character of punctuation."""
    characters = range(sys.maxunicode + 1)
    return {i: " " for i in characters if unicodedata.category(chr(i)).startswith("P")} | {ord("`"): " "}


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def counts(shared: np.ndarray) -> dict[str, int]:
    """How many texts are copies, near copies, clean, and too short to tell, from their `shares` [texts]."""
    long = shared[~np.isnan(shared)]
    return {
        "copies": int((long == 1).sum()),
        "near_copies": int(((long >= NEAR) & (long < 1)).sum()),
        "clean": int((long < NEAR).sum()),
        "too_short": int(np.isnan(shared).sum()),
    }


def flagged(shared: np.ndarray) -> np.ndarray:
    """Which texts are copies or near copies [texts], from their `shares` [texts]."""
    return np.nan_to_num(shared, nan=0.0) >= NEAR


def against(
    evaluated: dict[str, list[str]],
    trained: dict[str, list[str]],
    asked: dict[str, list[str]] | None = None,
    answered: dict[str, list[str]] | None = None,
    bar: Any = None,
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Of each evaluated set the counts for each training stage (name → its texts), and which texts any of them flags.

    What was trained on is read once for all sets; `bar` counts its texts. `asked` has the prompts of evaluated texts
    (of all of a set, in their order), `answered` those of training stages: where a prompt is the same, the text is a
    copy, whatever its reply. Flags are [texts of the set].
    """
    together = [text for texts in evaluated.values() for text in texts]
    ends = np.cumsum([len(texts) for texts in evaluated.values()])[:-1]
    by_stage = {stage: np.split(shares(together, texts, bar), ends) for stage, texts in trained.items()}
    prompts = [prompt for name in evaluated for prompt in (asked or {}).get(name, [None] * len(evaluated[name]))]
    for stage, texts in (answered or {}).items():
        flags = np.split(same(prompts, texts), ends)
        by_stage[stage] = [np.where(flag, 1.0, share) for flag, share in zip(flags, by_stage[stage], strict=True)]
    return {
        name: (
            {stage: counts(sets[place]) for stage, sets in by_stage.items()},
            np.any([flagged(sets[place]) for sets in by_stage.values()], axis=0),
        )
        for place, name in enumerate(evaluated)
    }
