"""Tasks of the evaluation: problems whose answers a rule can check, and the verdict on each reply. Imports no torch."""

from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from omegaconf import DictConfig

from threefold.artifacts.digests import function_parts
from threefold.columns import Message
from threefold.data import instructions, reading
from threefold.errors import UserError
from threefold.rewards.exact import exact_match
from threefold.rewards.numeric import numeric_match

CHECKS: dict[str, FunctionType] = {
    "exact": exact_match,
    "numeric": numeric_match,
    "instructions": instructions.followed,
}


def parts(check: str) -> dict[str, str]:
    """What counts of a check: its source code, and the packages that it uses."""
    return function_parts(f"{CHECKS[check].__module__}:{CHECKS[check].__name__}")


@dataclass(frozen=True)
class Problem:
    """A prompt, and what a reply is checked with: the known answer, or instructions that it must follow."""

    prompt: list[Message]
    answer: str | None
    instructions: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Task:
    """The problems of one task that every player answers."""

    check: str
    problems: list[Problem]
    sampling_settings: dict[str, DictConfig]  # how replies are sampled, by the prefix of the metrics
    seed: int
    left_out: dict[str, Any]  # rows of the source that cannot be used, and problems too long for the model


def load(key: str, task: DictConfig) -> tuple[list[Problem], dict[str, Any]]:
    """The problems of a task, and the rows of its source that were left out, by reason.

    Raises `UserError` naming `key` for a source without problems, or with an answer that its own check finds wrong.
    """
    read = reading.load(task, task.split)
    problems = [_problem(row) for row in read.rows]
    if not problems:
        raise UserError(f"{key}.split={task.split}: {task.path} has no problem there; give more rows, or set split=all")
    if task.check != "instructions":
        require_checkable(f"{key}.check={task.check}", task.check, [p.answer for p in problems if p.answer is not None])
    return problems, read.unusable


READ = {"exact": "", "numeric": "it reads one whole number, alone in words or behind ####; "}  # of an answer


def require_checkable(key: str, check: str, answers: list[str]) -> None:
    """Raise `UserError` naming `key` where a known answer, given as the reply, is not found right by `check`."""
    scores = CHECKS[check]([""] * len(answers), answers, answer=answers)
    bad = [row for row, score in enumerate(scores) if score != 1.0]
    if bad:
        raise UserError(
            f"{key}: cannot check {len(bad):,} of the {len(answers):,} answers, the first {answers[bad[0]][:40]!r} "
            f"(row {bad[0] + 1:,}); {READ[check]}choose another check, or mend them"
        )


def check(key: str, task: DictConfig) -> None:
    """Read all of a task's source before any work; raises `UserError` as `load` does."""
    reading.read_all(task)
    load(key, task)


def _problem(row: dict[str, Any]) -> Problem:
    if "instructions" in row:
        return Problem(row["messages"], None, row["instructions"])
    return Problem(row["messages"][:-1], row["messages"][-1]["content"])


def verdicts(check: str, problems: list[Problem], replies: list[str]) -> list[dict[str, Any]]:
    """Of each reply whether it is right; by `instructions` also whether it follows each, `strict` and `loose`."""
    if check == "instructions":
        asked = [(problem.prompt[-1]["content"], problem.instructions) for problem in problems]
        followed = [CHECKS[check](*given, reply) for given, reply in zip(asked, replies, strict=True)]
        return [{"right": all(by_strictness["strict"]), **by_strictness} for by_strictness in followed]
    prompts, answers = ([getattr(problem, name) for problem in problems] for name in ("prompt", "answer"))
    return [{"right": score == 1.0} for score in CHECKS[check](prompts, replies, answer=answers)]
