"""Advantages of a rollout, by the estimator that the configuration names. B: replies, R: reply tokens."""

from typing import Any

from torch import Tensor

from threefold.ppo import estimators
from threefold.ppo.rollouts import Rollout


def estimate(rollout: Rollout, kl_coef: float, config: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages and returns, both [B, R], and the rollout's metrics."""
    mask = rollout.mask
    kl = {
        name: estimators.kl_per_token(rollout.logprobs, rollout.reference_logprobs, name) * mask
        for name in ("k1", "k2", "k3")
    }
    k1, k3 = kl["k1"], kl["k3"]
    penalty = kl_coef if config.kl_in == "reward" else 0.0
    rewards = estimators.token_rewards(rollout.scores, kl[config.kl_estimator], penalty, mask)  # [6]
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
        metrics["explained_variance"] = estimators.explained_variance(rollout.values, returns, mask).item()
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
        rewards = estimators.whiten(rewards, mask, shift_mean=False)
    if config.advantage == "gae":
        advantages, returns = estimators.gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)  # [8]
        return estimators.whiten(advantages, mask), returns  # [9]
    returns = estimators.returns_to_go(rewards, mask, config.gamma)
    if config.advantage == "reinforce++":
        return estimators.whiten(returns, mask), returns  # [9]
    compare = estimators.rloo if config.advantage == "rloo" else estimators.grpo
    return compare(rewards.sum(1), config.samples_per_prompt)[:, None] * mask, returns
