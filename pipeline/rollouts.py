"""Rollouts: sampled replies with everything that PPO's update needs. B: replies, P: prompt, R: reply tokens."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pipeline import chat, likelihood, sampling
from pipeline.errors import UserError
from pipeline.sampling import Reply


@dataclass(frozen=True)
class Prompt:
    """A prompt to reply to."""

    ids: list[int]  # tokens up to the mark that opens the reply
    text: str  # its last message, as reward functions get it
    answer: str  # a known reply to it: the column `answer` of reward functions


Reward = Callable[[list[Prompt], list[Reply]], list[float]]


@dataclass
class Rollout:
    """Replies of the policy to one batch of prompts; prompts are padded on the left, replies on the right."""

    prompt: Tensor  # token ids [B, P]
    prompt_mask: Tensor  # [B, P]
    reply: Tensor  # token ids [B, R], the end token included
    mask: Tensor  # [B, R], 1 on the reply's tokens
    logprobs: Tensor  # [B, R] under the policy that sampled
    reference_logprobs: Tensor  # [B, R] under the reference
    values: Tensor  # [B, R] of the text before each token; 0 without a critic
    scores: Tensor  # [B] normalised, with the penalty for a missing end
    ended: Tensor  # [B] 1 where the reply ended by itself

    def __len__(self) -> int:
        return len(self.scores)

    def tokens(self) -> Tensor:
        """Tokens of prompt and reply together [B]."""
        return self.prompt_mask.sum(1) + self.mask.sum(1)

    def take(self, rows: Tensor) -> "Rollout":
        """The replies `rows`, with padding that none of them needs cut off."""
        part = Rollout(*(getattr(self, field.name)[rows] for field in fields(self)))
        unused = part.prompt.size(1) - int(part.prompt_mask.sum(1).max())
        longest = int(part.mask.sum(1).max())
        part.prompt, part.prompt_mask = part.prompt[:, unused:], part.prompt_mask[:, unused:]
        for name in ("reply", "mask", "logprobs", "reference_logprobs", "values"):
            setattr(part, name, getattr(part, name)[:, :longest])
        return part


@torch.no_grad()
def collect(
    policy: nn.Module, reference: nn.Module, critic: nn.Module | None, reward: Reward, prompts: list[Prompt],
    sampling_config: DictConfig, tokenizer: Any, generator: torch.Generator, missing_end_penalty: float | None,
    micro: int,
) -> Rollout:  # fmt: skip
    """Sample one reply per prompt and score it; `micro` rows per forward pass of the scoring models."""
    ids = [p.ids for p in prompts]
    replies = sampling.sample(policy, ids, sampling_config, tokenizer, generator)
    device, pad = policy.device, tokenizer.pad_token_id
    prompt, prompt_mask = likelihood.left_padded(ids, pad, device)
    reply, mask = likelihood.right_padded([r.ids for r in replies], pad, device)
    logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.logprobs) for r in replies], batch_first=True).to(device)
    ended = torch.tensor([float(r.ended) for r in replies], device=device)
    scores = torch.tensor(reward(prompts, replies), device=device)
    if missing_end_penalty is not None:
        scores = torch.where(ended.bool(), scores, torch.full_like(scores, missing_end_penalty))
    empty = torch.zeros_like(logprobs)
    rollout = Rollout(prompt, prompt_mask, reply, mask, logprobs, empty, empty.clone(), scores, ended)
    for rows in by_length(rollout, micro):
        part = rollout.take(rows)
        width = part.reply.size(1)
        rollout.reference_logprobs[rows, :width] = (
            reply_logprobs(reference, part, sampling_config.temperature)[0] * part.mask
        )
        if critic is not None:
            rollout.values[rows, :width] = reply_values(critic, part) * part.mask
    return rollout


def model_reward(reward_model: nn.Module, tokenizer: Any, micro: int) -> Reward:
    """The normalised score of a reward model, which reads the text up to its end token."""

    def reward(prompts: list[Prompt], replies: list[Reply]) -> list[float]:
        full = [p.ids + r.ids for p, r in zip(prompts, replies, strict=True)]
        raw = likelihood.scores(reward_model, full, tokenizer.pad_token_id, micro)
        return normalised(reward_model, torch.tensor(raw)).tolist()

    return reward


def rule_reward(function: Callable[..., list[float | None]], name: str, tokenizer: Any) -> Reward:
    """What a reward function by rule says of the reply's text, as it is. Raises `UserError` where it does not apply."""

    def reward(prompts: list[Prompt], replies: list[Reply]) -> list[float]:
        columns = {"prompts": [p.text for p in prompts], "answer": [p.answer for p in prompts]}
        scores = function(completions=[chat.reply_text(tokenizer, r.ids) for r in replies], **columns)
        if None in scores:
            raise UserError(f"{name}: gives no score (None) to a reply; PPO needs a reward that applies to all")
        return [float(score) for score in scores]

    return reward


def by_length(rollout: Rollout, size: int) -> list[Tensor]:
    """Row numbers in groups of at most `size` of similar length, so that groups hold little padding."""
    return list(rollout.tokens().argsort(stable=True).split(size))


def reply_logprobs(model: nn.Module, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, R] of the reply's tokens at the sampling temperature, and entropies [B, R]."""
    logits = likelihood.reply_logits(model, rollout.prompt, rollout.prompt_mask, rollout.reply, rollout.mask)
    logprobs = (logits / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, rollout.reply[..., None])[..., 0], entropy


def reply_values(critic: nn.Module, rollout: Rollout) -> Tensor:
    """The critic's value [B, R] of the text before each reply token, on the scale of the normalised score."""
    states = likelihood.reply_states(critic, rollout.prompt, rollout.prompt_mask, rollout.reply, rollout.mask)
    return normalised(critic, critic.score(states)[..., 0].float())


def normalised(reward_model: nn.Module, raw: Tensor) -> Tensor:
    """Raw scores on the scale where the reference policy's samples have mean 0 and standard deviation 1."""
    return (raw - reward_model.config.score_mean) / reward_model.config.score_std
