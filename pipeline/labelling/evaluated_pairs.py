"""The replies of an evaluation as pairs for the labelling page: each two models' replies to each prompt."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.labelling.votes import Comparison

NAME = "evaluate"  # value of label.pairs that asks for these pairs


def samples_file(config: DictConfig) -> Path:
    """Where the replies of the run's evaluation are."""
    return Path(config.runs) / config.run / "evaluate" / "samples.jsonl"


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples. Raises `UserError` naming the line of one that holds no replies to a prompt."""
    rows = read_lines(file)
    for number, row in enumerate(rows, start=1):
        good = isinstance(row, dict) and isinstance(row.get("prompt"), list) and len(row) > 1
        if not good or not all(isinstance(row[n], dict) and isinstance(row[n].get("reply"), str) for n in models(row)):
            raise UserError(f"{file}: row {number} is not a prompt with replies; make it with target=evaluate")
    return rows


def votes_file(config: DictConfig) -> Path:
    """Where votes on the evaluation's replies go: apart from those that train, unless `label.votes` says otherwise."""
    asked = config.label.votes if config.label.pairs == NAME else None
    return Path(asked or Path(config.runs) / config.run / "evaluate_votes.jsonl")


def models(row: dict[str, Any]) -> list[str]:
    """The models (and people) that replied to the prompt of a row of samples.jsonl."""
    return [name for name in row if name != "prompt"]


def pool(rows: list[dict[str, Any]]) -> list[Comparison]:
    """Every two models' replies to a prompt that differ, from rows of samples.jsonl.

    A pair is named after its content and its models: a vote on it stays good in a later evaluation with these replies.
    All are of the split "test": their prompts are held out, and votes on them may train nothing.
    """
    return [
        _comparison(row, one, other)
        for row in rows
        for one, other in itertools.combinations(models(row), 2)
        if row[one]["reply"] != row[other]["reply"]
    ]


def _comparison(row: dict[str, Any], one: str, other: str) -> Comparison:
    said = sorted([[one, row[one]["reply"]], [other, row[other]["reply"]]])
    name = hashlib.sha256(json.dumps([row["prompt"], *said], ensure_ascii=False).encode()).hexdigest()[:12]
    (model_a, reply_a), (model_b, reply_b) = said
    return Comparison(name, row["prompt"], reply_a, reply_b, model_a, model_b, "test")
