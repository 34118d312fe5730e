"""Training in the report: the reward model's check-up, and the curves that each stage logged."""

from dataclasses import dataclass
from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import checkup, statistics
from threefold.fileio import read_lines
from threefold.report.run import Run


def reward_section(run: Run) -> Section | None:
    """The check-up under the limits `reward.gate`; None where the configuration asks for no reward model."""
    if not run.asks_for("reward"):
        return None
    title, metrics = "Reward model: check-up", run.stages.get("reward", {})
    if not checked(run):
        return Section("reward", title, (run.lacks("reward") or "This reward model was made without a check-up.",))
    first, *rest = checkup.verdict(metrics, run.config.reward.gate)
    passes = not checkup.failures(metrics, run.config.reward.gate)
    parts = (*reward_plots(metrics, run.config.reward.gate), *reward_tables(metrics))
    return Section("reward", title, verdict=(passes, first), points=tuple(rest), parts=parts)


def checked(run: Run) -> bool:
    """Whether there is a reward model with a check-up; those of early versions have none, or not all of it."""
    return "over_length_ci95" in run.stages.get("reward", {})


def reward_plots(metrics: dict[str, Any], gate: Any) -> list[Figure]:
    """How sure the model may be, and what it pays for."""
    sure = _with_ends(metrics["reliability"])
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


def reward_tables(metrics: dict[str, Any]) -> list[Table]:
    """Accuracy by parts of the held-out pairs, and the probes."""
    by_gap = {"accuracy_by_score_gap": "the model's score gap", "accuracy_by_gap": "the gap of the labels"}
    heading = ("pairs", "accuracy", "95 % interval")
    shown = []
    for key, words in by_gap.items():
        if key in metrics:
            rows = [(f"{row['from']:.2f} to {row['to']:.2f}", *_part(row)) for row in metrics[key]]
            title = f"Accuracy by {words}, in quarters"
            shown.append(Table(f"reward_{key}", title, [("gap", *heading), *rows], _with_ends(metrics[key])))
    rows = [(row["pairs_where"], *_part(row)) for row in metrics["accuracy_by_length"]]
    data = _with_ends(metrics["accuracy_by_length"])
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


def _with_ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "ci95"}
        | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True))
        for row in rows
    ]


@dataclass(frozen=True)
class Curve:
    """A plot of a training stage: its title, the question it answers, and the logged metrics with label and colour."""

    name: str
    title: str
    note: str
    columns: dict[str, tuple[str, str]]


LOSS_NOTE = "Has training come to rest, and does nothing spike?"
CURVES = {
    "pretrain": [Curve("loss", "training loss, nats per token", LOSS_NOTE, {"loss": ("loss", "base")})],
    "sft": [Curve("loss", "training loss, nats per reply token", LOSS_NOTE, {"loss": ("loss", "sft")})],
    "reward": [
        Curve("loss", "Bradley-Terry loss, nats", "Below ln 2 = 0.693 it tells replies apart.",
              {"loss": ("loss", "reward")}),
        Curve("accuracy", "training accuracy", "How far above one half is it?", {"accuracy": ("accuracy", "reward")}),
    ],
    "dpo": [
        Curve(
            "logps", "log-probability of replies, nats", "Do chosen replies stay likely, or do both fall?",
            {"logps/chosen": ("chosen", "dpo"), "logps/rejected": ("rejected", "human")},
        ),
        Curve(
            "rewards", "change against SFT, β nats", "Does it raise the chosen, or lower both?",
            {"rewards/chosen": ("chosen", "dpo"), "rewards/rejected": ("rejected", "human")},
        ),
        Curve(
            "accuracy", "training accuracy of the implicit reward", "Does it learn the preferences?",
            {"rewards/accuracies": ("accuracy", "dpo")},
        ),
    ],
    "ppo": [
        Curve("score", "score, normalised where a reward model gives it", "Does the policy earn more?",
              {"score": ("score", "ppo"), "reward": ("score less KL", "human")}),
        Curve("kl", "KL to the SFT model, nats per reply", "What does that cost?", {"kl": ("KL", "ppo")}),
        Curve("reply_tokens", "reply length, tokens", "Is length being paid?", {"reply_tokens": ("tokens", "ppo")}),
        Curve("ended_share", "share of replies that end", "Do replies still end?", {"ended_share": ("ended", "ppo")}),
        Curve("entropy", "entropy, nats per token", "Do replies grow alike?", {"entropy": ("entropy", "ppo")}),
        Curve("explained_variance", "explained variance of the critic", "Has the critic learnt anything?",
              {"explained_variance": ("explained variance", "ppo")}),
    ],
}  # fmt: skip


def curves_section(run: Run) -> Section:
    """A figure for every curve of which at least two steps were logged."""
    drawn = [figure for stage in CURVES if stage in run.stages for figure in stage_curves(run, stage)]
    lacking = [run.lacks(stage) for stage in CURVES if run.asks_for(stage) and stage not in run.stages]
    return Section("curves", "Curves by stage", tuple(lacking), parts=tuple(drawn))


def stage_curves(run: Run, stage: str) -> list[Figure]:
    """The figures of one training stage."""
    steps, drawn = read_lines(run.folder / stage / "log.jsonl"), []
    for curve in CURVES[stage]:
        data = [
            {"step": row["step"], **{key: row.get(key) for key in curve.columns}}
            for row in steps
            if any(key in row for key in curve.columns)
        ]
        if len(data) > 1:
            title = f"{stage}: {curve.title}"
            drawn.append(figures.lines(f"{stage}_{curve.name}", title, curve.note, data, curve.columns))
    return drawn
