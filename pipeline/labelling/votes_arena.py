"""The arena by people: the evaluation's replies as pairs for the labelling page, and what votes on them say.

P: prompts, M: models.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from threefold.errors import UserError
from threefold.evaluation import arena, statistics
from threefold.fileio import read_lines
from threefold.labelling.votes import Comparison, Vote, read_votes

EVALUATION = "evaluate"  # value of label.pairs that asks for these pairs
SHARES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}  # what the winner of a vote is worth to its first model


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
    asked = config.label.votes if config.label.pairs == EVALUATION else None
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
    replies = sorted([[one, row[one]["reply"]], [other, row[other]["reply"]]])
    name = hashlib.sha256(json.dumps([row["prompt"], *replies], ensure_ascii=False).encode()).hexdigest()[:12]
    (model_a, reply_a), (model_b, reply_b) = replies
    return Comparison(name, row["prompt"], reply_a, reply_b, model_a, model_b, "test")


def of_run(config: DictConfig) -> dict[str, Any] | None:
    """What people said of the replies of the run's present evaluation; None where nobody has voted on them.

    `arena` is as that of a judge, and `votes`, `left_out`, `ties`, `labellers` and `judges` say what it rests on: votes
    on pairs that this evaluation does not have are left out and counted. Raises `UserError` for a malformed file.
    """
    votes = read_votes(votes_file(config))
    rows = read_samples(samples_file(config))
    present = {(c.pair, c.model_a, c.model_b) for c in pool(rows)}
    good = [vote for vote in votes if (vote.pair, vote.model_a, vote.model_b) in present]
    if not good:
        return {"votes": 0, "left_out": len(votes)} if votes else None
    names, wins = models(rows[0]), counted(rows, good)
    lengths = {name: [len(row[name]["reply"]) for row in rows] for name in names}
    return {
        "arena": arena.summary(wins, names, lengths, anchor(wins, names)),
        "votes": len(good),
        "left_out": len(votes) - len(good),
        "ties": sum(vote.winner == "tie" for vote in good),
        "labellers": len({vote.labeller for vote in good}),
        "judges": judges(rows, good),
    }


def counted(rows: list[dict[str, Any]], votes: list[Vote]) -> np.ndarray:
    """Wins [P, M, M] by votes on replies of `rows`: each vote counts once, a tie as half a win for both."""
    names, number_of = models(rows[0]), {pair: i for i, row in enumerate(rows) for pair in _pairs(row)}
    wins = np.zeros((len(rows), len(names), len(names)))
    for vote in votes:
        a, b, share = names.index(vote.model_a), names.index(vote.model_b), SHARES[vote.winner]
        wins[number_of[vote.pair], a, b] += share
        wins[number_of[vote.pair], b, a] += 1 - share
    return wins


def anchor(wins: np.ndarray, names: list[str]) -> str:
    """The model that has 1000 points; `wins` is [P, M, M]. SFT, or the one with most votes while SFT has none."""
    votes = dict(zip(names, (wins + np.swapaxes(wins, 1, 2)).sum((0, 2)), strict=True))
    return "sft" if votes.get("sft") else max(names, key=votes.__getitem__)


def judges(rows: list[dict[str, Any]], votes: list[Vote]) -> dict[str, dict[str, Any]]:
    """By judge how often it prefers the reply that a person preferred: `agree`, its 95 % interval, and `votes`.

    Of votes that are no ties, on replies that the judge scores and scores differently; the interval is over prompts.
    """
    row_of = {pair: row for row in rows for pair in _pairs(row)}
    of_judge: dict[str, tuple[list[float], list[str]]] = {}
    for vote in votes:
        a, b = row_of[vote.pair][vote.model_a], row_of[vote.pair][vote.model_b]
        for judge in (a.keys() & b.keys()) - {"reply"}:
            if vote.winner != "tie" and None not in (a[judge], b[judge]) and a[judge] != b[judge]:
                agree, prompts = of_judge.setdefault(judge, ([], []))
                agree.append(float((a[judge] > b[judge]) == (vote.winner == "model_a")))
                prompts.append(str(vote.prompt))
    return {
        judge: {
            "agree": float(np.mean(agree)),
            "ci95": statistics.share_interval(agree, prompts),
            "votes": len(agree),
        }
        for judge, (agree, prompts) in sorted(of_judge.items())
    }


def _pairs(row: dict[str, Any]) -> list[str]:
    return [comparison.pair for comparison in pool([row])]


def in_words(votes: dict[str, Any]) -> str:
    """`votes`, from `of_run`, on one line: how many, of how many people, and what is left out."""
    left = f"; {votes['left_out']:,} on pairs that this evaluation does not have are left out" * bool(votes["left_out"])
    if not votes["votes"]:
        return f"no vote on replies of this evaluation{left}"
    people = "person" if votes["labellers"] == 1 else "people"
    counts = f"{votes['votes']:,} votes of {votes['labellers']} {people}, {votes['ties']:,} of them ties{left}"
    agree = [
        f"{judge.replace('_', ' ')} {f['agree']:.0%} {statistics.shown(f['ci95'], '.0%')}"
        for judge, f in votes["judges"].items()
    ]
    return f"{counts}. Judges that agree with people where both prefer a reply: {', '.join(agree)}" if agree else counts
