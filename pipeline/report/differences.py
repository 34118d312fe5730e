"""Differences between two models on the same prompts, with intervals over prompts, and what alignment cost in words."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from threefold.evaluation import statistics
from threefold.report.run import REFERENCE, Run, display_name, opening
from threefold.rewards.repetition import repeated_share

Row = dict[str, Any]  # of samples.jsonl
SURE = 0.05  # p from which a planned comparison says nothing
LENGTH, REPETITION = "length", "repetition"  # taken as judges: a reply's characters, its share of repeated triples
ALIKE = 0.005  # a smaller relative change of bits per byte is not called one


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


def costs(run: Run, rows: list[Row], models: list[str]) -> list[str]:
    """What became longer, endless, repetitive or less likely, for each of the aligned `models` against SFT."""
    lines = []
    for name in models if REFERENCE in run.models else []:
        clauses = [length(rows, name), ended(run, name), repetition(rows, name), tax(run, name)]
        lines.append(f"{opening(display_name(name))}: {'; '.join(clause for clause in clauses if clause)}.")
    return lines


def length(rows: list[Row], name: str) -> str:
    """Whether replies are longer or shorter than those of SFT."""
    change = between(rows, name, REFERENCE, LENGTH)
    if change is None:
        return ""
    word = {1: "replies are longer", -1: "replies are shorter"}.get(change.sign, "length did not clearly change")
    return f"{word}, {change.other:.0f} to {change.one:.0f} characters ({change.shown('+.0f')})"


def ended(run: Run, name: str) -> str:
    """Whether replies end less often; shares are told apart where their own intervals do not overlap."""
    before, after = (run.models[model].get("ended_share") for model in (REFERENCE, name))
    if before is None or after is None:
        return ""
    was, became = (share_interval(share, run.evaluation["prompts"]) for share in (before, after))
    word = "fell" if became[1] < was[0] else "rose" if became[0] > was[1] else "did not clearly change"
    return f"the share of replies that end {word}, {before:.1%} to {after:.1%}"


def share_interval(share: float, count: int) -> list[float]:
    """Wilson's interval of a share of `count`."""
    ones = round(share * count)
    return statistics.share_interval([1.0] * ones + [0.0] * (count - ones)) or [0.0, 1.0]


def repetition(rows: list[Row], name: str) -> str:
    """Whether replies repeat themselves more."""
    change = between(rows, name, REFERENCE, REPETITION)
    if change is None:
        return ""
    word = {1: "replies repeat themselves more", -1: "replies repeat themselves less"}.get(change.sign)
    return f"{word or 'repetition did not clearly change'}, {change.other:.1%} to {change.one:.1%} of word triples"


def tax(run: Run, name: str) -> str:
    """What became of the language model: bits per byte of base text."""
    before, after = (run.models[model].get("text_bits_per_byte") for model in (REFERENCE, name))
    if before is None or after is None:
        return ""
    base = run.models.get("base", {}).get("text_bits_per_byte")
    beside = f", the base model {base:.3f}" if base is not None else ""
    word = "about as well" if abs(after / before - 1) < ALIKE else "worse" if after > before else "better"
    change = f"{before:.3f} to {after:.3f} bits per byte ({after / before - 1:+.1%})"
    return f"base text is predicted {word}, {change}{beside}"
