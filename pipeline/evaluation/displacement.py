"""The alarm of DPO: chosen replies become less likely while the model's own replies grow.

That chosen replies lose probability is known as likelihood displacement (Razin et al. 2024, arXiv 2410.08847), that DPO
learns length as length exploitation (Park et al. 2024, arXiv 2403.19159). Together they say that what DPO made likely
is neither of the two replies that it was shown.
"""

from typing import Any

import numpy as np

from threefold.evaluation import statistics
from threefold.evaluation.statistics import shown


def drift(change: dict[str, list[float]], prompts: list[str]) -> dict[str, Any]:
    """Mean change of log-probability of chosen and rejected replies, nats per reply, with 95 % intervals over prompts.

    `chosen_falls` is true where the whole interval of chosen replies is below 0; where there is none it is false.
    """
    found: dict[str, Any] = {}
    for side, values in change.items():
        found[f"{side}_logprob_change"] = float(np.mean(values))
        found[f"{side}_logprob_change_ci95"] = statistics.mean_interval(values, prompts)
    interval = found["chosen_logprob_change_ci95"]
    return found | {"chosen_falls": interval is not None and interval[1] < 0}


def alarm(dpo: dict[str, Any], replies: list[str], before: list[str]) -> dict[str, Any]:
    """What became of chosen replies and of length, and whether both went the wrong way (`alarm`).

    `dpo` are the metrics of stage dpo, `replies` DPO's to held-out prompts and `before` those of its reference.
    Lengths are in characters; that they grow means that the whole 95 % interval of the paired change is above 0.
    """
    longer = [float(len(now) - len(then)) for now, then in zip(replies, before, strict=True)]
    interval = statistics.mean_interval(longer)
    kept = {key: dpo[key] for key in ("chosen_logprob_change", "chosen_logprob_change_ci95", "rejected_logprob_change")}
    return kept | {
        "length_change": float(np.mean(longer)),
        "length_change_ci95": interval,
        "alarm": bool(dpo["chosen_falls"] and interval is not None and interval[0] > 0),
    }


def in_words(found: dict[str, Any]) -> str:
    """One line for the terminal and the report."""
    said = (
        f"chosen replies changed by {found['chosen_logprob_change']:+.1f} nats "
        f"{shown(found['chosen_logprob_change_ci95'], '+.1f')}, replies by {found['length_change']:+.0f} characters "
        f"{shown(found['length_change_ci95'], '+.0f')}"
    )
    if not found["alarm"]:
        return f"DPO: {said}"
    return f"ALARM: DPO made chosen replies less likely and its own longer: {said}; see docs/evaluation.md"
