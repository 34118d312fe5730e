"""Stages in the report: what each reached, what it was made with, the reward model's check-up and the curves."""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import checkup, statistics
from threefold.fileio import read_lines
from threefold.report import lineage
from threefold.report.run import Run
from threefold.stages import STAGES

# a stage's metrics → its result, and what that is measured against
DESCRIBE = {
    "tokenizer": lambda m: (f"{m['bytes_per_token']:.2f} bytes per token", f"{m['vocab_size']:,} tokens"),
    "pretrain": lambda m: (
        f"{m['bits_per_byte']:.3f} bits per byte, held out",
        ", ".join(f"{name} {bits:.2f}" for name, bits in m["baselines"].items()),
    ),
    "sft": lambda m: (
        f"{m['reply_bits_per_byte']:.3f} bits per byte of replies; {m['ended_share']:.1%} of samples end",
        f"base model {m['reply_bits_per_byte_base']:.3f}",
    ),
    "comparisons": lambda m: (_pairs(m), ""),
    "reward": lambda m: (
        f"{m['accuracy']:.1%} {statistics.shown(m['accuracy_ci95'], '.1%')} accuracy, held out",
        f"length only {m['accuracy_length_only']:.1%}, bag of words {m['accuracy_bag_of_words']:.1%}",
    ),
    "dpo": lambda m: (
        f"{m['accuracy']:.1%} {statistics.shown(m['accuracy_ci95'], '.1%')} accuracy of the implicit reward",
        f"chosen {m['chosen_logprob_change']:+.1f}, rejected {m['rejected_logprob_change']:+.1f} nats",
    ),
    "ppo": lambda m: (
        f"score {m['score']:+.2f} at KL {m['kl']:.1f} nats per reply, {m['episodes']:,} episodes",
        "SFT model: KL 0, and 0 ± 1 where a reward model scores",
    ),
    "frontier": lambda m: (
        f"{len(m['points'])} points, gold up to {max(point['gold'] for point in m['points']):.3f}",
        f"{m['points'][0]['gold']:.3f} at KL 0",
    ),
    "evaluate": lambda m: (
        f"{m['judge']} {_gold_means(m['models'], {'ppo': 'with PPO', 'dpo': 'with DPO'})}",
        _gold_means(m["models"], {"base": "base", "sft": "SFT", "human": "people"}),
    ),
}


def _described(stage: str, metrics: dict[str, Any]) -> tuple[str, str]:
    """The result of a stage, and what it is measured against; its main metric where no sentence is written for it."""
    if stage in DESCRIBE:
        return DESCRIBE[stage](metrics)
    metric = STAGES[stage].metric
    return (f"{metric} {metrics[metric]:.4g}" if metric in metrics else "", "")


def _pairs(metrics: dict[str, Any]) -> str:
    if "pairs" not in metrics:
        return f"{metrics['pool']:,} pairs for people to label"
    return f"{metrics['pairs']:,} pairs, {metrics['test_pairs']:,} held out"


def _gold_means(models: dict[str, Any], words: dict[str, str]) -> str:
    return ", ".join(f"{models[name]['gold_mean']:.3f} {label}" for name, label in words.items() if name in models)


def section(run: Run) -> Section:
    """The table of what each stage reached; below it, folded, the diagram."""
    drawn = Markup("").join(lineage.diagram(run, frame) for frame in lineage.FRAMES)
    fold = "Lineage: each stage with its fingerprint, and what it was made from"
    return Section(
        "stages", "Stages and lineage", html=drawn, parts=(table(run),), fold=fold, folded=(lineage.table(run),)
    )


def table(run: Run) -> Table:
    """A row for each finished stage: name, result, what it is measured against, time."""
    made = [name for name in STAGES if name in run.stages]
    rows = [(name, *_described(name, run.stages[name]), f"{run.stages[name]['seconds']:,.0f} s") for name in made]
    data = [
        {"stage": name, "result": result, "measured_against": against, "seconds": run.stages[name]["seconds"]}
        | {key: run.stages[name][key] for key in ("peak_memory_bytes", "fingerprint")}
        for name, result, against, _ in rows
    ]
    heading = ("stage", "result", "measured against", "time")
    return Table("stages", "What each stage reached", [heading, *rows], data, texts=3)


def environment_section(run: Run) -> Section:
    """When it was made; folded, tables of the environment and of the keys that fingerprints cover."""
    made = sorted(manifest["created"] for manifest in run.manifests.values())
    lead = f"Made between {made[0].replace('T', ' ')} and {made[-1].replace('T', ' ')}, local time of the machine."
    title, fold = "Environment and configuration", "Libraries, device and every key"
    return Section("environment", title, (lead,), fold=fold, folded=(environments(run), covered_keys(run)))


