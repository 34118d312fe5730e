"""Preference pairs between stages: rows on disk, and their tokens."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import chat
from pipeline.artifact import read_lines, write_lines
from pipeline.formats import Message


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt; `gap` is the judge's score difference, None where people compared."""

    prompt: list[Message]
    chosen: str
    rejected: str
    gap: float | None
    source: str  # samples, people or dataset


def write(file: Path, pairs: list[Pair]) -> None:
    """Pairs as JSON lines."""
    write_lines(file, [asdict(pair) for pair in pairs])


def read(file: Path) -> list[Pair]:
    """The pairs of a file that `write` made."""
    return [Pair(**row) for row in read_lines(file)]


def tokenised(tokenizer: Any, pairs: list[Pair], max_length: int) -> tuple[list[dict[str, list[int]]], list[Pair]]:
    """Token ids prompt_ids, chosen_ids, rejected_ids of each pair, both replies with their end token, and the pairs kept.

    A pair is dropped when its prompt with either reply is longer than `max_length` tokens.
    """
    rows, kept = [], []
    for pair in pairs:
        prompt = chat.prompt_ids(tokenizer, pair.prompt)
        chosen, rejected = chat.reply_ids(tokenizer, pair.chosen), chat.reply_ids(tokenizer, pair.rejected)
        if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
            kept.append(pair)
    return rows, kept
