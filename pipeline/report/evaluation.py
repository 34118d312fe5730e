"""Single findings of the evaluation: paired tests, most changed prompts, tasks with answers, and contamination."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.evaluation import side_effects, statistics
from threefold.report.run import Run, aligned, in_order

PAIRED_LEAD = (
    "Both models' replies to the same prompts, by the two judges: the mean difference, its 95 % interval, and p "
    "of the paired permutation test; the last p is corrected for all comparisons of the table."
)
CHANGED = (
    "Where the gold judge's score of a model's reply rose most over that of the SFT model's, and where it fell most."
)


def paired_section(run: Run) -> Section | None:
    """Paired tests, DPO's drift, and the most changed prompts; None where there is no evaluation to show them of."""
    if not run.evaluation:
        return None
    tables = [paired(run.evaluation), *(changed(model, run.samples()) for model in in_order(aligned(run)))]
    drift = run.evaluation.get("dpo_drift")
    verdict = (not drift["alarm"], f"{side_effects.alarm_in_words(drift)}.") if drift else None
    return Section(
        "effects", "Who is better, and what changed", (PAIRED_LEAD,), verdict, parts=tuple(t for t in tables if t)
    )


def paired(evaluate: dict[str, Any]) -> Table | None:
    """The paired tests; None where nothing was compared."""
    names = {"gold": evaluate["judge"], "second": evaluate["second_judge"]}
    tests = evaluate.get("paired", ())
    rows = [
        (
            names[row["judge"]],
            f"{row['model']} − {row['against']}",
            f"{row['difference']:+.3f}",
            statistics.shown(row["ci95"], "+.3f"),
            f"{row['p']:.4f}",
            f"{row['p_holm']:.4f}",
            f"{row['prompts']:,}",
        )
        for row in tests
    ]
    heading = ("judge", "difference of", "mean", "95 % interval", "p", "p, all together (Holm)", "prompts")
    data = [
        {k: v for k, v in row.items() if k != "ci95"}
        | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True))
        for row in tests
    ]
    return Table("paired", "Is one better than the other?", [heading, *rows], data, texts=2) if rows else None


def changed(model: str, samples: list[dict[str, Any]]) -> Table | None:
    """The prompts that changed most from SFT to `model`, with both replies; None where none changed."""
    changed_prompts = side_effects.most_changed(samples, model)
    rows = [
        (
            f"{row['prompt'][-1]['content']}",
            row["reply_against"],
            row["reply"],
            f"{row['score_against']:+.2f} → {row['score']:+.2f}",
            f"{row['text_change']:.0%}",
        )
        for row in changed_prompts
    ]
    heading = ("prompt, last turn", "SFT", model, "gold", "words changed")
    data = [row | {"prompt": row["prompt"][-1]["content"]} for row in changed_prompts]
    title = f"Most changed prompts: {model}"
    return Table(f"changed_{model}", title, [heading, *rows], data, CHANGED, texts=3, folded=True) if rows else None


TASKS_LEAD = (
    "Share of answers that a rule finds right, with Wilson's 95 % interval; every reply with its verdict is in "
    "evaluate/tasks.jsonl of the run."
)

# what is shown of a task: metric → what stands behind the task's name in the heading
TASK_METRICS = {
    "accuracy": "",
    "greedy_accuracy": ", greedy",
    "instructions_strict": ", single instructions",
    "greedy_instructions_strict": ", single instructions, greedy",
}


def tasks_section(run: Run) -> Section | None:
    """What each model answers; None where the evaluation has no tasks."""
    shown = task_table(run)
    return Section("tasks", "Tasks with answers", (TASKS_LEAD,), parts=(shown,)) if shown else None


def task_table(run: Run) -> Table | None:
    """The table of the tasks; None where there are none."""
    rows = task_rows(run.evaluation, in_order(run.models)) if run.models else []
    if not rows:
        return None
    answered = {name: run.models[name]["tasks"] for name, *_ in rows[1:]}
    data = [
        {"model": name, "task": task} | {k: v for k, v in scores.items() if not isinstance(v, list)}
        for name, tasks in answered.items()
        for task, scores in tasks.items()
    ]
    return Table("tasks", "Right answers", rows, data, models=True)