def environments(run: Run) -> Table:
    """Each property of the environment with the stages that were made so."""
    stages_by_value: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in run.manifests.items():
        for name, value in manifest["environment"].items():
            stages_by_value.setdefault((name, value), []).append(stage)
    data = [
        {"what": name, "value": value, "stages": _listed(run, s)}
        for (name, value), s in sorted(stages_by_value.items())
    ]
    rows = [tuple(row.values()) for row in data]
    return Table("environment", "Environment", [("what", "value", "stages"), *rows], data, texts=3)


def covered_keys(run: Run) -> Table:
    """Each key that a fingerprint covers with its value and the stages that see it."""
    data = [
        {"key": key, "value": value, "stages": _listed(run, stages)}
        for (key, value), stages in sorted(covered(run).items())
    ]
    rows = [tuple(row.values()) for row in data]
    title = f"Configuration: {len(rows)} keys that the fingerprints cover"
    return Table("configuration", title, [("key", "value", "stages"), *rows], data, texts=3, folded=True)


def covered(run: Run) -> dict[tuple[str, str], list[str]]:
    """(key, value as text) → the stages whose fingerprint covers it so; parents and versions are left out."""
    stages_by_value: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in run.manifests.items():
        for key, value in manifest["parts"].items():
            if not key.startswith("parent.") and key != "version":
                stages_by_value.setdefault((key, as_text(value)), []).append(stage)
    return stages_by_value


def as_text(value: Any) -> str:
    """A value as it is written in an override."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _listed(run: Run, stages: list[str]) -> str:
    return "all" if len(stages) == len(run.manifests) else ", ".join(stages)


def reward_section(run: Run) -> Section | None:
    """The check-up under the limits `reward.gate`; None where the configuration asks for no reward model."""
    if not run.asks_for("reward"):
        return None
    title, metrics = "Reward model: check-up", run.stages.get("reward", {})
    if not checked(run):
        return Section("reward", title, (run.lacks("reward") or "This reward model was made without a check-up.",))
    first, *rest = checkup.verdict(metrics, run.config.reward.gate)
    passes = not checkup.failures(metrics, run.config.reward.gate)
    folded = (*reward_plots(metrics, run.config.reward.gate), *reward_tables(metrics))
    fold = "Calibration, accuracy by parts of the pairs, and probes"
    return Section("reward", title, verdict=(passes, first), points=tuple(rest), fold=fold, folded=folded)


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


LOSS_NOTE = "Has training come to rest, and does the held-out loss still fall?"
LOSS = {"loss": ("loss", "one"), "eval_loss": ("held out", "human")}
CURVES = {
    "pretrain": [Curve("loss", "training loss, nats per token", LOSS_NOTE, LOSS | {"loss": ("loss", "base")})],
    "sft": [Curve("loss", "training loss, nats per reply token", LOSS_NOTE, LOSS | {"loss": ("loss", "sft")})],
    "reward": [
        Curve("loss", "Bradley-Terry loss, nats", "Below ln 2 = 0.693 it tells replies apart.",
              LOSS | {"loss": ("loss", "reward")}),
        Curve("accuracy", "training accuracy", "How far above one half is it?", {"accuracy": ("accuracy", "reward")}),
    ],
    "dpo": [
        Curve("loss", "DPO loss, nats", LOSS_NOTE, LOSS | {"loss": ("loss", "dpo")}),
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


FIRST = ("ppo_score", "ppo_kl")  # what is looked at first


def curves_section(run: Run) -> Section:
    """A figure for every curve of which at least two steps were logged; all but PPO's score and KL are folded."""
    drawn = [figure for stage in CURVES if stage in run.stages for figure in stage_curves(run, stage)]
    lacking = [run.lacks(stage) for stage in CURVES if run.asks_for(stage) and stage not in run.stages]
    first = tuple(figure for figure in drawn if figure.name in FIRST)
    others = tuple(figure for figure in drawn if figure.name not in FIRST)
    fold = f"{'All other' if first else 'All'} curves ({len(others)})" if others else ""
    return Section("curves", "Curves by stage", tuple(lacking), parts=first, fold=fold, folded=others)


def stage_curves(run: Run, stage: str) -> list[Figure]:
    """The figures of one training stage."""
    steps, drawn = read_lines(run.folder / stage / "log.jsonl"), []
    for curve in CURVES[stage]:
        columns = {key: drawn_as for key, drawn_as in curve.columns.items() if any(key in row for row in steps)}
        data = [
            {"step": row["step"], **{key: row.get(key) for key in columns}}
            for row in steps
            if any(key in row for key in columns)
        ]
        if len(data) > 1:
            title = f"{stage}: {curve.title}"
            drawn.append(figures.lines(f"{stage}_{curve.name}", title, curve.note, data, columns))
    return drawn
