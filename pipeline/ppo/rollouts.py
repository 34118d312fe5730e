"""Rollouts: sampled replies with everything that PPO's update needs. B: replies, P: prompt, R: reply tokens.

N is the number of reply tokens of a part of a rollout, without padding: what is computed per token is [N].

What trackers see of a PPO rollout beside its metrics: sample replies and histograms. B: replies, R: their tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.data import reading
from threefold.data.formats import Message
from threefold.execution.job import Job
from threefold.models import chat, ensemble, likelihood, loading, template
from threefold.ppo.actors import Actors
from threefold.rewards import RewardFunction
from threefold.rewards.scores import require_all
from threefold.sampling import sampler
from threefold.sampling.sampler import Reply
from threefold.tracking.trackers import Histogram, Table


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to."""

    ids: list[int]  # tokens up to the mark that opens the reply
    messages: list[Message]  # the conversation up to there, as reward functions get it
    answer: str  # a known reply to it: the column `answer` of reward functions


def prompt_pool(job: Job, tokenizer: Any, policy: Any) -> list[Prompt]:
    """The training split's prompts that leave room for a reply, in an order that the seed decides.

    Those that the chat template refuses are left out.
    """
    wanted, _ = _drawn(job, tokenizer)
    ids = [chat.prompt_ids(tokenizer, example.prompt) for example in wanted]
    fitting = sampler.with_room(ids, policy, job.config.sampling)
    return [Prompt(ids[i], wanted[i].prompt, wanted[i].reply) for i in fitting]


def _drawn(job: Job, tokenizer: Any) -> tuple[list[reading.Example], dict[str, int]]:
    """The prompts that the seed draws and the chat template renders, and how many it refuses, by reason."""
    source = job.config.data.replies
    examples = reading.prompts(source, "train", job.config.data.dialogue)
    return chat.accepted(tokenizer, reading.draw(examples, job.config.ppo.episodes, job.config.ppo.seed), source)


def left_out(job: Job, tokenizer: Any, pool: list[Prompt]) -> dict[str, dict[str, Any]]:
    """What of the training split is not in the pool of prompts, by reason; prompts are asked once, for any reply."""
    source, dialogue = job.config.data.replies, job.config.data.dialogue
    wanted, refused = _drawn(job, tokenizer)
    unused = reading.left_out(source, "train", dialogue, once=True) | template.counted(refused)
    if len(wanted) > len(pool):
        unused["prompt leaves no room for a reply"] = {"count": len(wanted) - len(pool)}
    return unused


def batch_of(prompts: list[Prompt], number: int, size: int, samples: int = 1) -> list[Prompt]:
    """The prompts of the `size` replies of rollout `number`, each `samples` times in a row, from the pool in its order.

    The pool starts over at its end.
    """
    distinct = size // samples
    return [prompts[(number * distinct + i) % len(prompts)] for i in range(distinct) for _ in range(samples)]


PER_TOKEN = ("reply", "mask", "logprobs", "reference_logprobs", "values", "sampled_logprobs")


@dataclass
class Rollout:
    """Replies of the policy to one batch of prompts; prompts are padded on the left, replies on the right."""

    prompt: Tensor  # token ids [B, P]
    prompt_mask: Tensor  # [B, P]
    reply: Tensor  # token ids [B, R], the end token included
    mask: Tensor  # [B, R], 1 on the reply's tokens
    logprobs: Tensor  # [B, R] under the policy, before the update
    reference_logprobs: Tensor  # [B, R] under the reference
    values: Tensor  # [B, R] of the text before each token; 0 without a critic
    scores: Tensor  # [B] normalised, at most the penalty where the end is missing
    ended: Tensor  # [B] 1 where the reply ended by itself
    sampled_logprobs: Tensor  # [B, R] as the sampler recorded them

    def __len__(self) -> int:
        return len(self.scores)

    def tokens(self) -> Tensor:
        """Tokens of prompt and reply together [B]."""
        return self.prompt_mask.sum(1) + self.mask.sum(1)

    def to(self, device: str | torch.device) -> "Rollout":
        """The same on another device."""
        return Rollout(*(getattr(self, field.name).to(device) for field in fields(self)))

    def take(self, rows: Tensor) -> "Rollout":
        """The replies `rows`, with padding that none of them needs cut off."""
        part = Rollout(*(getattr(self, field.name)[rows] for field in fields(self)))
        unused = part.prompt.size(1) - int(part.prompt_mask.sum(1).max())
        longest = int(part.mask.sum(1).max())
        part.prompt, part.prompt_mask = part.prompt[:, unused:], part.prompt_mask[:, unused:]
        for name in PER_TOKEN:
            setattr(part, name, getattr(part, name)[:, :longest])
        return part

    def by_length(self, rows: Tensor, size: int) -> list[Tensor]:
        """`rows` in groups of at most `size` of similar length, so that groups hold little padding."""
        return [rows[group] for group in self.tokens()[rows].argsort(stable=True).split(size)] if len(rows) else []


