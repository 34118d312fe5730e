"""The baselines against dictionaries of counts, and on pairs whose answer is plain to see."""

import bz2
import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from threefold.evaluation import baselines

TRAIN = "the cat sat on the mat and the rat ate the oat; é ÿ\n\nthat hat.".encode()
HELD_OUT = "the bat that sat ate the moat: zé\x01".encode()


def witten_bell(train: bytes, order: int):
    """p(byte | the order - 1 bytes before it), counted in dictionaries, as a function of (history, byte)."""
    counts = defaultdict(Counter)
    for n in range(order):
        padded = bytes(n) + train
        for i in range(len(train)):
            counts[padded[i : i + n]][padded[i + n]] += 1

    def probability(history: bytes, byte: int) -> float:
        shorter = probability(history[1:], byte) if history else 1 / 256
        seen = counts.get(history)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    return probability


def brute_force_bits(train: bytes, held_out: bytes, order: int) -> float:
    probability = witten_bell(train, order)
    padded = bytes(order - 1) + held_out
    bits = [-math.log2(probability(padded[i : i + order - 1], byte)) for i, byte in enumerate(held_out)]
    return sum(bits) / len(bits)


def test_ngram_bits_are_interpolated_witten_bell():
    found = baselines.ngram_bits_per_byte(TRAIN, HELD_OUT, 6)
    assert found == pytest.approx([brute_force_bits(TRAIN, HELD_OUT, order) for order in range(1, 7)], rel=1e-9)


def test_ngram_bits_of_random_bytes_with_zeros_among_them():
    source = random.Random(0)
    train, held_out = (bytes(source.choices([0, 1, 2, 250, 255], k=k)) for k in (400, 150))
    found = baselines.ngram_bits_per_byte(train, held_out, 4)
    assert found == pytest.approx([brute_force_bits(train, held_out, order) for order in range(1, 5)], rel=1e-9)


@pytest.mark.parametrize("history", [b"", b"the ", b"\xff\xff\xff"])
def test_ngram_probabilities_of_all_bytes_sum_to_one(history):
    def total_bits(text: bytes) -> np.ndarray:
        """Bits of the whole text under the models of order 1 to 4."""
        return len(text) * np.array(baselines.ngram_bits_per_byte(TRAIN, text, 4))

    before = total_bits(history) if history else 0.0
    probabilities = [2 ** (before - total_bits(history + bytes([byte]))) for byte in range(256)]
    assert sum(probabilities).tolist() == pytest.approx([1.0] * 4, abs=1e-9)


def test_text_baselines_measure_all_texts_as_one():
    found = baselines.text_baselines(["the cat", "sat"], ["the mat", "é"])
    held_out = "the mat\n\né".encode()
    assert found["bz2"] == 8 * len(bz2.compress(held_out)) / 11
    assert found["xz"] == 8 * len(lzma.compress(held_out, preset=9)) / 11
    assert found["3-gram"] == pytest.approx(brute_force_bits(b"the cat\n\nsat", held_out, 3))


LONGER, SHORTER, EQUAL = ("a long reply", "short"), ("short", "a long reply"), ("good", "evil")


def test_preferring_by_length_learns_the_direction_from_training():
    held_out = [LONGER, LONGER, LONGER, SHORTER]
    assert baselines.length_outcomes([LONGER, LONGER, SHORTER], held_out).mean() == 0.75
    assert baselines.length_outcomes([SHORTER, SHORTER, LONGER], held_out).mean() == 0.25


def test_equal_lengths_count_one_half():
    assert baselines.length_outcomes([LONGER], [EQUAL, EQUAL]).mean() == 0.5
    assert baselines.length_outcomes([LONGER], [LONGER, EQUAL]).mean() == 0.75


def worded_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of random words in which only the chosen reply says thanks."""
    source = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "an", "oat"]
    replies = [" ".join(source.choices(words, k=6)) for _ in range(2 * count)]
    return [(f"{chosen} Thanks!", rejected) for chosen, rejected in zip(replies[::2], replies[1::2], strict=True)]


def test_bag_of_words_learns_a_word_that_decides():
    train, held_out = worded_pairs(80, 0), worded_pairs(40, 1)
    assert baselines.bag_of_words_outcomes(train, held_out).mean() == 1.0
    assert baselines.bag_of_words_outcomes(train, [(r, c) for c, r in held_out]).mean() == 0.0


def test_replies_of_the_same_words_count_one_half():
    held_out = [("the cat sat", "sat the cat"), ("unheard", "words")]
    assert baselines.bag_of_words_outcomes(worded_pairs(20, 0), held_out).mean() == 0.5