def task_rows(evaluate: dict[str, Any], models: list[str]) -> list[tuple[str, ...]]:
    """Heading and a row for each of `models` that answered; empty where the evaluation has no tasks."""
    answered = {name: evaluate["models"][name]["tasks"] for name in models if evaluate["models"][name].get("tasks")}
    if not answered:
        return []
    columns = [
        (task, metric)
        for task in next(iter(answered.values()))
        for metric in TASK_METRICS
        if any(metric in scores[task] for scores in answered.values())
    ]
    problems = {task: f"{scores['problems']:,}" for task, scores in evaluate["tasks"].items()}
    heading = ("model", *(f"{task}{TASK_METRICS[metric]} (n = {problems[task]})" for task, metric in columns))
    return [heading, *((name, *(_accuracy(scores[t], m) for t, m in columns)) for name, scores in answered.items())]


def _accuracy(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:  # a way to decode several samples has no greedy replies
        return "–"
    return f"{metrics[key]:.1%} {statistics.shown(metrics[f'{key}_ci95'], '.1%')}"


CONTAMINATION_LEAD = (
    "An item is a copy where all of its word 8-grams occur in a stage's training text, nearly one from half of them. "
    "Prompts are looked for with people's replies, held-out pairs with both replies."
)
KINDS = {"copies": "whole", "near_copies": "nearly", "clean": "not", "too_short": "too short to tell"}
SET_NAMES = {
    "prompts": "held-out prompts",
    "validation_prompts": "validation prompts",
    "base_text": "held-out base text",
    "held_out_pairs": "held-out pairs",
}

Counts = dict[str, Any]  # of one evaluation set: by training stage, and how many were left out


def contamination_section(run: Run) -> Section | None:
    """The counts of every set; None where there is no evaluation."""
    by_set = contamination_counts(run)
    if by_set is None:
        return None
    data = [
        {"set": name, "stage": stage} | counts
        for name, sets in by_set.items()
        for stage, counts in by_stage(sets).items()
    ]
    shown = Table("contamination", "Test items that occur in training text", contamination_rows(by_set), data)
    return Section("contamination", "Contamination", (CONTAMINATION_LEAD,), parts=(shown,))


def contamination_counts(run: Run) -> dict[str, Counts] | None:
    """The counts by set; None without an evaluation, and of one that counted prompts alone (before its version 7)."""
    by_set = run.evaluation.get("contamination", {})
    return by_set if "prompts" in by_set else None


def contamination_rows(by_set: dict[str, Counts]) -> list[tuple[str, ...]]:
    """Heading and a row for each set."""
    stages = by_stage(next(iter(by_set.values())))
    rows = [("set", *(f"in {stage}: {', '.join(KINDS.values())}" for stage in stages), "left out")]
    for name, sets in by_set.items():
        cells = [", ".join(f"{counts[kind]:,}" for kind in KINDS) for counts in by_stage(sets).values()]
        rows.append((set_name(name), *cells, left_out(sets)))
    return rows


def by_stage(counts: Counts) -> dict[str, dict[str, int]]:
    """The counts of one set by training stage."""
    return {stage: stage_counts for stage, stage_counts in counts.items() if stage != "removed"}


def left_out(counts: Counts) -> str:
    """How many items of a set were left out; a dash where none were to be."""
    return f"{counts['removed']:,}" if "removed" in counts else "–"


def set_name(name: str) -> str:
    """A set as the report calls it."""
    return SET_NAMES.get(name, f"problems of {name.removeprefix('tasks.')}")


def contamination_sentence(by_set: dict[str, Counts]) -> str:
    """Which sets occur in training text, with counts, or that none does."""
    copied = [(name, stage, counts) for name, sets in by_set.items() for stage, counts in by_stage(sets).items()]
    copied = [(name, stage, counts) for name, stage, counts in copied if counts["copies"] or counts["near_copies"]]
    if not copied:
        return f"In training text occurs nothing of these: {', '.join(map(set_name, by_set))}{_removed(by_set)}."
    clauses = [
        f"{set_name(name)} in {stage} {counts['copies']} whole and {counts['near_copies']} nearly, "
        f"{counts['clean']} not"
        for name, stage, counts in copied
    ]
    return f"Of the evaluation this occurs in training text: {'; '.join(clauses)}{_removed(by_set)}."


def _removed(by_set: dict[str, Counts]) -> str:
    removed = [f"{sets['removed']} of {set_name(name)}" for name, sets in by_set.items() if "removed" in sets]
    return f"; left out: {', '.join(removed)}" if removed else ""
