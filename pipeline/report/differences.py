"""Differences between two models on the same prompts: paired, with intervals over prompts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from threefold.evaluation import statistics
from threefold.rewards.repetition import repeated_share

Row = dict[str, Any]  # of samples.jsonl
SURE = 0.05  # p from which a planned comparison says nothing
LENGTH, REPETITION = "length", "repetition"  # taken as judges: a reply's characters, its share of repeated triples


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, and what both sides are on average; no interval where all are alike.

    `p` is that of the evaluation's paired test, corrected for all of them; None for a difference that it did not test.
    """

    mean: float
    interval: list[float] | None
    one: float
    other: float
    prompts: int
    p: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below zero and the test, if there is one, agrees; otherwise 0.

        Where all differences are alike there is no interval, and the test of their signs stands for it.
        """
        if self.p is not None and self.p >= SURE:
            return 0
        if self.interval is None:
            return int(np.sign(self.mean)) if 2 / 2**self.prompts < SURE else 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)

    def shown(self, form: str = "+.3f") -> str:
        """The difference with its interval, as +0.123 [+0.1, +0.2]."""
        return f"{self.mean:{form}} {statistics.shown(self.interval, form)}"


def value(row: Row, model: str, judge: str) -> float | None:
    """The judge's score of the model's reply; None where there is none."""
    measured = {LENGTH: len, REPETITION: lambda reply: repeated_share(reply, 3)}
    return measured[judge](row[model]["reply"]) if judge in measured else row[model].get(judge)


def between(rows: list[Row], one: str, other: str, judge: str = "gold") -> Difference | None:
    """How much higher the judge scores model `one` than `other`; None with fewer than two prompts that have both."""
    return of_pairs((value(row, one, judge), value(row, other, judge)) for row in rows if one in row and other in row)


def tested(evaluate: dict[str, Any], rows: list[Row], one: str, other: str, judge: str = "gold") -> Difference | None:
    """`between` with the p of the evaluation's own comparison of the two, either way round, where it made one."""
    difference = between(rows, one, other, judge)
    corrected = {
        (frozenset((test["model"], test["against"])), test["judge"]): test["p_holm"]
        for test in evaluate.get("paired", ())
    }
    return replace(difference, p=corrected.get((frozenset((one, other)), judge))) if difference else None


def between_runs(ones: list[Row], others: list[Row], model: str, judge: str = "gold") -> Difference | None:
    """The same of one model of two runs, on the prompts that both were given."""
    by_prompt = {str(row["prompt"]): row for row in others}
    met = [(row, by_prompt[str(row["prompt"])]) for row in ones if str(row["prompt"]) in by_prompt]
    return of_pairs((value(a, model, judge), value(b, model, judge)) for a, b in met if model in a and model in b)


def of_pairs(pairs: Iterable[tuple[float | None, float | None]]) -> Difference | None:
    """The mean difference of pairs of scores, leaving out pairs in which one is None."""
    both = np.array([pair for pair in pairs if None not in pair], dtype=float)
    if len(both) < 2:
        return None
    gaps = both[:, 0] - both[:, 1]
    return Difference(float(gaps.mean()), statistics.mean_interval(gaps.tolist()), *both.mean(0).tolist(), len(both))
