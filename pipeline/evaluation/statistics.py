"""Intervals, paired tests, and the side effects of alignment.

Every share and mean that is reported comes with an interval, or with None where too little was seen for one. Whether
one model is better than another is tested on two scores for each prompt (or for each seed).

Side effects of alignment: less diverse replies, DPO's drift with its alarm, and the prompts that changed most.
"""

import difflib
import functools
from typing import Any

import numpy as np

RESAMPLES = 9999  # sign flips that are drawn where there are too many to try all: no p is below 2 / 10,000


def share_interval(outcomes: list[float], groups: list[str] | None = None) -> list[float] | None:
    """Wilson's 95 % interval of the share of outcomes that are 1, as [low, high]; ties may count one half.

    Outcomes of one group (replies to one prompt) are not independent: with `groups` the interval is that of as many
    independent outcomes as would leave the mean as uncertain as these do, by the variance between groups, at Student's
    t of as many groups (Korn and Graubard 1998). None where there is one group: nothing is known of another.
    """
    share, count, z = float(np.mean(outcomes)), float(len(outcomes)), 1.959964
    if groups is not None:
        distinct = len(set(groups))
        if distinct < 2:
            return None
        count, z = _independent_count(np.asarray(outcomes, dtype=float), groups), students_t(distinct)
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))]  # rounding


def _independent_count(outcomes: np.ndarray, groups: list[str]) -> float:
    """How many independent outcomes would leave the mean as uncertain as these [outcomes] in two or more groups do.

    The variance is taken with half a group of ones and half a group of zeros added, as Agresti and Coull (1998) add
    outcomes: few groups near 0 or 1 look more alike than they are.
    """
    sums, sizes = _by_group(outcomes, groups)
    distinct, total = len(sums) + 1, len(outcomes)
    size = total / len(sums)  # of the group that is added
    share = (sums.sum() + size / 2) / (total + size)
    squares = ((sums - share * sizes) ** 2).sum() + size**2 * ((1 - share) ** 2 + share**2) / 2
    variance = distinct / (distinct - 1) * squares / (total + size) ** 2
    return float(min(total, share * (1 - share) / variance * total / (total + size)))


def mean_interval(values: list[float], groups: list[str] | None = None) -> list[float] | None:
    """Student's t 95 % interval of the mean of `values`, as [low, high], made longer towards the longer tail.

    With `groups` it goes by the spread between groups, at the t of as many groups. Where values are skewed, the end on
    their longer side is Johnson's (1978), which is corrected for skewness. None where there are fewer than two values
    or groups, or all are alike: that says nothing of how far the mean of others may be.
    """
    sums, sizes = _by_group(np.asarray(values, dtype=float), groups or list(range(len(values))))
    count, mean = len(sums), float(sums.sum() / sizes.sum())
    if count < 2:
        return None
    deviations = (sums - mean * sizes) / sizes.mean()
    deviation = deviations.std(ddof=1)
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return None
    t, third = students_t(count), (deviations**3).sum() * count / ((count - 1) * max(1, count - 2))
    skew = third / deviation**2 * (1 / 6 + t**2 / 3) / count
    half = t * deviation / np.sqrt(count)
    return [float(mean - half + min(0.0, skew)), float(mean + half + max(0.0, skew))]


def difference_interval(differences: list[float], groups: list[str]) -> list[float] | None:
    """`mean_interval` of differences of two shares, -1 to 1, and where all groups are alike what a sign test supports.

    When n groups are all alike, at least 0.025^(1/n) of all groups are so at 97.5 % (Clopper and Pearson 1934), and the
    others lie between -1 and 1. None where there is one group.
    """
    count, mean = len(set(groups)), float(np.mean(differences))
    if (interval := mean_interval(differences, groups)) or count < 2:
        return interval
    alike = 0.025 ** (1 / count)
    return [alike * mean - (1 - alike), alike * mean + (1 - alike)]


@functools.cache
def students_t(count: int) -> float:
    """How many standard errors each end of a 95 % interval is away from the mean of `count` independent values."""
    from scipy.special import stdtrit  # all of scipy.stats takes a third of a second to import

    return float(stdtrit(count - 1, 0.975))


def _by_group(values: np.ndarray, groups: list) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values [values] of each group, and how many these are, both [groups]."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return np.bincount(numbers, values), np.bincount(numbers)


def shown(interval: list[float] | tuple[float, float] | None, form: str) -> str:
    """An interval as text, [0.123, 0.456]; [–] where there is none."""
    return f"[{', '.join(format(end, form) for end in interval)}]" if interval else "[–]"


def ends(interval: list[float] | tuple[float, float] | None) -> tuple[float | None, float | None]:
    """Both ends of an interval; None and None where there is none."""
    return (interval[0], interval[1]) if interval else (None, None)


# Paired tests


def compare_pairs(ours: list[float | None], theirs: list[float | None], seed: int) -> dict[str, Any] | None:
    """The mean difference of paired scores: `difference`, `ci95`, `p` and `pairs`; None where nothing is paired.

    Pairs of which one has no score are left out. `ci95` is `mean_interval`, None where all differences are
    the same. `p` is two-sided, of the paired permutation test (Fisher 1935): were both the same, each difference could
    as well have the other sign. All 2^n signs are tried where these are fewer than 10,000; n pairs can give no p below
    2 / 2^n.
    """
    scored = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not scored:
        return None
    differences = [a - b for a, b in scored]
    return {
        "difference": float(np.mean(differences)),
        "ci95": mean_interval(differences),
        "p": sign_flip_p(differences, seed),
        "pairs": len(scored),
    }


def sign_flip_p(differences: list[float], seed: int) -> float:
    """Two-sided p of the mean of `differences` under flips of their signs; 1 where there is but one, or all are 0."""
    if len(differences) < 2 or not any(differences):
        return 1.0
    from scipy import stats

    test = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p: list[float]) -> list[float]:
    """Each p corrected for all of them (Holm 1979): below 0.05 are false in at most one of 20 families of tests."""
    order, corrected, highest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def planned_comparisons(models: list[str]) -> list[tuple[str, str]]:
    """Which of `models` is compared with which.

    Each with SFT, PPO with DPO, both with best-of-n, and each with what it was in an earlier run.
    """
    aligned = [name for name in ("dpo", "ppo") if name in models]
    best_of = [name for name in models if name.startswith(("best_of_", "sft_best_of_"))]
    with_sft = [(name, "sft") for name in models if name not in ("sft", "human") and "sft" in models]
    with_each_other = [("ppo", "dpo")] if len(aligned) == 2 else []
    earlier = [(name.rpartition("/")[2], name) for name in models if name.rpartition("/")[2] in models and "/" in name]
    return with_sft + with_each_other + [(name, best) for name in aligned for best in best_of] + earlier


def paired_tests(by_judge: dict[str, dict[str, list[float | None]]], seed: int) -> list[dict[str, Any]]:
    """The planned comparisons of models by every judge (judge → model → scores); `p_holm` is corrected for all."""
    rows: list[dict[str, Any]] = []
    for judge, scores in by_judge.items():
        for model, against in planned_comparisons(list(scores)):
            if test := compare_pairs(scores[model], scores[against], seed):
                prompts = test.pop("pairs")
                rows.append({"model": model, "against": against, "judge": judge, **test, "prompts": prompts})
    corrected = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


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
