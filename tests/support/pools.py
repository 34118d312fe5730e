"""Pools of pairs and votes on them that several tests share."""

import json
from pathlib import Path

from threefold.labelling.queue import Labelling
from threefold.labelling.votes import Vote, read_pool


def row(number: int, **changes) -> dict:
    """A line of a pool."""
    prompt = [{"role": "user", "content": f"question {number}"}]
    replies = {"response_a": f"reply of sft to {number}", "response_b": f"reply of ppo to {number}"}
    names = {"model_a": "sft", "model_b": "ppo", "split": "test" if number % 5 == 0 else "train"}
    return {"pair": f"pair-{number}", "prompt": prompt, **replies, **names, **changes}


def write_pool(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def opened(pool: Path, votes: Path, seed: int = 1) -> Labelling:
    return Labelling(read_pool(pool), votes, seed)


def vote_on(labelling: Labelling, labeller: str, choice: str, reason: str = "") -> str:
    return labelling.record(labeller, labelling.next(labeller).token, choice, reason)


def a_vote(number: int, labeller: str = "anna", winner: str = "tie") -> Vote:
    return Vote(**row(number), winner=winner, labeller=labeller, reason="", time="2026-11-21T10:00:00.000+00:00")
