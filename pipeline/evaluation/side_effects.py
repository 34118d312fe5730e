"""Side effects of alignment: less diverse replies, DPO's drift with its alarm, and the prompts that changed most."""

import difflib
from typing import Any

import numpy as np

from threefold.evaluation.statistics import mean_interval, shown

REPLIES = 100  # replies that self-BLEU compares, each with all others; it grows with their number


def distinct_n(texts: list[str], n: int) -> float:
    """Different word n-grams as a share of all, over all replies together (Li et al. 2016); 1 is no repetition."""
    words = [text.lower().split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts: list[str], seed: int) -> float:
    """Mean BLEU of a reply against all others (Zhu et al. 2018, Texygen, arXiv 1802.01886): 0 to 1, 1 is all alike.

    Of at most 100 replies, drawn by `seed` alone, so that models are compared at the same prompts. n-grams up to 4, of
    shorter replies up to their length; an order without a match counts a tenth of one (NLTK's smoothing method 1), and
    a reply that shares no word with another is 0. A reply without a word is left out; where fewer than two have words,
    all are alike.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # slow, and the report needs none of it

    drawn = np.random.default_rng(seed).permutation(len(texts))[:REPLIES]
    words = [split for i in sorted(drawn) if (split := texts[i].lower().split())]
    if len(words) < 2:
        return 1.0
    smoothing = SmoothingFunction().method1
    scores = [
        sentence_bleu(words[:i] + words[i + 1 :], reply, smoothing_function=smoothing, auto_reweigh=True)
        for i, reply in enumerate(words)
    ]
    return float(np.mean(scores))


def drift(change: dict[str, list[float]], prompts: list[str]) -> dict[str, Any]:
    """Mean change of log-probability of chosen and rejected replies, nats per reply, with 95 % intervals over prompts.

    `chosen_falls` is true where the whole interval of chosen replies is below 0; where there is none it is false. That
    chosen replies lose probability is known as likelihood displacement (Razin et al. 2024, arXiv 2410.08847).
    """
    metrics: dict[str, Any] = {}
    for side, values in change.items():
        metrics[f"{side}_logprob_change"] = float(np.mean(values))
        metrics[f"{side}_logprob_change_ci95"] = mean_interval(values, prompts)
    interval = metrics["chosen_logprob_change_ci95"]
    return metrics | {"chosen_falls": interval is not None and interval[1] < 0}


def alarm(dpo: dict[str, Any], replies: list[str], before: list[str]) -> dict[str, Any]:
    """What became of chosen replies and of length, and whether both went the wrong way (`alarm`).

    DPO may learn length (length exploitation, Park et al. 2024, arXiv 2403.19159). Where chosen replies also become
    less likely, what DPO made likely is neither of the two replies that it was shown.

    `dpo` are the metrics of stage dpo, `replies` DPO's to held-out prompts and `before` those of its reference.
    Lengths are in characters; that they grow means that the whole 95 % interval of the paired change is above 0.
    """
    longer = [float(len(now) - len(then)) for now, then in zip(replies, before, strict=True)]
    interval = mean_interval(longer)
    kept = {key: dpo[key] for key in ("chosen_logprob_change", "chosen_logprob_change_ci95", "rejected_logprob_change")}
    return kept | {
        "length_change": float(np.mean(longer)),
        "length_change_ci95": interval,
        "alarm": bool(dpo["chosen_falls"] and interval is not None and interval[0] > 0),
    }


def alarm_in_words(metrics: dict[str, Any]) -> str:
    """One line for the terminal and the report."""
    changes = (
        f"chosen replies changed by {metrics['chosen_logprob_change']:+.1f} nats "
        f"{shown(metrics['chosen_logprob_change_ci95'], '+.1f')}, "
        f"replies by {metrics['length_change']:+.0f} characters {shown(metrics['length_change_ci95'], '+.0f')}"
    )
    if not metrics["alarm"]:
        return f"DPO: {changes}"
    return f"ALARM: DPO made chosen replies less likely and its own longer: {changes}; see docs/evaluation.md"


def most_changed(
    rows: list[dict[str, Any]], model: str, against: str = "sft", judge: str = "gold", count: int = 3
) -> list[dict[str, Any]]:
    """The prompts on which `model` gained most over `against` by `judge`, and those on which it lost most.

    At most `count` of each. `rows` are those of samples.jsonl. Each comes back with `change`, the difference of the
    scores, and `text_change`, the share of words that differ (1 less difflib's ratio), which decides between equal
    changes of score. Replies that are the same, or that the judge has no score for, take no part.
    """
    changed = [_changed(row, model, against, judge) for row in rows if _comparable(row, model, against, judge)]
    gained = sorted((r for r in changed if r["change"] > 0), key=lambda r: (-r["change"], -r["text_change"]))
    lost = sorted((r for r in changed if r["change"] < 0), key=lambda r: (r["change"], -r["text_change"]))
    return gained[:count] + lost[:count]


def _comparable(row: dict[str, Any], model: str, against: str, judge: str) -> bool:
    if model not in row or against not in row:
        return False
    scored = row[model][judge] is not None and row[against][judge] is not None
    return scored and row[model]["reply"] != row[against]["reply"]


def _changed(row: dict[str, Any], model: str, against: str, judge: str) -> dict[str, Any]:
    ours, theirs = row[model], row[against]
    alike = difflib.SequenceMatcher(None, theirs["reply"].split(), ours["reply"].split(), autojunk=False).ratio()
    return {
        "prompt": row["prompt"],
        "model": model,
        "against": against,
        "reply": ours["reply"],
        "reply_against": theirs["reply"],
        "score": ours[judge],
        "score_against": theirs[judge],
        "change": ours[judge] - theirs[judge],
        "text_change": 1 - alike,
    }
