"""What the players of one model reply to held-out prompts, and what is measured of the model and of each of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from threefold.data.reading import Example
from threefold.evaluation import best_of, decoding_policies, held_out, task_answers
from threefold.evaluation.players import Player, most_samples
from threefold.evaluation.tasks import Task
from threefold.execution.job import Job
from threefold.models import chat, likelihood, loading
from threefold.rewards import RewardFunction
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
    texts = decoding_policies.texts_of(shared.tokenizer, sampled)
    scores = None
    if shared.proxy is not None:
        messages = [example.prompt for example in shared.examples]
        scores = decoding_policies.scores(shared.proxy, messages, shared.prompts, sampled, texts)
    by_player = {name: played(player, sampled, texts, scores) for name, player in players.items()}
    for task_name, task in shared.tasks.items():
        answered = task_answers.answered(task, policy, players, shared.proxy, shared.tokenizer, bar)
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
    return decoding_policies.samples(policy, shared.prompts, count, settings, shared.tokenizer, seed, bar)


def played(
    player: Player, sampled: list[list[Reply]], texts: list[list[str]], scores: list[list[float]] | None
) -> Played:
    """The choice of a player among the samples [N][n] of N prompts, and what is measured of every player."""
    of_prompt: list[list[float] | None] = [None] * len(texts) if scores is None else [*scores]
    picks = [decoding_policies.chosen(player, texts[i], of_prompt[i]) for i in range(len(texts))]
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
    pairs = [(prompt, chat.reply_ids(tokenizer, reply)) for prompt, reply in zip(shared.prompts, people, strict=True)]
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
    return [text for [text] in decoding_policies.texts_of(shared.tokenizer, likely)]
