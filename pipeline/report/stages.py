"""Stages in the report: what each reached, and what it was made with."""

from typing import Any

from markupsafe import Markup

from threefold.display.parts import Section, Table
from threefold.evaluation import statistics
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
    """The diagram, and the table of what each stage reached."""
    drawn = Markup("").join(lineage.diagram(run, frame) for frame in lineage.FRAMES)
    lead = (
        "Each box is a stage with its fingerprint; an arrow says what it was made from. A stage is made again when its "
        "configuration, its code's version or anything above it changes.",
    )
    return Section("stages", "Stages and lineage", lead, html=drawn, parts=(table(run), lineage.table(run)))


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
    """Tables of the environment and of the keys that fingerprints cover."""
    made = sorted(manifest["created"] for manifest in run.manifests.values())
    lead = f"Made between {made[0].replace('T', ' ')} and {made[-1].replace('T', ' ')}, local time of the machine."
    return Section(
        "environment", "Environment and configuration", (lead,), parts=(environments(run), covered_keys(run))
    )


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
