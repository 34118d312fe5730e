"""The arena in the report: for each judge who is ahead of whom, and how often each model wins against each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from threefold.display import figures
from threefold.display.parts import Figure, Section, Table
from threefold.evaluation import statistics
from threefold.labelling import votes_arena
from threefold.report.run import Run

LEAD = (
    "Each two models' replies to a prompt meet once, and the judge's score decides; equal scores are a tie. Elo points "
    "by the Bradley-Terry model: 400 more win ten times as often. Intervals are over prompts and of "
    "the difference to the model with 1000 points; a model's rank counts those whose whole interval is above its own. "
    "“At equal lengths” is what a regression on the difference in length leaves of the win rate."
)


def section(run: Run) -> Section | None:
    """Standings, strengths and win rates by judge; None where the configuration asks for no evaluation."""
    if not run.asks_for("evaluate"):
        return None
    if not run.evaluation.get("arena"):
        return Section("arena", "Arena", (run.lacks("evaluate") or "This evaluation was made without an arena.",))
    parts = [part for judge, arena in run.evaluation["arena"].items() for part in of_judge(run, judge, arena)]
    return Section("arena", "Arena", (LEAD,), parts=tuple(parts))


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
        | {"wins_against_anchor": arena["win_rates"][row["model"]].get(anchor(arena))}
        | {"at_equal_lengths": arena["length_controlled"].get(row["model"])}
        for row in arena["standings"]
    ]
    rates = [{"model": name, **{f"against_{k}": v for k, v in row.items()}} for name, row in arena["win_rates"].items()]
    return [
        Table(f"arena_{judge}", f"Standings, {title}", standings(arena), data, note(run, judge), models=True, texts=0),
        figures.intervals(
            f"elo_{judge}", f"Elo, {title}", "Which model is better, and is that more than chance?", data, "elo",
            "Elo points with 95 % interval", reference=1000,
        ),
        Table(
            f"win_rates_{judge}", f"Win rates of each against each, {title}", win_rates(arena), rates, models=True,
            shares=True,
        ),
    ]  # fmt: skip


def note(run: Run, judge: str) -> str:
    """What is to be known of a judge whose verdicts are no scores."""
    return NOTES[judge](run.evaluation[judge]) if judge in NOTES and judge in run.evaluation else ""


def anchor(arena: dict[str, Any]) -> str:
    """The model that the others' Elo is measured against."""
    return arena.get("anchor", "sft")  # evaluations of an earlier version do not say


def standings(arena: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows of the table that arenas are known by."""
    at = anchor(arena)
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
