"""How alike a model's replies to different prompts are: distinct n-grams and self-BLEU, words split at white space."""

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

REPLIES = 100  # replies that self-BLEU compares, each with all others; it grows with their number


def distinct_n(texts: list[str], n: int) -> float:
    """Different word n-grams as a share of all, over all replies together (Li et al. 2016); 1 is no repetition."""
    words = [text.lower().split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts: list[str], seed: int) -> float:
    """Mean BLEU of a reply against all others (Zhu et al. 2018, Texygen, arXiv 1802.01886): 0 to 1, 1 is all alike.

    Of at most 100 replies, drawn by `seed` alone, so that models are compared at the same prompts. n-grams up to 4, of
    shorter replies up to their length; an order without a match counts a tenth of one (NLTK's smoothing method 1), and
    a reply that shares no word with another is 0. A reply without a word is left out; where fewer than two have words,
    all are alike.
    """
    drawn = np.random.default_rng(seed).permutation(len(texts))[:REPLIES]
    words = [found for i in sorted(drawn) if (found := texts[i].lower().split())]
    if len(words) < 2:
        return 1.0
    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(words[:i] + words[i + 1 :], said, smoothing_function=smoothing, auto_reweigh=True)
        for i, said in enumerate(words)
    ]
    return float(np.mean(scores))
