"""Models on held-out prompts in the report: what judges say, what it cost in KL, and what became of the text."""

import re
from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section
from threefold.report import tables
from threefold.report.run import Run


def section(run: Run) -> Section | None:
    """Tables and figures of the evaluation; None where the configuration asks for none."""
    if not run.asks_for("evaluate"):
        return None
    title = "Models on held-out prompts"
    if not run.models:
        return Section("models", title, (run.lacks("evaluate"),))
    judged = tables.models(run, tables.JUDGED, "models", "What the judges say, and KL")
    text = tables.models(run, tables.TEXT, "models_text", "What became of the text")
    return Section("models", title, lead(run), parts=(judged, *plots(run, judged.data), text))


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


def _functions(prefix: str, parts: dict[str, Any]) -> set[tuple[str, ...]]:
    """The functions with their arguments of the `reward` config below `prefix`; the learned reward model is `null`."""
    below = {key.removeprefix(prefix): value for key, value in parts.items() if key.startswith(prefix)}
    places = [key.removesuffix("function") for key in below if re.fullmatch(r"(parts\.[^.]+\.)?function", key)]
    if len(places) > 1:
        places = [place for place in places if place]  # a sum of parts has no function of its own
    return {(str(below[f"{place}function"]), *_arguments(below, f"{place}args")) for place in places}


def _arguments(below: dict[str, Any], place: str) -> list[str]:
    return sorted(f"{key.removeprefix(place)}={value}" for key, value in below.items() if key.startswith(place))
