"""Contamination in the report: how much of each evaluation set occurs in the text of each training stage."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.report.run import Run

LEAD = (
    "An item is a copy where all of its word 8-grams occur in a stage's training text, nearly one from half of them. "
    "Prompts are looked for with people's replies, held-out pairs with both replies."
)
KINDS = {"copies": "whole", "near_copies": "nearly", "clean": "not", "too_short": "too short to tell"}
NAMES = {
    "prompts": "held-out prompts",
    "validation_prompts": "validation prompts",
    "base_text": "held-out base text",
    "held_out_pairs": "held-out pairs",
}

Counts = dict[str, Any]  # of one evaluation set: by training stage, and how many were left out


def section(run: Run) -> Section | None:
    """The counts of every set; None where there is no evaluation."""
    by_set = counted(run)
    if by_set is None:
        return None
    data = [
        {"set": name, "stage": stage} | counts
        for name, sets in by_set.items()
        for stage, counts in by_stage(sets).items()
    ]
    shown = Table("contamination", "Test items that occur in training text", table(by_set), data)
    return Section("contamination", "Contamination", (LEAD,), parts=(shown,))


def counted(run: Run) -> dict[str, Counts] | None:
    """The counts by set; None without an evaluation, and of one that counted prompts alone (before its version 7)."""
    by_set = run.evaluation.get("contamination", {})
    return by_set if "prompts" in by_set else None


def table(by_set: dict[str, Counts]) -> list[tuple[str, ...]]:
    """Heading and a row for each set."""
    stages = by_stage(next(iter(by_set.values())))
    heading = ("set", *(f"in {stage}: {', '.join(KINDS.values())}" for stage in stages), "left out")
    return [
        heading,
        *((named(name), *map(_cell, by_stage(sets).values()), left_out(sets)) for name, sets in by_set.items()),
    ]


def by_stage(counts: Counts) -> dict[str, dict[str, int]]:
    """The counts of one set by training stage."""
    return {stage: stage_counts for stage, stage_counts in counts.items() if stage != "removed"}


def left_out(counts: Counts) -> str:
    """How many items of a set were left out; a dash where none were to be."""
    return f"{counts['removed']:,}" if "removed" in counts else "–"


def named(name: str) -> str:
    """A set as the report calls it."""
    return NAMES.get(name, f"problems of {name.removeprefix('tasks.')}")


def sentence(by_set: dict[str, Counts]) -> str:
    """Which sets occur in training text, with counts, or that none does."""
    copied = [(name, stage, counts) for name, sets in by_set.items() for stage, counts in by_stage(sets).items()]
    copied = [(name, stage, counts) for name, stage, counts in copied if counts["copies"] or counts["near_copies"]]
    if not copied:
        return f"In training text occurs nothing of these: {', '.join(map(named, by_set))}{_removed(by_set)}."
    clauses = [
        f"{named(name)} in {stage} {counts['copies']} whole and {counts['near_copies']} nearly, {counts['clean']} not"
        for name, stage, counts in copied
    ]
    return f"Of the evaluation this occurs in training text: {'; '.join(clauses)}{_removed(by_set)}."


def _removed(by_set: dict[str, Counts]) -> str:
    removed = [f"{sets['removed']} of {named(name)}" for name, sets in by_set.items() if "removed" in sets]
    return f"; left out: {', '.join(removed)}" if removed else ""


def _cell(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[kind]:,}" for kind in KINDS)
