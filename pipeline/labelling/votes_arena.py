"""The arena by people: votes of the labelling page on the evaluation's replies, and how far the judges agree with them.

P: prompts, M: models.
"""

from typing import Any

import numpy as np
from omegaconf import DictConfig

from threefold.evaluation import arena, statistics
from threefold.labelling import evaluated_pairs
from threefold.labelling.votes import Vote, read_votes

SHARES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}  # what the winner of a vote is worth to its first model


def of_run(config: DictConfig) -> dict[str, Any] | None:
    """What people said of the replies of the run's present evaluation; None where nobody has voted on them.

    `arena` is as that of a judge, and `votes`, `left_out`, `ties`, `labellers` and `judges` say what it rests on: votes
    on pairs that this evaluation does not have are left out and counted. Raises `UserError` for a malformed file.
    """
    votes = read_votes(evaluated_pairs.votes_file(config))
    rows = evaluated_pairs.read_samples(evaluated_pairs.samples_file(config))
    known = {(c.pair, c.model_a, c.model_b) for c in evaluated_pairs.pool(rows)}
    good = [vote for vote in votes if (vote.pair, vote.model_a, vote.model_b) in known]
    if not good:
        return {"votes": 0, "left_out": len(votes)} if votes else None
    models, wins = evaluated_pairs.models(rows[0]), counted(rows, good)
    lengths = {name: [len(row[name]["reply"]) for row in rows] for name in models}
    return {
        "arena": arena.summary(wins, models, lengths, anchor(wins, models)),
        "votes": len(good),
        "left_out": len(votes) - len(good),
        "ties": sum(vote.winner == "tie" for vote in good),
        "labellers": len({vote.labeller for vote in good}),
        "judges": judges(rows, good),
    }


def counted(rows: list[dict[str, Any]], votes: list[Vote]) -> np.ndarray:
    """Wins [P, M, M] by votes on replies of `rows`: each vote counts once, a tie as half a win for both."""
    models, numbers = evaluated_pairs.models(rows[0]), {pair: i for i, row in enumerate(rows) for pair in _pairs(row)}
    found = np.zeros((len(rows), len(models), len(models)))
    for vote in votes:
        a, b, share = models.index(vote.model_a), models.index(vote.model_b), SHARES[vote.winner]
        found[numbers[vote.pair], a, b] += share
        found[numbers[vote.pair], b, a] += 1 - share
    return found


def anchor(wins: np.ndarray, models: list[str]) -> str:
    """The model that has 1000 points: SFT, or while nobody has voted on its replies the one with most votes."""
    votes = dict(zip(models, (wins + np.swapaxes(wins, 1, 2)).sum((0, 2)), strict=True))
    return "sft" if votes.get("sft") else max(models, key=votes.__getitem__)


def judges(rows: list[dict[str, Any]], votes: list[Vote]) -> dict[str, dict[str, Any]]:
    """By judge how often it prefers the reply that a person preferred: `agree`, its 95 % interval, and `votes`.

    Of votes that are no ties, on replies that the judge scores and scores differently; the interval is over prompts.
    """
    row_of = {pair: row for row in rows for pair in _pairs(row)}
    found: dict[str, tuple[list[float], list[str]]] = {}
    for vote in votes:
        a, b = row_of[vote.pair][vote.model_a], row_of[vote.pair][vote.model_b]
        for judge in (a.keys() & b.keys()) - {"reply"}:
            if vote.winner != "tie" and None not in (a[judge], b[judge]) and a[judge] != b[judge]:
                agree, prompts = found.setdefault(judge, ([], []))
                agree.append(float((a[judge] > b[judge]) == (vote.winner == "model_a")))
                prompts.append(str(vote.prompt))
    return {
        judge: {
            "agree": float(np.mean(agree)),
            "ci95": statistics.share_interval(agree, prompts),
            "votes": len(agree),
        }
        for judge, (agree, prompts) in sorted(found.items())
    }


def _pairs(row: dict[str, Any]) -> list[str]:
    return [comparison.pair for comparison in evaluated_pairs.pool([row])]


def in_words(found: dict[str, Any]) -> str:
    """One line: how many votes, of how many people, and what is left out."""
    left = f"; {found['left_out']:,} on pairs that this evaluation does not have are left out" * bool(found["left_out"])
    if not found["votes"]:
        return f"no vote on replies of this evaluation{left}"
    people = "person" if found["labellers"] == 1 else "people"
    said = f"{found['votes']:,} votes of {found['labellers']} {people}, {found['ties']:,} of them ties{left}"
    agree = [
        f"{judge.replace('_', ' ')} {f['agree']:.0%} {statistics.shown(f['ci95'], '.0%')}"
        for judge, f in found["judges"].items()
    ]
    return f"{said}. Judges that agree with people where both prefer a reply: {', '.join(agree)}" if agree else said
