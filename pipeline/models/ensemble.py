"""A reward model, or several that were trained alike, as one score.

The score of one model is on the scale where the SFT model's own samples have mean 0 and standard deviation 1. The
scores of several are combined and brought onto that scale again. N: sequences.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold.errors import UserError
from threefold.models import Model, likelihood, loading

MEMBERS = "members"  # folder of the second and all later models in the artifact of the first


@dataclass
class Ensemble:
    """Reward models and how their scores become one.

    combine: mean; min, the lowest; or uncertain, the mean less `coef` times the variance over the members (Coste et
    al. 2024, arXiv 2310.02743). `scale` is mean and standard deviation of the combined scores of the SFT model's
    samples.
    """

    members: list[Model]
    combine: str = "mean"
    coef: float = 0.0
    scale: tuple[float, float] = (0.0, 1.0)

    def scores(self, sequences: list[list[int]], pad: int, batch_size: int = 128, bar: Any = None) -> Tensor:
        """The score [N] of each sequence of token ids; `bar` counts those of every member."""
        return self.combined(self.member_scores(sequences, pad, batch_size, bar))

    def member_scores(self, sequences: list[list[int]], pad: int, batch_size: int = 128, bar: Any = None) -> Tensor:
        """The score of each sequence by each member [members, N]; `UserError` where one is not finite."""
        scores = torch.stack([normalised_scores(member, sequences, pad, batch_size, bar) for member in self.members])
        if not scores.isfinite().all():
            wrong = int((~scores.isfinite()).any(0).sum())
            raise UserError(f"reward model: its score of {wrong} of {scores.shape[1]} replies is no finite number")
        return scores

    def combined(self, scores: Tensor) -> Tensor:
        """One score [N] of the scores [members, N]."""
        if len(scores) == 1:
            return scores[0]
        if self.combine == "min":
            score = scores.amin(0)
        else:
            score = scores.mean(0) - (self.coef * scores.var(0, correction=0) if self.combine == "uncertain" else 0.0)
        return (score - self.scale[0]) / self.scale[1]

    def settings(self) -> dict[str, Any]:
        """The part of the first model's configuration that describes the ensemble."""
        return {"combine": self.combine, "coef": self.coef, "scale": list(self.scale)}


def normalised_scores(
    model: Model, sequences: list[list[int]], pad: int, batch_size: int = 128, bar: Any = None
) -> Tensor:
    """The score [N] of each sequence by one reward model, on the scale that its configuration holds."""
    return normalised(model, torch.tensor(likelihood.scores(model, sequences, pad, batch_size, bar)))


def normalised(reward_model: Model, raw: Tensor) -> Tensor:
    """Raw scores [...] on the scale where the SFT model's samples have mean 0 and standard deviation 1."""
    return (raw - reward_model.config.score_mean) / reward_model.config.score_std


def mean_and_deviation(scores: Tensor) -> tuple[float, float]:
    """Mean and deviation that normalise scores [N]. Raises `UserError` where a score is not a finite number."""
    if not torch.isfinite(scores).all():
        raise UserError("reward: the scores of the SFT model's samples are not finite; lower reward.learning_rate")
    return scores.mean().item(), max(scores.std().item(), 1e-6)


def load(folder: Path, device: str = "cpu") -> Ensemble:
    """The reward model or models of an artifact."""
    first = loading.load_reward_model(folder, device)
    return joined([first, *(loading.load_reward_model(other, device) for other in other_members(folder))])


def other_members(folder: Path) -> list[Path]:
    """The folders of the second and all later models of an artifact, in their order."""
    return sorted((folder / MEMBERS).glob("*"), key=lambda member: int(member.name))


def joined(members: list[Model]) -> Ensemble:
    """The ensemble of these members, by the settings in the first one's configuration."""
    settings = getattr(members[0].config, "ensemble", None)
    if settings is None:
        return Ensemble(members)
    return Ensemble(members, settings["combine"], settings["coef"], tuple(settings["scale"]))
