"""Two runs, or two models of a run, beside each other: which keys differ, and what that did to every metric.

Differences between two models on the same prompts, with intervals over prompts, and what alignment cost in words.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from threefold.display.parts import Section, Table
from threefold.evaluation import statistics
from threefold.fileio import numbers
from threefold.report import models
from threefold.report.run import REFERENCE, Run, command, display_name, in_order, opening
from threefold.report.stages import as_text
from threefold.rewards.repetition import repeated_share
from threefold.stages import STAGES

ABSENT = "–"
# metrics of stages that stand in the first table: (stage, metric, format)
MAIN = (
    ("pretrain", "bits_per_byte", ".3f"),
    ("sft", "reply_bits_per_byte", ".3f"),
    ("reward", "accuracy", ".1%"),
    ("dpo", "accuracy", ".1%"),
    ("ppo", "score", "+.2f"),
    ("ppo", "kl", ".2f"),
)
UNCOMPARED = ("arena", "fingerprint", "template_hash")  # tables of their own, and identities


def section(run: Run) -> Section | None:
    """Keys and metrics of both runs; None where no other run was named."""
    if run.other is None:
        return None
    parts = (differing_keys(run, run.other), main_metrics(run, run.other), all_metrics(run, run.other))
    return Section("compare", f"Compared with {run.other.name}", lead(run, run.other), parts=parts)


def lead(run: Run, other: Run) -> tuple[str, ...]:
    """Which artifacts both share, and which model of which run the gold judge prefers."""
    same = [s for s in run.manifests if s in other.manifests and _print(run, s) == _print(other, s)]
    shared = f"Both runs use the same {', '.join(same)}." if same else "The runs share no artifact."
    return (shared, *preferred(run, other))


def _print(run: Run, stage: str) -> str:
    return run.manifests[stage]["fingerprint"]


def preferred(run: Run, other: Run) -> list[str]:
    """For each model of both runs a sentence with the paired difference on the prompts that both were given."""
    if unjudged := [f"run {one.name} has no evaluation, which {command(one.name, 'evaluate')} makes"
                    for one in (run, other) if not one.evaluation]:  # fmt: skip
        return [f"The runs' replies are not compared: {'; '.join(unjudged)}."]
    judge = run.evaluation["judge"]
    if judge != other.evaluation["judge"]:
        return ["The runs' replies were not scored by the same gold judge, so they are not compared."]
    ones, others, sentences = run.samples(), other.samples(), []
    for model in in_order(set(run.models) & set(other.models) - {"human"}):
        gain = between_runs(ones, others, model)
        if gain is None:
            return ["The runs have no held-out prompts in common, so their replies are not compared."]
        word = {1: "scores higher than", -1: "scores lower than", 0: "is not distinguishable from"}[gain.sign]
        sentences.append(
            f"{opening(display_name(model))} of {run.name} {word} that of {other.name} by {judge}: {gain.shown()} on "
            f"{gain.prompts} common prompts."
        )
    return sentences


def differing_keys(run: Run, other: Run) -> Table:
    """Every key of a fingerprint whose value is not the same in both runs, stage by stage."""
    stages_by_difference: dict[tuple[str, str, str], list[str]] = {}
    for stage in STAGES:
        ours, theirs = _parts(run, stage), _parts(other, stage)
        if len(ours) == 1 or len(theirs) == 1:  # a stage that only one of them has differs as a whole
            ours, theirs = ({key: parts[key] for key in list(parts)[:1]} for parts in (ours, theirs))
        for key in dict.fromkeys([*ours, *theirs]):
            if ours.get(key, ABSENT) != theirs.get(key, ABSENT):
                stages_by_difference.setdefault((key, ours.get(key, ABSENT), theirs.get(key, ABSENT)), []).append(stage)
    data = [
        {"key": key, **_both(run, other, ours, theirs), "stages": ", ".join(stages)}
        for (key, ours, theirs), stages in stages_by_difference.items()
    ]
    rows = [(k, _short(a), _short(b), ", ".join(stages)) for (k, a, b), stages in stages_by_difference.items()]
    rows = [("key", run.name, other.name, "stages"), *(rows or [("none", ABSENT, ABSENT, ABSENT)])]
    return Table("compare_configuration", "Configuration that differs", rows, data, texts=4)


def _both(run: Run, other: Run, ours: Any, theirs: Any) -> dict[str, Any]:
    """Columns of both runs' values; a run may be named as another column is."""
    return {f"in {run.name}": ours, f"in {other.name}": theirs}


def _short(value: str) -> str:
    """Digests of files and functions by their first digits."""
    return f"{value[:12]}…" if len(value) == 64 and value.isalnum() else value


def _parts(run: Run, stage: str) -> dict[str, str]:
    """What the stage's fingerprint covers, as text; of a stage that was not made, that alone."""
    if stage not in run.manifests:
        return {f"stage {stage}": "not made"}
    parts = {k: as_text(v) for k, v in run.manifests[stage]["parts"].items() if not k.startswith("parent.")}
    return {f"stage {stage}": "made", f"version of stage {stage}": parts.pop("version"), **parts}


def main_metrics(run: Run, other: Run) -> Table:
    """The metrics that the report begins with, of both runs, and their difference."""
    asked = [(f"{stage}.{key}", form) for stage, key, form in MAIN]
    columns = models.JUDGED | models.TEXT
    for model in in_order({*run.models, *other.models}):
        asked += [(f"evaluate.models.{model}.{key}", form) for key, (_, form) in columns.items()]
    return _metrics("compare_main", "Main metrics of both", run, other, asked)


def all_metrics(run: Run, other: Run) -> Table:
    """Every number among the metrics of both runs."""
    asked = [(key, ".4g") for key in numbers(run.stages, UNCOMPARED) | numbers(other.stages, UNCOMPARED)]
    return _metrics("compare_metrics", f"All {len(asked)} numbers of both", run, other, asked, folded=True)


def _metrics(name: str, title: str, run: Run, other: Run, asked: list[tuple[str, str]], folded: bool = False) -> Table:
    ours, theirs = numbers(run.stages, UNCOMPARED), numbers(other.stages, UNCOMPARED)
    rows, data = [], []
    for key, form in asked:
        a, b = ours.get(key), theirs.get(key)
        if a is None and b is None:
            continue
        less = None if a is None or b is None else a - b
        rows.append(
            (key.replace("evaluate.models.", ""), _cell(a, form), _cell(b, form), _cell(less, f"+{form.lstrip('+')}"))
        )
        data.append({"metric": key, **_both(run, other, a, b), "difference": less})
    return Table(name, title, [("metric", run.name, other.name, "difference"), *rows], data, folded=folded)


def _cell(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


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
