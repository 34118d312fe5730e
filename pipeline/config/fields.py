"""Fields of the schema with their limits."""

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def number(low: float | None = None, high: float | None = None) -> Any:
    """A required number in [low, high]; `low` and `high` are inclusive, None is no limit."""
    return field(default=MISSING, metadata={"low": low, "high": high})


def number_or_null(low: float) -> Any:
    """A number of at least `low`, null unless it is given."""
    return field(default=None, metadata={"low": low})


def one_of(*choices: str) -> Any:
    """A required string from `choices`."""
    return field(default=MISSING, metadata={"choices": choices})
