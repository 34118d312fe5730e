"""The arena in the report: for each judge who is ahead of whom, and how often each model wins against each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import votes_arena


def sections(evaluate: dict[str, Any]) -> list[dict[str, Any]]:
    """A title, the standings and the win rates, each heading and rows, for every judge of the evaluation's metrics."""
    names = {
        "gold": f"gold judge: {evaluate['judge']}",
        "second": f"second judge: {evaluate['second_judge']}",
        "reward_model": "the reward model",
        "judge_model": f"judge model: {Path(evaluate.get('judge_model', {}).get('path', '')).name}",
        "people": "people's votes",
    }
    notes = {key: said(evaluate[key]) for key, said in NOTES.items() if key in evaluate}
    return [
        {
            "title": names[judge],
            "standings": standings(found),
            "win_rates": win_rates(found),
            "note": notes.get(judge, ""),
        }
        for judge, found in evaluate.get("arena", {}).items()
    ]


def position_bias(found: dict[str, Any]) -> str:
    """One line on how far the judge model's verdicts can be trusted."""
    if not found["pairs"]:
        return "All replies are the same: it was asked nothing."
    late = f" {found['too_long']:,} pairs were too long for it." * bool(found["too_long"])
    return (
        f"{found['pairs']:,} pairs of replies to {found['prompts']:,} prompts, each in both orders: the verdict "
        f"changes with the order on {found['flipped_share']:.0%}, and the reply shown first is preferred on "
        f"{found['first_share']:.0%}. "
        f"The two verdicts have {found['verdict_share']:.0%} of the probability of the next word.{late}"
    )


NOTES: dict[str, Callable[[dict[str, Any]], str]] = {"judge_model": position_bias, "people": votes_arena.in_words}


def standings(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows of the table that arenas are known by."""
    anchor = found.get("anchor", "sft")  # evaluations of an earlier version do not say
    heading = ("rank", "model", "Elo", "95 % interval", "votes", f"wins against {anchor}", "at equal lengths")
    rows = [
        (
            str(row["rank"]),
            row["model"],
            f"{row['elo']:.0f}",
            "–" if row["model"] == anchor else f"{row['ci95'][0]:.0f} to {row['ci95'][1]:.0f}",
            f"{row['votes']:,}",
            _share(found["win_rates"][row["model"]].get(anchor)),
            _share(found["length_controlled"].get(row["model"])),
        )
        for row in found["standings"]
    ]
    return [heading, *rows]


def win_rates(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows: how often the model of the row wins against that of the column, ties one half."""
    names = [row["model"] for row in found["standings"]]
    rows = [(name, *(_share(found["win_rates"][name].get(other)) for other in names)) for name in names]
    return [("wins of", *(f"against {name}" for name in names)), *rows]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
