"""Whether texts of the evaluation occur in what was trained on: word n-grams in common, whatever the formatting."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

WORDS = 8  # of an n-gram: long enough that two people do not write the same by chance
NEAR = 0.5  # share of a text's n-grams in training from which it counts as a near copy
SLOTS = 2**30  # of the hash of n-grams; a million different ones collide with one in a thousand


def shares(evaluated: list[str], trained: list[str], bar: Any = None) -> np.ndarray:
    """The share of each evaluated text's different word 8-grams that occur in a trained text.

    Case, punctuation and white space do not count, so a reformatted copy is a copy. A text without an 8-gram has 1
    where a trained text is the same as a whole, but for case and white space, and otherwise nan.
    """
    grams = HashingVectorizer(
        token_pattern=r"\w+", ngram_range=(WORDS, WORDS), n_features=SLOTS, binary=True, norm=None, alternate_sign=False
    )
    if not evaluated or not trained:
        return np.full(len(evaluated), np.nan)
    # sorted and looked up: numpy's unique, and isin by it, hash millions of values far more slowly
    known, own = np.append(np.sort(grams.transform(read(trained, bar)).indices), SLOTS), grams.transform(evaluated)
    found = known[np.searchsorted(known, own.indices)] == own.indices
    counts = np.diff(own.indptr)
    sums = np.add.reduceat(np.append(found, 0), np.minimum(own.indptr[:-1], len(found)))
    whole = {_plain(text) for text in trained}
    short = [1.0 if _plain(text) in whole else np.nan for text in evaluated]
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


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def counts(found: np.ndarray) -> dict[str, int]:
    """How many texts are copies, near copies, clean, and too short to tell, from their `shares`."""
    long = found[~np.isnan(found)]
    return {
        "copies": int((long == 1).sum()),
        "near_copies": int(((long >= NEAR) & (long < 1)).sum()),
        "clean": int((long < NEAR).sum()),
        "too_short": int(np.isnan(found).sum()),
    }


def flagged(found: np.ndarray) -> np.ndarray:
    """Which texts are copies or near copies, from their `shares`."""
    return np.nan_to_num(found, nan=0.0) >= NEAR


def against(
    evaluated: dict[str, list[str]], trained: dict[str, list[str]], bar: Any = None
) -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Of each evaluated set the counts for each training stage (name → its texts), and which texts any of them flags.

    What was trained on is read once for all sets; `bar` counts its texts.
    """
    together = [text for texts in evaluated.values() for text in texts]
    ends = np.cumsum([len(texts) for texts in evaluated.values()])[:-1]
    by_stage = {stage: np.split(shares(together, texts, bar), ends) for stage, texts in trained.items()}
    return {
        name: (
            {stage: counts(found[place]) for stage, found in by_stage.items()},
            np.any([flagged(found[place]) for found in by_stage.values()], axis=0),
        )
        for place, name in enumerate(evaluated)
    }
