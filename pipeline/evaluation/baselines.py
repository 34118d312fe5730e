"""What costs nothing and must be beaten: n-gram models, compressors, reply length, bags of words."""

import bz2
import lzma
import math
import time
from typing import Any

import numpy as np


def text_baselines(train: list[str], held_out: list[str], longest: int = 4) -> dict[str, float]:
    """Bits per byte of held-out texts under 1- to `longest`-gram byte models and the compressors bz2 and xz."""
    old, new = _joined(train), _joined(held_out)
    grams = {f"{n}-gram": bits for n, bits in enumerate(ngram_bits_per_byte(old, new, longest), start=1)}
    packed = {"bz2": len(bz2.compress(new, 9)), "xz": len(lzma.compress(new, preset=9))}
    return grams | {name: 8 * size / len(new) for name, size in packed.items()}


def estimated_seconds(train: list[str], held_out: list[str]) -> float:
    """The seconds that `text_baselines` takes, from a hundredth of the training text; sorting takes n log n."""
    part = train[: max(1, len(train) // 100)]
    sizes = [len(_joined(texts)) for texts in (train, part)]
    started = time.perf_counter()
    ngram_bits_per_byte(_joined(part), _joined(held_out[:10]), 4)
    small = time.perf_counter() - started
    return small * sizes[0] * math.log(sizes[0]) / max(1.0, sizes[1] * math.log(sizes[1]))


def _joined(texts: list[str]) -> bytes:
    return "\n\n".join(texts).encode()


def ngram_bits_per_byte(train: bytes, held_out: bytes, longest: int) -> list[float]:
    """Bits per byte of `held_out` under byte n-gram models of order 1 to `longest` (at most 7) counted on `train`.

    Interpolated Witten-Bell smoothing: p_n(b|h) = (c(hb) + t(h) p_{n-1}(b|h')) / (c(h) + t(h)), where t(h) is the
    number of different bytes seen after h, and p_0 = 1/256 (Witten and Bell 1991; Chen and Goodman 1998, section 2.4).
    """
    probability, bits = np.full(len(held_out), 1 / 256), []
    for order in range(1, longest + 1):
        grams, counts = np.unique(_grams(train, order), return_counts=True)
        histories, first = np.unique(grams >> np.uint64(8), return_index=True)
        followed = np.add.reduceat(counts, first)
        different = np.diff(np.append(first, len(grams)))
        new = _grams(held_out, order)
        count = _look_up(grams, counts, new)
        total, types = (_look_up(histories, values, new >> np.uint64(8)) for values in (followed, different))
        seen = total > 0
        probability[seen] = ((count + types * probability) / np.maximum(total + types, 1))[seen]
        bits.append(float(-np.log2(probability).mean()))
    return bits


def _grams(text: bytes, order: int) -> np.ndarray:
    """For each byte, it and the `order` - 1 bytes before it as one number [bytes]; zeros stand before the start."""
    stream = np.frombuffer(bytes(order - 1) + text, dtype=np.uint8).astype(np.uint64)
    grams = np.zeros(len(text), dtype=np.uint64)
    for i in range(order):
        grams = (grams << np.uint64(8)) | stream[i : i + len(text)]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key [wanted], 0 where it is not among the sorted `keys` [K], whose `values` are [K]."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def length_outcomes(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> np.ndarray:
    """Whether preferring by length alone is right on each held-out pair [held_out]: 1, 0, or 0.5 at equal lengths.

    Pairs are (chosen, rejected); whether longer or shorter is better is learnt from `train`.
    """
    longer = np.mean([_sign(len(c) - len(r)) for c, r in train]) >= 0
    return np.array([0.5 + 0.5 * _sign(len(c) - len(r)) * (1 if longer else -1) for c, r in held_out])


def _sign(x: float) -> float:
    return math.copysign(1, x) if x else 0.0


def bag_of_words_outcomes(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> np.ndarray:
    """The same [held_out] of preferring by a logistic regression on the difference of word counts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counter = CountVectorizer(lowercase=True, token_pattern=r"\w+|[^\w\s]")
    counter.fit([text for pair in train for text in pair])
    difference = _count_differences(counter, train)
    # each pair in both directions, so that the fit has both classes and no constant term
    features = np.concatenate([np.arange(len(train)), np.arange(len(train))])
    signs = np.repeat([1, -1], len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(difference[features].multiply(signs[:, None]).tocsr(), signs)
    margins = model.decision_function(_count_differences(counter, held_out))
    return 0.5 + 0.5 * np.sign(margins)


def _count_differences(counter: Any, pairs: list[tuple[str, str]]):
    chosen, rejected = zip(*pairs, strict=True)
    return (counter.transform(chosen) - counter.transform(rejected)).astype(float)
