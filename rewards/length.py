"""Length of the reply as a reward: a baseline that a reward model must not be explained by."""

from typing import Any


def length(prompts: list[str], completions: list[str], cap: int = 100, **columns: Any) -> list[float]:
    """Characters of each completion as a share of `cap`, at most 1."""
    return [min(len(text), cap) / cap for text in completions]
