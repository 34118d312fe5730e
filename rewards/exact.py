"""Whether the reply is the known answer: a reward that can be checked, for tasks with one right answer."""

from typing import Any


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1.0 where a completion equals its `answer`, whatever the white space between words and around it; else 0.0."""
    return [float(text.split() == known.split()) for text, known in zip(completions, answer, strict=True)]
