"""Options of stage `dpo` held to the losses that have them. Imports no torch."""

import math

from omegaconf import DictConfig

from threefold.errors import UserError, nearest
from threefold.schema.stages import LABEL_LOSSES, PAIR_LOSSES

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # losses of stage `dpo` that have label smoothing
AVERAGED = ("ipo", "sigmoid_norm", "simpo")  # those on means over tokens
WHOLE = ("kto", "aot", "aot_unpaired")  # those that look at all rows of a pass together


def check_dpo(dpo: DictConfig) -> None:
    """Hold options to the losses that have them, and losses to be such that can be added up; raises `UserError`."""
    losses, of_labels = [dpo.loss_type, *dpo.loss_weights], dpo.loss_type in LABEL_LOSSES
    for name, weight in dpo.loss_weights.items():
        if name not in PAIR_LOSSES:
            choices = f"must be one of {', '.join(PAIR_LOSSES)}"
            raise UserError(f"dpo.loss_weights: {name} is no loss of pairs; {choices}{nearest(name, PAIR_LOSSES)}")
        if not 0 < weight < math.inf:
            raise UserError(f"dpo.loss_weights.{name}={weight}: must be a finite number above 0")
    if dpo.beta == 0 and set(losses) != {"sft"}:
        raise UserError(f"dpo.beta=0: dpo.loss_type={dpo.loss_type} learns nothing with it; set it above 0")
    if dpo.label_smoothing and not set(losses) & set(SMOOTHED):
        raise UserError(f"dpo.label_smoothing: dpo.loss_type={dpo.loss_type} has none; use loss_type=robust")
    if dpo.label_smoothing >= 0.5:
        raise UserError(f"dpo.label_smoothing={dpo.label_smoothing}: must be below 0.5")
    if "exo_pair" in losses and not dpo.label_smoothing:
        raise UserError("dpo.label_smoothing=0: exo_pair takes its logarithm; set it to 0.001, as in its paper")
    if (dpo.loss_type == "simpo") != (dpo.simpo_gamma is not None):
        raise UserError("dpo.simpo_gamma: goes with dpo.loss_type=simpo, for example 1.0; set both or none")
    if dpo.loss_type == "simpo" and dpo.reference_sync_every is not None:
        raise UserError("dpo.reference_sync_every: dpo.loss_type=simpo has no reference; leave it null")
    if dpo.ld_alpha is not None and (of_labels or set(losses) <= {"sft"} or set(losses) & set(AVERAGED)):
        raise UserError(f"dpo.ld_alpha: is for losses on sums over tokens, not for {', '.join(losses)}; leave it null")
    if dpo.loss_type == "simpo" and not set(losses) <= {"simpo", "sft"}:
        raise UserError(
            "dpo.loss_weights: other losses have a reference; dpo.loss_type=simpo takes sft alone beside it"
        )
    if of_labels and dpo.loss_weights:
        raise UserError(f"dpo.loss_weights: dpo.loss_type={dpo.loss_type} is no loss of pairs; leave it {{}}")
    if not of_labels and (dpo.desirable_weight, dpo.undesirable_weight) != (1, 1):
        raise UserError(
            f"dpo.desirable_weight, dpo.undesirable_weight: are for {' and '.join(LABEL_LOSSES)}, not for "
            f"dpo.loss_type={dpo.loss_type}; leave both 1"
        )
    if not dpo.desirable_weight + dpo.undesirable_weight:
        raise UserError("dpo.desirable_weight=0: with dpo.undesirable_weight=0 nothing is learnt; raise one of them")
    if dpo.reference_mixup != 1 and dpo.reference_sync_every is None:
        raise UserError(
            "dpo.reference_mixup: is for a reference that moves; leave it 1, or set dpo.reference_sync_every"
        )
    if dpo.reference_mixup == 0:
        raise UserError("dpo.reference_mixup=0: the reference would stay; leave dpo.reference_sync_every null for that")


def check_whole(config: DictConfig, processes: int) -> None:
    """Losses of rows together: KTO's KL is a mean over the rows of a pass, and aot and aot_unpaired sort these."""
    whole = [name for name in (config.dpo.loss_type, *config.dpo.loss_weights) if name in WHOLE]
    share, micro_batch_size = config.dpo.batch_size // processes, config.runtime.micro_batch_size
    if not whole:
        return
    if micro_batch_size is not None and micro_batch_size < share:
        raise UserError(
            f"runtime.micro_batch_size={micro_batch_size}: {whole[0]} looks at the {share} rows of a process together; "
            "leave it null, or set dpo.batch_size lower"
        )
    if whole[0] == "kto" and share < 2:
        raise UserError(f"dpo.batch_size={config.dpo.batch_size}: kto needs 2 replies or more for each process")
    if whole[0] != "kto" and processes > 1:
        raise UserError(f"launch.processes: {whole[0]} sorts the pairs of a batch, which one process must hold")
