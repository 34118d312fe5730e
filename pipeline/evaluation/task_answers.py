"""The tasks of the evaluation put to each player: which problems, what it answers, and the share that is right."""

from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from threefold.data import reading
from threefold.errors import UserError
from threefold.evaluation import contamination, decoding_policies, statistics, tasks
from threefold.evaluation.players import Player, most_samples
from threefold.evaluation.tasks import Problem, Task
from threefold.execution.job import Job
from threefold.models import chat, loading
from threefold.rewards import RewardFunction

Answers = tuple[dict[str, Any], list[dict[str, Any]]]  # what is measured of a player, its replies with verdicts


def prepared(job: Job, tokenizer: Any, model: Any, sampling_settings: dict[str, Any]) -> dict[str, Task]:
    """The tasks of `evaluate.tasks` by name, each with at most as many problems as it asks for, drawn by the seed.

    Problems that leave no room for a reply in `model`'s context are left out.
    """
    config = job.config.evaluate
    return {
        name: _prepared(name, task, config.seed, tokenizer, model, sampling_settings)
        for name, task in config.tasks.items()
    }


def _prepared(name: str, config: Any, seed: int, tokenizer: Any, model: Any, sampling_settings: dict[str, Any]) -> Task:
    problems, unusable = tasks.load(f"evaluate.tasks.{name}", config)
    if config.max_new_tokens:
        limit = {"max_new_tokens": config.max_new_tokens}
        sampling_settings = {
            prefix: cast(Any, OmegaConf.merge(settings, limit)) for prefix, settings in sampling_settings.items()
        }
    room = loading.context_length(model.config) - sampling_settings[""].max_new_tokens
    fitting = [problem for problem in problems if len(chat.prompt_ids(tokenizer, problem.prompt)) <= room]
    if not fitting:
        raise UserError(f"evaluate.tasks.{name}.max_new_tokens: leaves no room for any problem; set it lower")
    drawn = reading.draw(fitting, config.problems or len(fitting), seed)
    left_out = {"dropped_too_long": len(problems) - len(fitting), "unusable": unusable}
    return Task(config.check, drawn, sampling_settings, seed, left_out)


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
    task: Task, policy: Any, players: dict[str, Player], proxy: RewardFunction | None, tokenizer: Any, bar: Any
) -> dict[str, Answers]:
    """What is measured of each player of one policy in one task, and its reply to each problem with the verdict.

    All players choose among the same samples, best-of-n by the reward model `proxy`. A policy by itself answers under
    all of the task's sampling settings, the other players only under those of the whole evaluation (prefix "").
    """
    by_player: dict[str, Answers] = {name: ({}, [{} for _ in task.problems]) for name in players}
    for prefix, settings in task.sampling_settings.items():
        answering = {name: player for name, player in players.items() if prefix == "" or player.decoding == "sample"}
        counting = bar if prefix == "" else None
        for name, texts in _replies(task, policy, answering, settings, proxy, tokenizer, counting).items():
            verdicts = tasks.verdicts(task.check, task.problems, texts)
            metrics, answers = by_player[name]
            metrics |= {f"{prefix}{key}": value for key, value in shares(verdicts).items()}
            for answer, text, verdict in zip(answers, texts, verdicts, strict=True):
                answer |= {f"{prefix}{key}": value for key, value in ({"reply": text} | verdict).items()}
    return by_player


def _replies(
    task: Task, policy: Any, players: dict[str, Player], settings: Any, proxy: RewardFunction | None,
    tokenizer: Any, bar: Any,
) -> dict[str, list[str]]:  # fmt: skip
    """Each player's reply to each problem, chosen among samples drawn under `settings`."""
    if not players:
        return {}
    messages = [problem.prompt for problem in task.problems]
    prompts = [chat.prompt_ids(tokenizer, message) for message in messages]
    sampled = decoding_policies.samples(policy, prompts, most_samples(players), settings, tokenizer, task.seed, bar)
    texts = decoding_policies.texts_of(tokenizer, sampled)
    scores: list[list[float] | None] = [None] * len(prompts)
    if proxy is not None and any(player.decoding == "best_of" for player in players.values()):
        scores = [*decoding_policies.scores(proxy, messages, prompts, sampled, texts)]
    return {
        name: [
            group[decoding_policies.chosen(player, group, of_group)]
            for group, of_group in zip(texts, scores, strict=True)
        ]
        for name, player in players.items()
    }


def described(task: Task) -> dict[str, Any]:
    """What the metrics say of a task itself."""
    return {"check": task.check, "problems": len(task.problems)} | task.left_out


def rows(tasks: dict[str, Task], answers: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """A row for each problem: its task, prompt and answer or instructions, and each player's replies with verdicts."""
    lines = []
    for name, task in tasks.items():
        for i, problem in enumerate(task.problems):
            right = {"instructions": problem.instructions} if problem.answer is None else {"answer": problem.answer}
            replies = {player: by_task[name][i] for player, by_task in answers.items()}
            lines.append({"task": name, "prompt": problem.prompt, **right, **replies})
    return lines


def shares(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of verdicts that are right, with Wilson 95 % intervals.

    `accuracy` is that of problems; with instructions a problem is right where all of its are followed, and
    `instructions_*` are shares of single instructions, whose intervals go by the spread between problems.
    """
    metrics = _share("accuracy", [verdict["right"] for verdict in verdicts])
    if "strict" not in verdicts[0]:
        return metrics
    metrics |= _share("accuracy_loose", [all(verdict["loose"]) for verdict in verdicts])
    groups = [str(i) for i, verdict in enumerate(verdicts) for _ in verdict["strict"]]
    for strictness in ("strict", "loose"):
        followed = [outcome for verdict in verdicts for outcome in verdict[strictness]]
        metrics |= _share(f"instructions_{strictness}", followed, groups)
    return metrics


def _share(name: str, outcomes: list[bool], groups: list[str] | None = None) -> dict[str, Any]:
    interval = statistics.share_interval([float(outcome) for outcome in outcomes], groups)
    return {name: float(np.mean(outcomes)), f"{name}_ci95": interval}
