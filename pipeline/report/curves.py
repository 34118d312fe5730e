"""Curves by stage: what each training stage logged, drawn from its step log."""

from dataclasses import dataclass

from threefold.display import figures
from threefold.display.parts import Figure, Section
from threefold.fileio import read_lines
from threefold.report.run import Run


@dataclass(frozen=True)
class Curve:
    """A plot of a training stage: its title, the question it answers, and the logged metrics with label and colour."""

    name: str
    title: str
    note: str
    columns: dict[str, tuple[str, str]]


LOSS = "Has training come to rest, and does nothing spike?"
CURVES = {
    "pretrain": [Curve("loss", "training loss, nats per token", LOSS, {"loss": ("loss", "base")})],
    "sft": [Curve("loss", "training loss, nats per reply token", LOSS, {"loss": ("loss", "sft")})],
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


def section(run: Run) -> Section:
    """A figure for every curve of which at least two steps were logged."""
    drawn = [figure for stage in CURVES if stage in run.stages for figure in of_stage(run, stage)]
    lacking = [run.lacks(stage) for stage in CURVES if run.asks_for(stage) and stage not in run.stages]
    return Section("curves", "Curves by stage", tuple(lacking), parts=tuple(drawn))


def of_stage(run: Run, stage: str) -> list[Figure]:
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
