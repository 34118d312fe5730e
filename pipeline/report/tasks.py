"""The tasks in the report: the share of each model's answers that a rule finds right."""

from typing import Any

from pipeline.report.names import in_order
from pipeline.report.parts import Section, Table
from pipeline.report.run import Run

LEAD = (
    "Share of answers that a rule finds right, with Wilson's 95 % interval; every reply with its verdict is in "
    "evaluate/tasks.jsonl of the run."
)

# what is shown of a task: metric → what stands behind the task's name in the heading
SHOWN = {
    "accuracy": "",
    "greedy_accuracy": ", greedy",
    "instructions_strict": ", single instructions",
    "greedy_instructions_strict": ", single instructions, greedy",
}


def section(run: Run) -> Section | None:
    """Answers and overlap with training text; None where the evaluation has no tasks."""
    shown = answers(run)
    if shown is None:
        return None
    rows = overlap(run.evaluation)
    heading, *counts = rows
    copies = [dict(zip(heading, row, strict=True)) for row in counts]
    found = Table("task_overlap", "Problems that occur in training text", rows, copies, folded=True)
    return Section("tasks", "Tasks with answers", (LEAD,), parts=(shown, found))


def answers(run: Run) -> Table | None:
    """The table of the tasks; None where there are none."""
    rows = table(run.evaluation, in_order(run.models)) if run.models else []
    if not rows:
        return None
    answered = {name: run.models[name]["tasks"] for name, *_ in rows[1:]}
    data = [
        {"model": name, "task": task} | {k: v for k, v in found.items() if not isinstance(v, list)}
        for name, tasks in answered.items()
        for task, found in tasks.items()
    ]
    return Table("tasks", "Right answers", rows, data, models=True)


def table(evaluate: dict[str, Any], models: list[str]) -> list[tuple[str, ...]]:
    """Heading and a row for each of `models` that answered; empty where the evaluation has no tasks."""
    answered = {name: evaluate["models"][name]["tasks"] for name in models if evaluate["models"][name].get("tasks")}
    if not answered:
        return []
    first = next(iter(answered.values()))
    columns = [(task, metric) for task, found in first.items() for metric in SHOWN if metric in found]
    problems = {task: f"{found['problems']:,}" for task, found in evaluate["tasks"].items()}
    heading = ("model", *(f"{task}{SHOWN[metric]} (n = {problems[task]})" for task, metric in columns))
    return [heading, *((name, *(_cell(found[t], m) for t, m in columns)) for name, found in answered.items())]


def overlap(evaluate: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and a row for each task: how many of its problems occur in the text of each training stage."""
    found = {name: task["contamination"] for name, task in evaluate.get("tasks", {}).items()}
    if not found:
        return []
    stages = [stage for stage in next(iter(found.values())) if stage != "removed"]
    heading = ("task", *(f"in {stage}: whole, nearly, not, too short to tell" for stage in stages), "left out")
    kinds = ("copies", "near_copies", "clean", "too_short")
    rows = [
        (name, *(", ".join(f"{counts[stage][kind]:,}" for kind in kinds) for stage in stages), _removed(counts))
        for name, counts in found.items()
    ]
    return [heading, *rows]


def _removed(counts: dict[str, Any]) -> str:
    return f"{counts['removed']:,}" if "removed" in counts else "–"


def _cell(metrics: dict[str, Any], key: str) -> str:
    low, high = metrics[f"{key}_ci95"]
    return f"{metrics[key]:.1%} [{low:.1%}, {high:.1%}]"
