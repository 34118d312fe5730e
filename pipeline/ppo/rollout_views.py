"""What trackers see of a PPO rollout beside its metrics: sample replies and histograms. B: replies, R: their tokens."""

from typing import Any

import torch
from torch import Tensor

from threefold.execution.job import Job
from threefold.models import chat
from threefold.ppo.rollouts import Prompt, Rollout
from threefold.tracking.values import Histogram, Table

COLUMNS = ("rollout", "prompt", "reply", "score", "kl", "tokens")


def views(
    job: Job, tokenizer: Any, number: int, prompts: list[Prompt], rollout: Rollout,
    advantages: Tensor, ratios: list[Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Views of rollout `number`, counted from 1, by name.

    `advantages` are [B, R]; `ratios` those of all optimiser steps, per token, of this process's share of the replies.
    """
    shown: dict[str, Any] = {
        "scores": histogram(rollout.scores),
        "advantages": histogram(advantages[rollout.mask.bool()]),
        "ratios": histogram(torch.cat(ratios)),
    }
    if job.config.tracker.samples:
        shown["samples"] = samples(job, tokenizer, number, prompts, rollout)
    return shown


def histogram(values: Tensor) -> Histogram:
    """The histogram of a tensor."""
    return Histogram.of(values.detach().float().cpu().numpy())


def samples(job: Job, tokenizer: Any, number: int, prompts: list[Prompt], rollout: Rollout) -> Table:
    """The first replies of the rollout, one to a prompt, with score, KL to the reference in nats, and tokens."""
    rows = range(0, len(prompts), job.config.ppo.samples_per_prompt)[: job.config.tracker.samples]
    first = rollout.take(torch.tensor(list(rows), device=rollout.scores.device)).to("cpu")
    kl = ((first.logprobs - first.reference_logprobs) * first.mask).sum(1)
    lengths = first.mask.sum(1).int()
    replies = []
    for row, reply, score, nats, length in zip(
        rows, first.reply.tolist(), first.scores.tolist(), kl.tolist(), lengths.tolist(), strict=True
    ):
        texts = prompts[row].messages[-1]["content"], chat.reply_text(tokenizer, reply[:length])
        replies.append((number, *texts, round(score, 4), round(nats, 4), length))
    return Table(COLUMNS, replies)
