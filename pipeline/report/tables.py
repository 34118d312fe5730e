"""Tables of a run's stages and of its models, for the page, Markdown and the terminal."""

from typing import Any

from threefold.display.parts import Table
from threefold.evaluation import statistics
from threefold.report.names import in_order
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


def _pairs(metrics: dict[str, Any]) -> str:
    if "pairs" not in metrics:
        return f"{metrics['pool']:,} pairs for people to label"
    return f"{metrics['pairs']:,} pairs, {metrics['test_pairs']:,} held out"


def _gold_means(models: dict[str, Any], words: dict[str, str]) -> str:
    return ", ".join(f"{models[name]['gold_mean']:.3f} {label}" for name, label in words.items() if name in models)


def stages(run: Run) -> Table:
    """A row for each finished stage: name, result, what it is measured against, time."""
    made = [name for name in STAGES if name in run.stages]
    rows = [(name, *DESCRIBE[name](run.stages[name]), f"{run.stages[name]['seconds']:,.0f} s") for name in made]
    data = [
        {"stage": name, "result": result, "measured_against": against, "seconds": run.stages[name]["seconds"]}
        | {key: run.stages[name][key] for key in ("peak_memory_bytes", "fingerprint")}
        for name, result, against, _ in rows
    ]
    heading = ("stage", "result", "measured against", "time")
    return Table("stages", "What each stage reached", [heading, *rows], data, texts=3)


# columns of the table of models: metric → (heading, format); a column that no model has is left out
JUDGED = {
    "gold_mean": ("gold judge: {judge}", ".3f"),
    "greedy_gold_mean": ("{judge}, greedy", ".3f"),
    "second_judge_mean": ("second judge: {second_judge}", ".3f"),
    "proxy_mean": ("reward model", "+.2f"),
    "kl": ("KL, nats per reply", ".2f"),
}
TEXT = {
    "length": ("length, characters", ".1f"),
    "distinct_2": ("distinct-2", ".3f"),
    "self_bleu": ("self-BLEU", ".3f"),
    "ended_share": ("ended", ".1%"),
    "repetition": ("repeated", ".1%"),
    "reply_bits_per_byte": ("reply bits per byte", ".3f"),
    "text_bits_per_byte": ("text bits per byte", ".3f"),
}


def models(run: Run, columns: dict[str, tuple[str, str]], name: str, title: str, note: str = "") -> Table:
    """A row for each model that was evaluated, with those of the columns that any of them has."""
    shown = {key: column for key, column in columns.items() if any(key in m for m in run.models.values())}
    heading = ("model", *(label.format(**run.evaluation) for label, _ in shown.values()))
    rows, data = [heading], []
    for model in in_order(run.models):
        metrics = run.models[model]
        rows.append((model, *(_cell(metrics, key, form) for key, (_, form) in shown.items())))
        data.append({"model": model} | {k: v for key in shown for k, v in _numbers(metrics, key).items()})
    return Table(name, title, rows, data, note, models=True)


def _interval_of(metrics: dict[str, Any], key: str) -> list[float] | None:
    return metrics.get(f"{key.removesuffix('_mean')}_ci95")


def _cell(metrics: dict[str, Any], key: str, form: str) -> str:
    if key not in metrics:
        return "–"
    has_interval = f"{key.removesuffix('_mean')}_ci95" in metrics
    return format(metrics[key], form) + (
        f" {statistics.shown(_interval_of(metrics, key), form)}" if has_interval else ""
    )


def _numbers(metrics: dict[str, Any], key: str) -> dict[str, float | None]:
    has_interval = f"{key.removesuffix('_mean')}_ci95" in metrics
    low, high = statistics.ends(_interval_of(metrics, key))
    return {key: metrics.get(key)} | ({f"{key}_low": low, f"{key}_high": high} if has_interval else {})
