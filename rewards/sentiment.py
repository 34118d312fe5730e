"""Sentiment of the reply by two lexicons of different origin."""

import functools
from typing import Any


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """VADER's compound score of each completion, -1 to 1 (Hutto and Gilbert 2014)."""
    return [_vader().polarity_scores(text)["compound"] for text in completions]


def textblob(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """TextBlob's polarity of each completion, -1 to 1 (the pattern library's lexicon of adjectives)."""
    from textblob import TextBlob

    return [TextBlob(text).sentiment.polarity for text in completions]
