"""Guards: signs, in the metrics of a rollout and its update, that PPO's training has gone wrong."""

import math
from typing import Any

from threefold.errors import UserError


def broken(metrics: dict[str, float]) -> list[str]:
    """Names of the metrics that are not finite numbers."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]


def tripped(metrics: dict[str, float], config: Any) -> str | None:
    """Why training must not go on, or None: a metric that is not finite, or beyond its limit in `config` (null: none).

    Metrics that are not there yet are not held to anything. The size of the loss counts, not its sign.
    """
    if names := broken(metrics):
        return f"{names[0]} is {metrics[names[0]]}"
    highest = {"kl": ("max_kl", config.max_kl), "policy_loss": ("max_loss", config.max_loss)}
    lowest = {"entropy": ("min_entropy", config.min_entropy), "score_std": ("min_score_std", config.min_score_std)}
    for name, value in metrics.items():
        size = abs(value) if name == "policy_loss" else value
        for limits, side in ((highest, "above"), (lowest, "below")):
            key, limit = limits.get(name, ("", None))
            if limit is not None and (size > limit if side == "above" else size < limit):
                return f"{name} {size:.3g} is {side} ppo.{key}={limit}"
    return None


def require_one_distribution(name: str, error: float, config: Any) -> None:
    """Raise `UserError` where the policy's own probabilities of sampled tokens are too far from the sampler's.

    Before a step both are of the same weights. A ratio other than 1 means that one of the two computes something else
    than the model does, and then every figure of the training is wrong. `error` is the metric `name`.
    """
    key = {"first_ratio_error": "max_first_ratio_error", "engine_ratio_mean": "max_engine_ratio"}[name]
    if config[key] is not None and error > config[key]:
        raise UserError(
            f"ppo: sampled and recomputed log-probabilities differ: {name} {error:.3g} is above "
            f"ppo.{key}={config[key]:g}; this model is sampled from wrongly, or raise the limit"
        )
