"""Advantages of a rollout, and PPO's estimators and losses as pure functions. B: replies, R: reply tokens.

`mask` [B, R] is 1 on reply tokens, the end token included, and 0 on padding, which is on the right.
"""

from typing import Any

import torch
from torch import Tensor

from threefold.ppo.rollouts import Rollout


def estimate(rollout: Rollout, kl_coef: float, config: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages and returns, both [B, R], and the rollout's metrics."""
    mask = rollout.mask
    kl = {
        name: kl_per_token(rollout.logprobs, rollout.reference_logprobs, name) * mask
        for name in ("k1", "k3", config.kl_estimator)
    }
    k1, k3 = kl["k1"], kl["k3"]
    penalty = kl_coef if config.kl_in == "reward" else 0.0
    rewards = token_rewards(rollout.scores, kl[config.kl_estimator], penalty, mask)  # [6]
    advantages, returns = advantages_of(rewards, rollout, config)
    metrics = {
        "score": rollout.scores.mean().item(),
        "score_std": rollout.scores.std().item(),
        "reward": rewards.sum(1).mean().item(),
        "kl": k1.sum(1).mean().item(),
        "kl_k3": k3.sum(1).mean().item(),
        "entropy": -(rollout.logprobs * mask).sum().item() / mask.sum().item(),
        "reply_tokens": mask.sum(1).float().mean().item(),
        "ended_share": rollout.ended.mean().item(),
    }
    if config.advantage == "gae":
        metrics["explained_variance"] = explained_variance(rollout.values, returns, mask).item()
    if config.sampler != "own" or not rollout.logprobs.equal(rollout.sampled_logprobs):  # computed again
        metrics |= engine_ratio(rollout)
    return advantages, returns, metrics


def engine_ratio(rollout: Rollout) -> dict[str, float]:
    """How far the policy's probabilities of the reply tokens are from those of the sampler that drew them.

    Mean and maximum of |ratio - 1| over all reply tokens, raw: nothing is truncated or left out.
    """
    chosen = rollout.mask.bool()
    error = (rollout.logprobs - rollout.sampled_logprobs)[chosen].exp().sub(1).abs()
    return {"engine_ratio_mean": error.mean().item(), "engine_ratio_max": error.max().item()}


def advantages_of(rewards: Tensor, rollout: Rollout, config: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R], of per-token rewards [B, R] by the estimator of the configuration."""
    mask = rollout.mask
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    if config.advantage == "gae":
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)  # [8]
        return whiten(advantages, mask), returns  # [9]
    returns = returns_to_go(rewards, mask, config.gamma)
    if config.advantage == "reinforce++":
        return whiten(returns, mask), returns  # [9]
    compare = rloo if config.advantage == "rloo" else grpo
    return compare(rewards.sum(1), config.samples_per_prompt)[:, None] * mask, returns


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens where `mask` is 1, a scalar."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` [B, R] divided by their standard deviation over masked tokens; the mean is removed or kept.

    The variance is the unbiased one. Padding stays 0.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask) * (mask.sum() / (mask.sum() - 1).clamp(min=1))
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_per_token(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate [B, R] of KL(policy, reference) at tokens drawn from the policy (Schulman 2020, "Approximating KL").

    k1 = log p - log q, unbiased; k2 = (log p - log q)^2 / 2, biased with little variance, and as a loss the one whose
    gradient is the KL's; k3 = q/p - 1 + log p - log q, unbiased and never negative.
    """
    log_ratio = logprobs - reference
    if estimator == "k1":
        return log_ratio
    return 0.5 * log_ratio**2 if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """Rewards [B, R]: -kl_coef times the KL on every token, and the score [B] of the reply on its last token."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R] (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    values[:, t] is the value of the text before reply token t; after the last token it is 0. Hence the mask of the
    values is the mask of the reply's tokens, which is the usual value mask shifted by one.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_value = values[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum [B, R] of the rewards from each token on: REINFORCE++'s advantage before whitening.

    Source: Hu 2025, arXiv 2501.03262.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def rloo(rewards: Tensor, samples: int) -> Tensor:
    """Each reply's reward [B] less the mean of the other replies to its prompt; `samples` consecutive rows share one.

    Source: Ahmadian et al. 2024, arXiv 2402.14740, section 3.3; Kool et al. 2019.
    """
    groups = rewards.view(-1, samples)
    return ((groups - groups.mean(1, keepdim=True)) * samples / (samples - 1)).view(-1)


def grpo(rewards: Tensor, samples: int) -> Tensor:
    """Each reply's reward [B] in standard deviations from the mean of its prompt's replies; equal rewards give 0.

    Source: Shao et al. 2024, arXiv 2402.03300, section 4.1.2.
    """
    groups = rewards.view(-1, samples)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss per token [B, R], and where clipping took effect (Schulman et al. 2017, equation 7)."""
    ratio = torch.exp(logprobs - old_logprobs)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, clipped), (clipped > free).float()


def reply_weights(lengths: Tensor, average: str) -> Tensor:
    """Factors [B] of the losses of each reply's tokens, so that their sum over N tokens, divided by N, is an average.

    `lengths` [B] are those of a minibatch's replies, N tokens together. Over tokens: the mean of all (factor 1); over
    replies: the mean of each reply's mean (GRPO); sums: the mean of each reply's sum (REINFORCE, RLOO).
    """
    tokens_per_reply = lengths.sum() / len(lengths)
    if average == "replies":
        return tokens_per_reply / lengths
    return tokens_per_reply.expand(len(lengths)) if average == "sums" else torch.ones_like(lengths)


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error per token [B, R], the value held near its old estimate, and where that took effect.

    Without a `clip_range` the value moves freely.
    """
    if clip_range is None:
        return 0.5 * (values - returns) ** 2, torch.zeros_like(values)
    near = values.clamp(old_values - clip_range, old_values + clip_range)  # exactly the value where that is near
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, clipped), (clipped > free).float()


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL coefficient after `episodes` replies of mean KL `kl` nats (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over masked tokens, a scalar; 1 is a perfect critic."""
    chosen = mask.bool()
    return 1 - (returns - values)[chosen].var() / returns[chosen].var().clamp(min=1e-8)


def next_kl_coef(kl_coef: float, kl: float, config: Any) -> float:
    """The KL coefficient for the next rollout."""
    if config.kl_controller == "fixed":
        return kl_coef
    return adapted_kl_coef(kl_coef, kl, config.kl_target, config.batch_size, config.kl_horizon)


def summed(sums: dict[str, Tensor]) -> dict[str, float]:
    """Sums over tokens, brought from the device at once."""
    return dict(zip(sums, torch.stack([value.detach().sum() for value in sums.values()]).tolist(), strict=True))
