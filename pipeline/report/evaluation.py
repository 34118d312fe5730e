"""Findings of the evaluation in the report: paired tests, changed prompts, tasks, contamination and the arena.

The arena in the report: for each judge who is ahead of whom, and how often each model wins against each other.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import statistics
from threefold.labelling import votes_arena
from threefold.report.run import Run, aligned, display_name, in_order, opening

SURE = 0.05  # p from which a test says nothing
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
    verdict = (not drift["alarm"], f"{statistics.alarm_in_words(drift)}.") if drift else None
    folded, fold = tuple(t for t in tables if t), "Paired tests, and the most changed prompts"
    return Section(
        "effects", "Who is better, and what changed", (differences(run.evaluation),) if tables[0] else (), verdict,
        fold=fold if folded else "", legend=PAIRED_LEAD, folded=folded,
    )  # fmt: skip


def differences(evaluate: dict[str, Any]) -> str:
    """Which of the paired tests are clear after the correction for all of them."""
    names, tests = {"gold": evaluate["judge"], "second": evaluate["second_judge"]}, evaluate["paired"]
    clear = [
        f"{display_name(test['model'])} {'above' if test['difference'] > 0 else 'below'} "
        f"{display_name(test['against'])} by {names[test['judge']]} ({test['difference']:+.3f})"
        for test in tests
        if test["p_holm"] < SURE
    ]
    sentence = f"These are clear: {'; '.join(clear)}" if clear else "None is clear"
    return f"{len(tests)} differences were tested on the same prompts, and p was corrected for all. {sentence}."


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
    changed_prompts = statistics.most_changed(samples, model)
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
    "An item is a copy where all of its runs of eight words occur in a stage's training text, and a near copy where at "
    "least half do. Prompts are looked for with people's replies, held-out pairs with both replies."
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
    """What occurs in training text, in words; folded, the counts of every set. None where there is no evaluation."""
    by_set = contamination_counts(run)
    if by_set is None:
        return None
    data = [
        {"set": name, "stage": stage} | counts
        for name, sets in by_set.items()
        for stage, counts in by_stage(sets).items()
    ]
    shown = Table("contamination", "Test items that occur in training text", contamination_rows(by_set), data)
    words, fold = contamination_sentence(by_set), "Counts by set and stage"
    return Section("contamination", "Contamination", (words,), fold=fold, legend=CONTAMINATION_LEAD, folded=(shown,))


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
        return f"None of these occurs in training text: {', '.join(map(set_name, by_set))}{_removed(by_set)}."
    clauses = [
        f"{counts['copies']} of {sum(counts[kind] for kind in KINDS):,} {set_name(name)} whole and "
        f"{counts['near_copies']} nearly in {stage}"
        for name, stage, counts in copied
    ]
    return f"Some test items occur in training text: {'; '.join(clauses)}{_removed(by_set)}."


def _removed(by_set: dict[str, Counts]) -> str:
    removed = [f"{sets['removed']} of {set_name(name)}" for name, sets in by_set.items() if "removed" in sets]
    return f"; left out: {', '.join(removed)}" if removed else ""


ARENA_LEAD = (
    "Each two models' replies to a prompt meet once, and the judge's score decides; equal scores are a tie. Elo points "
    "by the Bradley-Terry model: 400 more win ten times as often. Intervals are over prompts and of "
    "the difference to the model with 1000 points; a model's rank counts those whose whole interval is above its own. "
    "“At equal lengths” is what a regression on the difference in length leaves of the win rate."
)


def arena_section(run: Run) -> Section | None:
    """Standings, strengths and win rates by judge; None where the configuration asks for no evaluation."""
    if not run.asks_for("evaluate"):
        return None
    if not run.evaluation.get("arena"):
        return Section("arena", "Arena", (run.lacks("evaluate") or "This evaluation was made without an arena.",))
    arenas = run.evaluation["arena"]
    parts = [part for judge, arena in arenas.items() for part in of_judge(run, judge, arena)]
    points = tuple(ranking(judge_name(run, judge), arena) for judge, arena in arenas.items())
    fold = "Standings, Elo points and win rates by judge"
    return Section("arena", "Arena", points=points, fold=fold, legend=ARENA_LEAD, folded=tuple(parts))


def ranking(judge: str, arena: dict[str, Any]) -> str:
    """Which model comes first by one judge, and how far ahead of the anchor that is."""
    models = [row for row in arena["standings"] if row["model"] != "human"] or arena["standings"]
    first, anchor = models[0], arena_anchor(arena)
    if first["model"] == anchor:
        return f"{opening(judge)}. First of the models: {display_name(anchor)}."
    wins = _share(arena["win_rates"][first["model"]].get(anchor))
    return (
        f"{opening(judge)}. First of the models: {display_name(first['model'])}, {first['elo']:.0f} points "
        f"{statistics.shown(first['ci95'], '.0f')}, with {wins} of meetings with {display_name(anchor)} won."
    )


def judge_name(run: Run, judge: str) -> str:
    """A judge as it is named in headings."""
    names = {
        "gold": f"gold judge: {run.evaluation['judge']}",
        "second": f"second judge: {run.evaluation['second_judge']}",
        "reward_model": "the reward model",
        "judge_model": f"judge model: {Path(run.evaluation.get('judge_model', {}).get('path', '')).name}",
        "people": "people's votes",
    }
    return names[judge]


def position_bias(verdicts: dict[str, Any]) -> str:
    """One line on how far the judge model's verdicts can be trusted."""
    if not verdicts["pairs"]:
        return "All replies are the same: it was asked nothing."
    late = f" {verdicts['too_long']:,} pairs were too long for it." * bool(verdicts["too_long"])
    return (
        f"{verdicts['pairs']:,} pairs of replies to {verdicts['prompts']:,} prompts, each in both orders: the verdict "
        f"changes with the order on {verdicts['flipped_share']:.0%}, and the reply shown first is preferred on "
        f"{verdicts['first_share']:.0%}. "
        f"The two verdicts have {verdicts['verdict_share']:.0%} of the probability of the next word.{late}"
    )


