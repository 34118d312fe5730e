"""The tasks of the evaluation put to each player: which problems, what it answers, and the share that is right."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from threefold.data import reading
from threefold.errors import UserError
from threefold.evaluation import contamination, decoding_policies, statistics, verifiable
from threefold.evaluation.players import Player, most_samples
from threefold.evaluation.verifiable import Problem
from threefold.execution.job import Job
from threefold.models import chat, loading
from threefold.rewards import RewardFunction

Answers = tuple[dict[str, Any], list[dict[str, Any]]]  # what is measured of a player, its replies with verdicts


@dataclass
class Suite:
    """The problems of one task that every player answers."""

    check: str
    problems: list[Problem]
    ways: dict[str, DictConfig]  # how replies are sampled, by the prefix of the metrics
    seed: int
    left_out: dict[str, Any]  # rows of the source that cannot be used, and problems too long for the model


def prepared(job: Job, tokenizer: Any, model: Any, ways: dict[str, DictConfig]) -> dict[str, Suite]:
    """The tasks of `evaluate.tasks` by name, each with at most as many problems as it asks for, drawn by the seed.

    Problems that leave no room for a reply in `model`'s context are left out.
    """
    tasks, seed = job.config.evaluate.tasks, job.config.evaluate.seed
    return {name: _prepared(name, task, seed, tokenizer, model, ways) for name, task in tasks.items()}


def _prepared(name: str, task: DictConfig, seed: int, tokenizer: Any, model: Any, ways: dict[str, DictConfig]) -> Suite:
    problems, unusable = verifiable.load(f"evaluate.tasks.{name}", task)
    if task.max_new_tokens:
        ways = {way: OmegaConf.merge(how, {"max_new_tokens": task.max_new_tokens}) for way, how in ways.items()}
    room = loading.context_length(model.config) - ways[""].max_new_tokens
    fitting = [problem for problem in problems if len(chat.prompt_ids(tokenizer, problem.prompt)) <= room]
    if not fitting:
        raise UserError(f"evaluate.tasks.{name}.max_new_tokens: leaves no room for any problem; set it lower")
    drawn = reading.draw(fitting, task.problems or len(fitting), seed)
    left_out = {"dropped_too_long": len(problems) - len(fitting), "unusable": unusable}
    return Suite(task.check, drawn, ways, seed, left_out)


def sought(problem: Problem) -> str:
    """What is looked for in training text: the question, so that a copy with another solution is found as well.

    A question too short for that stands with its answer.
    """
    turns = [m["content"] for m in problem.prompt if m["role"] != "system"]
    question = "\n".join(turns)
    if problem.answer is None or contamination.long_enough(question):
        return question
    return "\n".join([*turns, problem.answer])


def answered(
    suite: Suite, policy: Any, players: dict[str, Player], proxy: RewardFunction | None, tokenizer: Any, bar: Any
) -> dict[str, Answers]:
    """What is measured of each player of one policy in one task, and its reply to each problem with the verdict.

    All choose among the same samples, best-of-n by the reward model `proxy`. A policy by itself answers in every way
    of sampling, the others only as replies are sampled everywhere.
    """
    found: dict[str, Answers] = {name: ({}, [{} for _ in suite.problems]) for name in players}
    for way, how in suite.ways.items():
        answering = {name: player for name, player in players.items() if way == "" or player.decoding == "sample"}
        counting = bar if way == "" else None
        for name, texts in _replies(suite, policy, answering, how, proxy, tokenizer, counting).items():
            verdicts = verifiable.verdicts(suite.check, suite.problems, texts)
            metrics, answers = found[name]
            metrics |= {f"{way}{key}": value for key, value in shares(verdicts).items()}
            for answer, text, verdict in zip(answers, texts, verdicts, strict=True):
                answer |= {f"{way}{key}": value for key, value in ({"reply": text} | verdict).items()}
    return found


def _replies(
    suite: Suite, policy: Any, players: dict[str, Player], how: DictConfig, proxy: RewardFunction | None,
    tokenizer: Any, bar: Any,
) -> dict[str, list[str]]:  # fmt: skip
    """Each player's reply to each problem, chosen among samples drawn as `how` says."""
    if not players:
        return {}
    messages = [problem.prompt for problem in suite.problems]
    prompts = [chat.prompt_ids(tokenizer, message) for message in messages]
    count = most_samples(players)
    sampled = decoding_policies.samples(policy, prompts, count, how, tokenizer, suite.seed, bar)
    texts, scores = decoding_policies.texts_of(tokenizer, sampled), [None] * len(prompts)
    if any(player.decoding == "best_of" for player in players.values()):
        scores = decoding_policies.scores(proxy, messages, prompts, sampled, texts)
    return {
        name: [own[decoding_policies.chosen(player, own, score)] for own, score in zip(texts, scores, strict=True)]
        for name, player in players.items()
    }


def described(suite: Suite) -> dict[str, Any]:
    """What the metrics say of a task itself."""
    return {"check": suite.check, "problems": len(suite.problems)} | suite.left_out


def rows(suites: dict[str, Suite], answers: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each problem: its task, prompt and answer or instructions, and each player's replies with verdicts."""
    found = []
    for name, suite in suites.items():
        for i, problem in enumerate(suite.problems):
            known = {"instructions": problem.instructions} if problem.answer is None else {"answer": problem.answer}
            said = {model: by_task[name][i] for model, by_task in answers.items()}
            found.append({"task": name, "prompt": problem.prompt, **known, **said})
    return found


def shares(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of verdicts that are right, with Wilson 95 % intervals.

    `accuracy` is that of problems; with instructions a problem is right where all of its are followed, and
    `instructions_*` are shares of single instructions, whose intervals go by the spread between problems.
    """
    metrics = _share("accuracy", [verdict["right"] for verdict in found])
    if "strict" not in found[0]:
        return metrics
    metrics |= _share("accuracy_loose", [all(verdict["loose"]) for verdict in found])
    groups = [str(i) for i, verdict in enumerate(found) for _ in verdict["strict"]]
    for strictness in ("strict", "loose"):
        followed = [outcome for verdict in found for outcome in verdict[strictness]]
        metrics |= _share(f"instructions_{strictness}", followed, groups)
    return metrics


def _share(name: str, outcomes: list[bool], groups: list[str] | None = None) -> dict[str, Any]:
    interval = statistics.share_interval([float(outcome) for outcome in outcomes], groups)
    return {name: float(np.mean(outcomes)), f"{name}_ci95": interval}
