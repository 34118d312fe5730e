"""The tasks in the report: the share of each model's answers that a rule finds right."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.evaluation import statistics
from threefold.report.names import in_order
from threefold.report.run import Run

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
    """What each model answers; None where the evaluation has no tasks."""
    shown = answers(run)
    return Section("tasks", "Tasks with answers", (LEAD,), parts=(shown,)) if shown else None


def answers(run: Run) -> Table | None:
    """The table of the tasks; None where there are none."""
    rows = table(run.evaluation, in_order(run.models)) if run.models else []
    if not rows:
        return None
    answered = {name: run.models[name]["tasks"] for name, *_ in rows[1:]}
    data = [
        {"model": name, "task": task} | {k: v for k, v in scores.items() if not isinstance(v, list)}
        for name, tasks in answered.items()
        for task, scores in tasks.items()
    ]
    return Table("tasks", "Right answers", rows, data, models=True)


def table(evaluate: dict[str, Any], models: list[str]) -> list[tuple[str, ...]]:
    """Heading and a row for each of `models` that answered; empty where the evaluation has no tasks."""
    answered = {name: evaluate["models"][name]["tasks"] for name in models if evaluate["models"][name].get("tasks")}
    if not answered:
        return []
    columns = [
        (task, metric)
        for task in next(iter(answered.values()))
        for metric in SHOWN
        if any(metric in scores[task] for scores in answered.values())
    ]
    problems = {task: f"{scores['problems']:,}" for task, scores in evaluate["tasks"].items()}
    heading = ("model", *(f"{task}{SHOWN[metric]} (n = {problems[task]})" for task, metric in columns))
    return [heading, *((name, *(_cell(scores[t], m) for t, m in columns)) for name, scores in answered.items())]


def _cell(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:  # a way to decode several samples has no greedy replies
        return "–"
    return f"{metrics[key]:.1%} {statistics.shown(metrics[f'{key}_ci95'], '.1%')}"