def joined(parts: list[Rollout], pad: int) -> Rollout:
    """One rollout of several, padded to the longest prompt and reply; `pad` is the pad token."""
    width = max(part.prompt.size(1) for part in parts)
    longest = max(part.reply.size(1) for part in parts)
    columns = {}
    for name in (field.name for field in fields(Rollout)):
        tensors, value = [getattr(part, name) for part in parts], pad if name in ("prompt", "reply") else 0
        if name in PER_TOKEN:
            tensors = [F.pad(t, (0, longest - t.size(1)), value=value) for t in tensors]
        elif name in ("prompt", "prompt_mask"):
            tensors = [F.pad(t, (width - t.size(1), 0), value=value) for t in tensors]
        columns[name] = torch.cat(tensors)
    return Rollout(**columns)


@torch.no_grad()
def collect(
    actors: Actors, prompts: list[Prompt], replies: list[Reply], scored: list[float], temperature: float, pad: int,
    missing_end_penalty: float | None, micro_batch_size: int, recompute_logprobs: bool = False,
) -> Rollout:  # fmt: skip
    """The policy's replies, one to each prompt, with their scores; `micro_batch_size` rows per forward pass.

    With `recompute_logprobs` a forward pass of the policy gives log-probabilities and values anew: it rounds otherwise
    than the sampler.
    """
    device = actors.policy.device
    prompt, prompt_mask = likelihood.left_padded([p.ids for p in prompts], pad, device)
    reply, mask = likelihood.right_padded([r.ids for r in replies], pad, device)
    logprobs, values = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        for rows in ([r.logprobs for r in replies], [r.values for r in replies])
    )
    ended = torch.tensor([float(r.ended) for r in replies], device=device)
    scores = torch.tensor(scored, device=device)
    if missing_end_penalty is not None:
        scores = torch.where(ended.bool(), scores, scores.clamp(max=missing_end_penalty))  # no way to gain by it
    rollout = Rollout(
        prompt, prompt_mask, reply, mask, logprobs.clone(), torch.zeros_like(logprobs), values, scores, ended, logprobs
    )
    for rows in rollout.by_length(torch.arange(len(rollout), device=device), micro_batch_size):
        part = rollout.take(rows)
        if recompute_logprobs:
            states = token_states(actors.policy, part)
            _put(rollout.logprobs, rows, part.mask, reply_logprobs(actors.policy, part, states, temperature))
            if actors.shared:
                _put(rollout.values, rows, part.mask, reply_values(actors.critic, states))
        reference = reply_logprobs(actors.reference, part, token_states(actors.reference, part), temperature)
        _put(rollout.reference_logprobs, rows, part.mask, reference)
        if actors.critic is not None and not actors.shared:
            _put(rollout.values, rows, part.mask, reply_values(actors.critic, token_states(actors.critic, part)))
    return rollout


def _put(target: Tensor, rows: Tensor, mask: Tensor, per_token: Tensor) -> None:
    """Write `per_token` [N] into the `rows` of `target` [B, R], at the tokens of `mask`."""
    block = torch.zeros(mask.shape, device=target.device)
    block[mask.bool()] = per_token
    target[rows, : mask.size(1)] = block


def scores(
    reward: RewardFunction, name: str, tokenizer: Any, prompts: list[Prompt], replies: list[Reply]
) -> list[float]:
    """What the reward says of each reply. Raises `UserError` with the reward's `name` where it does not apply."""
    texts = [chat.reply_text(tokenizer, r.ids) for r in replies]
    rewarded = reward(
        prompts=[p.messages for p in prompts],
        completions=texts,
        answer=[p.answer for p in prompts],
        prompt_ids=[p.ids for p in prompts],
        completion_ids=[r.ids for r in replies],
    )
    return require_all(name, rewarded, texts)


def token_states(model: Any, part: Rollout) -> Tensor:
    """The model's hidden states [N, D] of the text before each reply token, row after row."""
    states = likelihood.reply_states(model, part.prompt, part.prompt_mask, part.reply, part.mask)
    return states[part.mask.bool()]


def reply_logprobs(model: Any, part: Rollout, states: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [N] of the reply tokens at the sampling temperature, from `token_states` of a policy."""
    logits = loading.output_logits(model, states).float()
    return likelihood.log_probabilities(logits, part.reply[part.mask.bool()], temperature)


def reply_values(critic: Any, states: Tensor) -> Tensor:
    """The critic's values [N] of the text before each token, on the scale of the normalised score."""
    return ensemble.normalised(critic, critic.score(states)[..., 0].float())


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
