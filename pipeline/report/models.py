"""Models on held-out prompts in the report: what judges say, what it cost in KL, and what became of the text."""

import re
from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import statistics
from threefold.report.run import Run, in_order

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


def section(run: Run) -> Section | None:
    """Tables and figures of the evaluation; None where the configuration asks for none."""
    if not run.asks_for("evaluate"):
        return None
    title = "Models on held-out prompts"
    if not run.models:
        return Section("models", title, (run.lacks("evaluate"),))
    judged = table(run, JUDGED, "models", "What the judges say, and KL")
    text = table(run, TEXT, "models_text", "What became of the text")
    by_model, *by_kl = plots(run, judged.data)
    fold = "The text of the replies, and the gold judge's means as a figure"
    return Section("models", title, lead(run), parts=(judged, *by_kl), fold=fold, folded=(text, by_model))


def plots(run: Run, judged: list[dict[str, Any]]) -> list[Figure]:
    """The gold judge's mean of each model, and that mean against KL."""
    judge = run.evaluation["judge"]
    drawn = [
        figures.intervals(
            "gold_by_model", f"Gold judge: {judge}", "Which model pleases the gold judge, and how sure is that?",
            judged, "gold_mean", "mean score with 95 % interval",
        )
    ]  # fmt: skip
    if moved := [row for row in judged if row.get("kl") is not None]:
        note = "What did the gain cost? Higher is better, further left is closer to SFT."
        drawn.append(figures.gains_by_kl("gold_by_kl", "Gold judge against KL", note, moved, f"{judge}, mean score"))
    return drawn


def lead(run: Run) -> tuple[str, ...]:
    """What part the judges had in training, and how the tables are to be read."""
    gold, second = (" and ".join(roles(run, judge)) for judge in ("judge", "second_judge"))
    sentences = [f"The gold judge also {gold}."] if gold else []
    sentences.append(f"The second judge also {second}." if second else "The second judge took no part in training.")
    sentences.append("Intervals are 95 % intervals of the mean over prompts. KL is measured against the SFT model.")
    return (" ".join(sentences),)


def roles(run: Run, judge: str) -> list[str]:
    """What `evaluate.<judge>` did in training, as verbs: labelled comparisons, or paid PPO, by itself or as a part.

    A judge of several parts took part where any of its functions, with the same arguments, did.
    """
    clauses, of = [], {stage: manifest["parts"] for stage, manifest in run.manifests.items()}
    asked = _functions(f"evaluate.{judge}.", of["evaluate"])
    labelled = _functions("comparisons.judge.", of.get("comparisons", {}))
    if "data.preferences.format" in of.get("comparisons", {}):  # then no judge labelled them
        labelled = set()
    paid = _functions("ppo.reward.", of.get("ppo", {}))
    if asked & labelled:
        word = "labelled" if asked == labelled else "had a part in labelling"
        clauses.append(f"{word} the comparisons that the reward model and DPO learnt from")
    if asked & paid:
        clauses.append("was PPO's reward" if asked == paid else "was a part of PPO's reward")
    return clauses


def labeller(run: Run) -> str:
    """Who labelled the preferences, and whether the gold judge is the same function; empty where there are none."""
    parts = run.manifests.get("comparisons", {}).get("parts")
    if parts is None or "evaluate" not in run.manifests:
        return ""
    gold = f"the gold judge is {run.evaluation['judge']}"
    if "data.preferences.format" in parts:
        return f"The preferences are those of the data given; {gold}."
    if parts.get("comparisons.label_by", "judge") != "judge":
        who = {"order": "the order of the policies", "people": "people"}[parts["comparisons.label_by"]]
        return f"The preferences were labelled by {who}; {gold}."
    labelled = _functions("comparisons.judge.", parts)
    names = " and ".join(sorted(function[0].rpartition(":")[2] for function in labelled))
    asked = _functions("evaluate.judge.", run.manifests["evaluate"]["parts"])
    same = "the same function" if asked == labelled else "in part the same" if asked & labelled else "another function"
    return f"The preferences were labelled by {names}; {gold}, {same}."


def _functions(prefix: str, parts: dict[str, Any]) -> set[tuple[str, ...]]:
    """The functions with their arguments of the `reward` config below `prefix`; the learned reward model is `null`."""
    below = {key.removeprefix(prefix): value for key, value in parts.items() if key.startswith(prefix)}
    places = [key.removesuffix("function") for key in below if re.fullmatch(r"(parts\.[^.]+\.)?function", key)]
    if len(places) > 1:
        places = [place for place in places if place]  # a sum of parts has no function of its own
    return {(str(below[f"{place}function"]), *_arguments(below, f"{place}args")) for place in places}


def _arguments(below: dict[str, Any], place: str) -> list[str]:
    return sorted(f"{key.removeprefix(place)}={value}" for key, value in below.items() if key.startswith(place))


def table(run: Run, columns: dict[str, tuple[str, str]], name: str, title: str, note: str = "") -> Table:
    """A row for each model that was evaluated, with those of the columns that any of them has."""
    shown = {key: column for key, column in columns.items() if any(key in m for m in run.models.values())}
    heading = ("model", *(label.format(**run.evaluation) for label, _ in shown.values()))
    rows: list[tuple[str, ...]] = [heading]
    data = []
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
