"""Guards: signs, in the metrics of a rollout and its update, that PPO's training has gone wrong."""

import math
from typing import Any


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
