"""The reward model's check-up in the report: verdict, tables and the reliability plot."""

from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import checkup, statistics
from threefold.report.run import Run


def section(run: Run) -> Section | None:
    """The check-up under the limits `reward.gate`; None where the configuration asks for no reward model."""
    if not run.asks_for("reward"):
        return None
    title, metrics = "Reward model: check-up", run.stages.get("reward", {})
    if not checked(run):
        return Section("reward", title, (run.lacks("reward") or "This reward model was made without a check-up.",))
    first, *rest = checkup.verdict(metrics, run.config.reward.gate)
    passes = not checkup.failures(metrics, run.config.reward.gate)
    parts = (*plots(metrics, run.config.reward.gate), *tables(metrics))
    return Section("reward", title, verdict=(passes, first), points=tuple(rest), parts=parts)


def checked(run: Run) -> bool:
    """Whether there is a reward model with a check-up; those of early versions have none, or not all of it."""
    return "over_length_ci95" in run.stages.get("reward", {})


def plots(metrics: dict[str, Any], gate: Any) -> list[Figure]:
    """How sure the model may be, and what it pays for."""
    sure = _data(metrics["reliability"])
    probes = [
        {"probe": checkup.PROBE_NAMES[name], **probe, "limit": gate.probes.get(name)}
        for name, probe in metrics["probes"].items()
    ]
    return [
        figures.reliability(
            "reward_reliability", "Share right against confidence, held-out pairs",
            "May its probabilities be believed? On the dotted line it is as right as it is sure.",
            sure,
        ),
        figures.shares(
            "reward_probes", "How often a probe beats the chosen reply",
            "What does it pay for that is no better? A stroke is the gate's limit.",
            probes, "probe", "preferred_share", "share of prompts", "limit",
        ),
    ]  # fmt: skip


def tables(metrics: dict[str, Any]) -> list[Table]:
    """Accuracy by parts of the held-out pairs, and the probes."""
    by_gap = {"accuracy_by_score_gap": "the model's score gap", "accuracy_by_gap": "the gap of the labels"}
    heading = ("pairs", "accuracy", "95 % interval")
    shown = []
    for key, words in by_gap.items():
        if key in metrics:
            rows = [(f"{row['from']:.2f} to {row['to']:.2f}", *_part(row)) for row in metrics[key]]
            title = f"Accuracy by {words}, in quarters"
            shown.append(Table(f"reward_{key}", title, [("gap", *heading), *rows], _data(metrics[key])))
    rows = [(row["pairs_where"], *_part(row)) for row in metrics["accuracy_by_length"]]
    data = _data(metrics["accuracy_by_length"])
    shown.append(Table("reward_accuracy_by_length", "Accuracy by length", [("pairs where", *heading), *rows], data))
    return [*shown, probe_table(metrics["probes"])]


def probe_table(probes: dict[str, dict[str, float]]) -> Table:
    """What the model makes of replies that are no better than the chosen one."""
    rows = [
        (checkup.PROBE_NAMES[name], f"{p['prompts']}", f"{p['score_mean']:+.2f}", f"{p['preferred_share']:.0%}")
        for name, p in probes.items()
    ]
    return Table(
        "reward_probe_scores",
        "Probes: replies that are no better than the chosen one",
        [("probe", "prompts", "mean score", "beats the chosen reply"), *rows],
        [{"probe": name, **probe} for name, probe in probes.items()],
    )


def _part(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['pairs']:,}", f"{row['accuracy']:.1%}", statistics.shown(row["ci95"], ".1%")


def _data(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "ci95"}
        | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True))
        for row in rows
    ]