NOTES: dict[str, Callable[[dict[str, Any]], str]] = {"judge_model": position_bias, "people": votes_arena.in_words}


def of_judge(run: Run, judge: str, arena: dict[str, Any]) -> list[Table | Figure]:
    """One judge's standings, the figure of its Elo points, and the win rates."""
    title = judge_name(run, judge)
    data = [
        {key: row[key] for key in ("rank", "model", "elo", "votes")}
        | dict(zip(("elo_low", "elo_high"), statistics.ends(row["ci95"]), strict=True))
        | {"wins_against_anchor": arena["win_rates"][row["model"]].get(arena_anchor(arena))}
        | {"at_equal_lengths": arena["length_controlled"].get(row["model"])}
        for row in arena["standings"]
    ]
    rates = [{"model": name, **{f"against_{k}": v for k, v in row.items()}} for name, row in arena["win_rates"].items()]
    return [
        Table(
            f"arena_{judge}", f"Standings, {title}", standings(arena), data, arena_note(run, judge), models=True,
            texts=0,
        ),
        figures.intervals(
            f"elo_{judge}", f"Elo, {title}", "Which model is better, and is that more than chance?", data, "elo",
            "Elo points with 95 % interval", reference=1000,
        ),
        Table(
            f"win_rates_{judge}", f"Win rates of each against each, {title}", win_rates(arena), rates, models=True,
            shares=True,
        ),
    ]  # fmt: skip


def arena_note(run: Run, judge: str) -> str:
    """What is to be known of a judge whose verdicts are no scores."""
    return NOTES[judge](run.evaluation[judge]) if judge in NOTES and judge in run.evaluation else ""


def arena_anchor(arena: dict[str, Any]) -> str:
    """The model that the others' Elo is measured against."""
    return arena.get("anchor", "sft")  # evaluations of an earlier version do not say


def standings(arena: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows of the table that arenas are known by."""
    at = arena_anchor(arena)
    heading = ("model", "rank", "Elo", "95 % interval", "votes", f"wins against {at}", "at equal lengths")
    rows = [
        (
            row["model"],
            str(row["rank"]),
            f"{row['elo']:.0f}",
            "–" if row["model"] == at else statistics.shown(row["ci95"], ".0f"),
            f"{row['votes']:,}",
            _share(arena["win_rates"][row["model"]].get(at)),
            _share(arena["length_controlled"].get(row["model"])),
        )
        for row in arena["standings"]
    ]
    return [heading, *rows]


def win_rates(arena: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows: how often the model of the row wins against that of the column, ties one half."""
    names = [row["model"] for row in arena["standings"]]
    rows = [(name, *(_share(arena["win_rates"][name].get(other)) for other in names)) for name in names]
    return [("wins of … against", *names), *rows]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
