"""Two runs beside each other: which keys differ, and what that did to every metric."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.report import differences, models
from threefold.report.run import Run, display_name, in_order, opening
from threefold.report.stages import as_text
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
    judge = run.evaluation.get("judge")
    if judge is None or judge != other.evaluation.get("judge"):
        return ["The runs' replies were not scored by the same gold judge, so they are not compared."]
    ones, others, sentences = run.samples(), other.samples(), []
    for model in in_order(set(run.models) & set(other.models) - {"human"}):
        gain = differences.between_runs(ones, others, model)
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
    asked = [(key, ".4g") for key in dict.fromkeys([*flat(run.stages), *flat(other.stages)])]
    return _metrics("compare_metrics", f"All {len(asked)} numbers of both", run, other, asked, folded=True)


def _metrics(name: str, title: str, run: Run, other: Run, asked: list[tuple[str, str]], folded: bool = False) -> Table:
    ours, theirs, rows, data = flat(run.stages), flat(other.stages), [], []
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


def flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers below `metrics` by dotted key; lists, texts and identities are left out."""
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict) and key not in UNCOMPARED:
            numbers |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers
