"""Rollouts: sampled replies with everything that PPO's update needs. B: replies, P: prompt, R: reply tokens."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from pipeline import likelihood, sampling


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
    policy: nn.Module, reference: nn.Module, critic: nn.Module | None, reward_model: nn.Module,
    prompts: list[list[int]], sampling_config: DictConfig, tokenizer: Any, generator: torch.Generator,
    missing_end_penalty: float | None, micro: int,
) -> Rollout:  # fmt: skip
    """Sample one reply per prompt and score it; `micro` rows per forward pass of the scoring models."""
    replies = sampling.sample(policy, prompts, sampling_config, tokenizer, generator)
    device, pad = policy.device, tokenizer.pad_token_id
    prompt, prompt_mask = likelihood.left_padded(prompts, pad, device)
    reply, mask = likelihood.right_padded([r.ids for r in replies], pad, device)
    logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.logprobs) for r in replies], batch_first=True).to(device)
    ended = torch.tensor([float(r.ended) for r in replies], device=device)
    full = [p + r.ids for p, r in zip(prompts, replies, strict=True)]
    scores = normalised(reward_model, torch.tensor(likelihood.scores(reward_model, full, pad, micro), device=device))
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
