"""What the players of one model reply to held-out prompts and tasks, and what is measured of each.

Ways to decode: several samples of a policy, and which of them is the reply.

N: prompts, n: samples of each.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from torch import nn

from threefold.columns import Message
from threefold.data import reading
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import best_of, contamination, held_out, statistics, tasks
from threefold.evaluation.players import Player, most_samples
from threefold.evaluation.tasks import Problem, Task
from threefold.execution.job import Job
from threefold.models import chat, likelihood, loading
from threefold.rewards import RewardFunction
from threefold.rewards.numeric import number_of
from threefold.sampling import sampler
from threefold.sampling.sampler import Reply
from threefold.schema.stages import SamplingConfig

GREEDY = {"temperature": 1e-4}  # at which the most likely token is all but certain


@dataclass
class Shared:
    """What all models are measured with.

    `prompts` are the token ids of `examples`, `texts` held-out base text, `reference` the SFT model, `proxy` PPO's
    reward model.
    """

    job: Job
    tokenizer: Any
    reference: Any
    proxy: RewardFunction | None
    examples: list[Example]
    prompts: list[list[int]]
    texts: list[str]
    tasks: dict[str, Task]


@dataclass
class Played:
    """A player's reply to each prompt with the reward model's scores where there is one, and what is measured of it.

    `greedy` are the most likely replies of a model by itself, where these are asked for, and `answers` its replies to
    each task's problems, with verdicts.
    """

    replies: list[str]
    proxies: list[float] | None
    metrics: dict[str, Any]
    greedy: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def of_model(shared: Shared, folder: Path, players: dict[str, Player], bar: Any) -> dict[str, Played]:
    """What each player of one model plays; the model is loaded once, and its samples are drawn once."""
    job = shared.job
    policy = shared.reference if folder == job.inputs["sft"] else loading.load_policy(folder, job.device.type)
    sampled = drawn(shared, policy, most_samples(players), job.config.sampling, bar)
    texts = texts_of(shared.tokenizer, sampled)
    scores = None
    if shared.proxy is not None:
        messages = [example.prompt for example in shared.examples]
        scores = proxy_scores(shared.proxy, messages, shared.prompts, sampled, texts)
    by_player = {name: played(player, sampled, texts, scores) for name, player in players.items()}
    for task_name, task in shared.tasks.items():
        answered = answers_to_task(task, policy, players, shared.proxy, shared.tokenizer, bar)
        for name, (metrics, answers) in answered.items():
            by_player[name].metrics.setdefault("tasks", {})[task_name] = metrics
            by_player[name].answers[task_name] = answers
    for name, player in players.items():
        if player.decoding == "sample":
            by_player[name].metrics |= measured(shared, policy, [group[0].ids for group in sampled])
            if job.config.evaluate.greedy:
                by_player[name].greedy = greedy(shared, policy)
    return by_player


def drawn(shared: Shared, policy: Any, count: int, settings: SamplingConfig, bar: Any = None) -> list[list[Reply]]:
    """`count` samples [N][n] of each of N prompts, drawn with the numbers of this evaluation."""
    seed = shared.job.config.evaluate.seed
    return samples(policy, shared.prompts, count, settings, shared.tokenizer, seed, bar)


def played(
    player: Player, sampled: list[list[Reply]], texts: list[list[str]], scores: list[list[float]] | None
) -> Played:
    """The choice of a player among the samples [N][n] of N prompts, and what is measured of every player."""
    of_prompt: list[list[float] | None] = [None] * len(texts) if scores is None else [*scores]
    picks = [chosen_sample(player, texts[i], of_prompt[i]) for i in range(len(texts))]
    metrics = {"ended_share": float(np.mean([sampled[i][pick].ended for i, pick in enumerate(picks)]))}
    if player.decoding == "best_of" and player.model == "sft":
        metrics["kl"] = best_of.kl_bound(player.count)
    proxies = None
    if scores is not None:
        proxies = [scores[i][pick] for i, pick in enumerate(picks)]
        metrics["proxy_mean"] = float(np.mean(proxies))
    return Played([texts[i][pick] for i, pick in enumerate(picks)], proxies, metrics)


def measured(shared: Shared, policy: Any, replies: list[list[int]]) -> dict[str, float]:
    """What is measured of a model itself, in part from its sampled replies (token ids)."""
    config, tokenizer, reference = shared.job.config, shared.tokenizer, shared.reference
    temperature, longest = config.sampling.temperature, loading.context_length(policy.config)
    bar = shared.job.progress(2 * len(replies), "replies", part="measures")
    pad, people = tokenizer.pad_token_id, [example.reply for example in shared.examples]
    pairs = held_out.reply_pairs(tokenizer, shared.examples)
    metrics = {
        "kl": likelihood.kl(policy, reference, shared.prompts, replies, temperature, pad, bar=bar),
        "reply_bits_per_byte": held_out.reply_bits_per_byte(policy, pairs, people, pad, longest, bar),
    }
    bar.close()
    if shared.texts:  # as pretraining measures it: what alignment took from the language model
        bits = held_out.text_bits_per_byte(policy, tokenizer, shared.texts, config.pretrain.context)
        metrics["text_bits_per_byte"] = bits
    return metrics


def sampling_settings(config: Any) -> dict[str, SamplingConfig]:
    """How replies are sampled, by the prefix of their metrics: as in all stages, and greedily where asked for."""
    settings = {"": config.sampling}
    if config.evaluate.greedy:
        settings["greedy_"] = cast(SamplingConfig, OmegaConf.merge(config.sampling, GREEDY))
    return settings


def greedy(shared: Shared, policy: Any) -> list[str]:
    """The policy's most likely reply to each prompt."""
    bar = shared.job.progress(len(shared.prompts), "replies", part="greedy")
    likely = drawn(shared, policy, 1, sampling_settings(shared.job.config)["greedy_"], bar)
    bar.close()
    return [text for [text] in texts_of(shared.tokenizer, likely)]


def samples(
    policy: nn.Module, prompts: list[list[int]], count: int, settings: SamplingConfig, tokenizer: Any, seed: int,
    bar: Any = None,
) -> list[list[Reply]]:  # fmt: skip
    """`count` samples [N][n] of each prompt (token ids), under the sampling `settings`.

    The first n of them are drawn with the same numbers whatever `count` is: best-of-4 chooses among the first four
    samples of best-of-16, and a policy by itself gives the first.
    """
    numbers = sampler.random_numbers(seed, count * len(prompts), settings)
    replies = sampler.sample(policy, prompts * count, settings, tokenizer, numbers, bar)
    return [replies[i :: len(prompts)] for i in range(len(prompts))]


def texts_of(tokenizer: Any, sampled: list[list[Reply]]) -> list[list[str]]:
    """The text [N][n] of each sample."""
    return [[chat.reply_text(tokenizer, reply.ids) for reply in group] for group in sampled]


def proxy_scores(
    reward_model: RewardFunction, messages: list[list[Message]], prompts: list[list[int]], sampled: list[list[Reply]],
    texts: list[list[str]],
) -> list[list[float]]:  # fmt: skip
    """The reward model's score [N][n] of each sample; `prompts` are the token ids of `messages`."""
    count = len(sampled[0])
    asked = [i for i in range(len(sampled)) for _ in range(count)]
    flat = reward_model(
        [messages[i] for i in asked],
        [text for group in texts for text in group],
        prompt_ids=[prompts[i] for i in asked],
        completion_ids=[reply.ids for group in sampled for reply in group],
    )
    flat = cast(list[float], flat)  # a reward model, unlike a rule, leaves no reply without a score
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def chosen_sample(player: Player, texts: list[str], scores: list[float] | None) -> int:
    """Which sample of one prompt is the player's reply; equal scores or votes go to the one sampled first."""
    if player.decoding == "best_of":
        assert scores is not None
        return int(np.argmax(scores[: player.count]))
    if player.decoding == "majority":
        return majority([final_answer(text) for text in texts[: player.count]])
    return 0


def majority(answers: list[Hashable]) -> int:
    """The first place of the answer given most often, of several the one given first (Wang et al. 2022, 2203.11171)."""
    [(most_frequent, _)] = Counter(answers).most_common(1)  # counts in order of first occurrence
    return answers.index(most_frequent)


def final_answer(text: str) -> Hashable:
    """What a reply answers with: its number as `numeric_match` finds it, or where it has none its words."""
    number = number_of(text)
    return " ".join(text.split()) if number is None else number


Answers = tuple[dict[str, Any], list[dict[str, Any]]]  # what is measured of a player, its replies with verdicts


def prepared_tasks(job: Job, tokenizer: Any, model: Any, sampling_settings: dict[str, Any]) -> dict[str, Task]:
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


def answers_to_task(
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
    sampled = samples(policy, prompts, most_samples(players), settings, tokenizer, task.seed, bar)
    texts = texts_of(tokenizer, sampled)
    scores: list[list[float] | None] = [None] * len(prompts)
    if proxy is not None and any(player.decoding == "best_of" for player in players.values()):
        scores = [*proxy_scores(proxy, messages, prompts, sampled, texts)]
    return {
        name: [group[chosen_sample(player, group, of_group)] for group, of_group in zip(texts, scores, strict=True)]
        for name, player in players.items()
    }


def described(task: Task) -> dict[str, Any]:
    """What the metrics say of a task itself."""
    return {"check": task.check, "problems": len(task.problems)} | task.left_out


def task_rows(tasks: dict[str, Task], answers: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
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
