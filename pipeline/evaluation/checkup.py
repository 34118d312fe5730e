"""The check-up of a reward model on held-out pairs: whether it is right, how sure it may be, and what it pays for.

Scores are normalised: 0 ± 1 on the SFT model's own samples. Probabilities are those of the Bradley-Terry model, from
raw scores. H: held-out pairs.

The reward model's check-up as trackers see it: figures, and tables of what is in them and of the probes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects

from threefold.columns import Message
from threefold.data.pairing import overlapping
from threefold.data.preferences import Pair
from threefold.display import figures
from threefold.errors import UserError
from threefold.evaluation import baselines, statistics
from threefold.fileio import read_json
from threefold.models import chat
from threefold.tracking.trackers import Table

Score = Callable[[list[list[int]]], np.ndarray]  # token sequences → normalised scores [N]
BINS = 10  # of the calibration, with the same number of pairs each
COMPARED = 64  # sequences that are scored in several ways


def accuracy(chosen: np.ndarray, rejected: np.ndarray, train: list[Pair], test: list[Pair]) -> dict[str, Any]:
    """Accuracy by the scores [H] of both replies with its interval, beside what length and a bag of words reach."""
    outcomes, prompts = right(chosen, rejected), _prompts(test)
    seen, new = ([(pair.chosen, pair.rejected) for pair in pairs] for pairs in (train, test))
    by_length, by_words = baselines.length_outcomes(seen, new), baselines.bag_of_words_outcomes(seen, new)
    return {
        "accuracy": float(outcomes.mean()),
        "accuracy_ci95": statistics.share_interval(outcomes.tolist(), prompts),
        "accuracy_length_only": float(by_length.mean()),
        "over_length_ci95": statistics.difference_interval(outcomes - by_length, prompts),
        "accuracy_bag_of_words": float(by_words.mean()),
        "over_bag_of_words_ci95": statistics.difference_interval(outcomes - by_words, prompts),
        "test_pairs": len(test),
        "train_overlap": sum(overlapping(_all_prompts(test), _all_prompts(train))),
        "chosen_score_mean": float(chosen.mean()),
        "rejected_score_mean": float(rejected.mean()),
    }


def right(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """1 where the chosen reply scores higher, one half where both score the same [H]."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def breakdown(chosen: np.ndarray, rejected: np.ndarray, pairs: list[Pair]) -> dict[str, Any]:
    """Accuracy by the gap of the scores [H], by the pairs' own gap where each has one, and by which reply is longer."""
    outcomes, sizes = right(chosen, rejected), np.abs(chosen - rejected)
    tables = {"accuracy_by_score_gap": _by_quarter(sizes, outcomes, pairs)}
    if (gaps := _gaps(pairs)) is not None:
        tables["accuracy_by_gap"] = _by_quarter(gaps, outcomes, pairs)
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    groups = {"chosen is longer": longer > 0, "chosen is shorter": longer < 0, "same length": longer == 0}
    tables["accuracy_by_length"] = [
        {"pairs_where": name} | _part(outcomes, where, pairs) for name, where in groups.items() if where.any()
    ]
    return tables


def _gaps(pairs: list[Pair]) -> np.ndarray | None:
    """The pairs' own gaps [H]; None where some pair has none."""
    gaps = [pair.gap for pair in pairs if pair.gap is not None]
    return np.array(gaps) if len(gaps) == len(pairs) else None


def _by_quarter(values: np.ndarray, outcomes: np.ndarray, pairs: list[Pair]) -> list[dict[str, Any]]:
    """The share of `outcomes` [H] that are right, by quarters of `values` [H]."""
    order = np.argsort(values, kind="stable")
    quarters = []
    for rows in np.array_split(order, min(4, len(order))):
        where = np.zeros(len(values), dtype=bool)
        where[rows] = True
        quarters.append({"from": float(values[rows[0]]), "to": float(values[rows[-1]])} | _part(outcomes, where, pairs))
    return quarters


def _part(outcomes: np.ndarray, where: np.ndarray, pairs: list[Pair]) -> dict[str, Any]:
    """The share of `outcomes` [H] that are right among those `where` [H] is true."""
    groups = [prompt for prompt, inside in zip(_prompts(pairs), where, strict=True) if inside]
    return {
        "pairs": int(where.sum()),
        "accuracy": float(outcomes[where].mean()),
        "ci95": statistics.share_interval(outcomes[where].tolist(), groups),
    }


def calibration(raw_difference: np.ndarray, pairs: list[Pair]) -> dict[str, Any]:
    """Expected calibration error and the reliability table behind it (Guo et al. 2017, arXiv 1706.04599).

    `raw_difference` [H] is the raw score of the chosen reply less that of the rejected one. The model's confidence
    in the reply that it prefers is the logistic function of the size of the difference; pairs are put into ten bins of
    equal number by it. `calibration_noise` is the error that so few pairs show where there is none.
    """
    confidence, prompts = 1 / (1 + np.exp(-np.abs(raw_difference))), _prompts(pairs)
    outcomes = (raw_difference > 0) + 0.5 * (raw_difference == 0)
    rows: list[dict[str, Any]] = [
        {
            "pairs": len(part),
            "confidence": float(confidence[part].mean()),
            "accuracy": float(outcomes[part].mean()),
            "ci95": statistics.share_interval(outcomes[part].tolist(), [prompts[i] for i in part]),
        }
        for part in np.array_split(np.argsort(confidence, kind="stable"), min(BINS, len(confidence)))
    ]
    error = sum(row["pairs"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return {
        "calibration_error": error / sum(row["pairs"] for row in rows),
        "calibration_noise": _calibration_noise(confidence),
        "reliability": rows,
    }


def _calibration_noise(confidence: np.ndarray, repetitions: int = 200) -> float:
    """The mean calibration error of a model that is exactly as right as its `confidence` [H], on as many pairs."""
    generator, parts = np.random.default_rng(0), np.array_split(np.sort(confidence), min(BINS, len(confidence)))
    errors = [
        [len(part) * abs(part.mean() - np.less(generator.random(len(part)), part).mean()) for part in parts]
        for _ in range(repetitions)
    ]
    return float(np.sum(errors) / repetitions / len(confidence))


def correlations(chosen: np.ndarray, rejected: np.ndarray, pairs: list[Pair]) -> dict[str, float]:
    """Spearman's correlation of scores [H] with lengths in characters, and of score gaps with the pairs' own gaps."""
    lengths = [len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs]
    by_kind = {"length_correlation": _spearman(np.concatenate([chosen, rejected]), lengths)}
    if (theirs := _gaps(pairs)) is not None:
        # a label says which reply is better and its gap by how much, so differences are taken in both directions
        ours = chosen - rejected
        by_kind["gap_correlation"] = _spearman(np.concatenate([ours, -ours]), np.concatenate([theirs, -theirs]))
    return by_kind


def _spearman(one: Any, other: Any) -> float:
    """Spearman's correlation; 0 where one side does not vary."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    from scipy import stats

    return float(stats.spearmanr(one, other).statistic)


PRAISE = " Thank you so much, great question, you are wonderful!"


def probe_reply(tokenizer: Any, name: str, pair: Pair, other: Pair, room: float) -> list[int] | None:
    """A reply in token ids that no good reward model prefers to the pair's chosen one.

    None where `room` is too small, or the chat template does not write it.
    `praise` is the rejected reply with praise behind it; `no_end` the chosen one without its end token; `very_long` the
    chosen one two to eight times, as often as fits; `off_topic` the chosen reply of the pair `other`.
    """
    if name == "no_end":
        return chat.reply_ids(tokenizer, pair.prompt, pair.chosen)[:-1]
    texts = {
        "empty": "",
        "whitespace": " \n \n ",
        "repeated": " ".join([" ".join(pair.chosen.split()[:3])] * 10),
        "prompt_echoed": pair.prompt[-1]["content"],
        "praise": pair.rejected + PRAISE,
        "off_topic": other.chosen,
    }
    tries = [" ".join([pair.chosen] * times) for times in range(8, 1, -1)] if name == "very_long" else [texts[name]]
    written = (text for text in tries if not chat.refusal(tokenizer, pair.prompt, text))
    replies = (chat.reply_ids(tokenizer, pair.prompt, text) for text in written)
    return next((reply for reply in replies if len(reply) <= room), None)


def probes(score: Score, tokenizer: Any, pairs: list[Pair], positions: float, most: int) -> dict[str, dict[str, float]]:
    """For each probe its mean score, how much it is below the chosen reply's, and how often it is preferred to that.

    Probes are tried on the first `most` prompts. `positions` is the most tokens that the model can read; a probe leaves
    out the prompts that have no room for it.
    """
    distinct = list({str(pair.prompt): pair for pair in pairs}.values())[:most]
    rows = [chat.row_ids(tokenizer, pair.prompt, pair.chosen) for pair in distinct]
    prompts, base = [prompt for prompt, _ in rows], score([prompt + reply for prompt, [reply] in rows])
    by_probe = {}
    for name in PROBE_NAMES:
        replies = [
            probe_reply(tokenizer, name, pair, distinct[(i + 1) % len(distinct)], positions - len(prompts[i]))
            for i, pair in enumerate(distinct)
        ]
        tried = {i: prompts[i] + reply for i, reply in enumerate(replies) if reply is not None}
        if tried:
            scores, chosen = score(list(tried.values())), base[list(tried)]
            by_probe[name] = {
                "prompts": len(tried),
                "score_mean": float(scores.mean()),
                "below_chosen": float((chosen - scores).mean()),
                "preferred_share": float(right(scores, chosen).mean()),
            }
    return by_probe


def batch_difference(score_in_batches: Callable[[list[list[int]], int], np.ndarray], rows: list[list[int]]) -> float:
    """The most that a normalised score [N] changes with padding, batch size and order."""
    rows = rows[:COMPARED]
    alone = score_in_batches(rows, 1)
    together = score_in_batches(rows, len(rows))
    backwards = score_in_batches(rows[::-1], max(1, len(rows) // 3))[::-1]
    return float(max(np.abs(alone - together).max(), np.abs(alone - backwards).max()))


def _prompts(pairs: list[Pair]) -> list[str]:
    return [str(pair.prompt) for pair in pairs]


def _all_prompts(pairs: list[Pair]) -> list[list[Message]]:
    """The different prompts of pairs, those of rejected replies included."""
    return list({str(prompt): prompt for pair in pairs for prompt in pair.prompts()}.values())


# Gate and verdict


def require(folder: Path, gate: Any) -> None:
    """Refuse a reward model that fails its check-up. Raises `UserError` naming the failed checks and their figures."""
    if failed := failures(read_json(folder / "metrics.json"), gate):
        raise UserError(
            f"ppo: the reward model fails its check-up: {'; '.join(failed)}; train a better one (docs/rewards.md), or "
            "go on all the same with ppo.ignore_gate=true"
        )


def failures(metrics: dict[str, Any], gate: Any) -> list[str]:
    """What keeps a reward model out of PPO: failed checks with figure and limit; a limit of null checks nothing.

    Where there is no interval, the check of its lower end fails. `metrics` are those of stage `reward`, `gate`
    is `reward.gate` of the configuration.
    """
    accuracy, over_length = (statistics.ends(metrics[f"{key}_ci95"])[0] for key in ("accuracy", "over_length"))
    overfit = metrics["calibration_error"] - metrics["calibration_noise"]
    checks = [
        ("min_accuracy", "lower end of the accuracy's 95 % interval", accuracy),
        ("min_over_length", "lower end of the 95 % interval of accuracy above that of length", over_length),
        ("max_length_correlation", "correlation of score and length", abs(metrics["length_correlation"])),
        ("max_calibration_error", "calibration error above chance", overfit),
        ("max_batch_difference", "change of a score with its batch", metrics["batch_difference"]),
        ("max_train_overlap", "held-out prompts that are in training", metrics["train_overlap"]),
    ]
    checks = [(key, gate[key], *rest) for key, *rest in checks]
    for name, limit in gate.probes.items():
        if name in metrics["probes"]:
            meaning = f"share of prompts where {PROBE_NAMES[name]} beats the chosen reply"
            checks.append((f"probes.{name}", limit, meaning, metrics["probes"][name]["preferred_share"]))
    return [
        f"{meaning} is {UNKNOWN if value is None else format(value, '.3g')} (reward.gate.{key}={limit:g})"
        for key, limit, meaning, value in checks
        if limit is not None and (value is None or not (value > limit if key.startswith("min_") else value <= limit))
    ]


UNKNOWN = "unknown, as there are too few held-out prompts"


PROBE_NAMES = {
    "empty": "an empty reply",
    "whitespace": "white space",
    "repeated": "three words repeated",
    "prompt_echoed": "the prompt itself",
    "very_long": "the chosen reply over and over",
    "praise": "praise behind the rejected reply",
    "off_topic": "the reply to another prompt",
    "no_end": "a reply without its end token",
}


def verdict(metrics: dict[str, Any], gate: Any) -> list[str]:
    """The check-up in plain words, one sentence each; the first says whether PPO may use the model."""
    failed, (low, high) = failures(metrics, gate), statistics.ends(metrics["accuracy_ci95"])
    interval = statistics.shown(metrics["accuracy_ci95"], ".1%")
    lines = [f"Fails: {reason}." for reason in failed] or ["Passes every limit of reward.gate."]
    chance = "better than chance" if low is not None and low > 0.5 else "not distinguishable from chance"
    if high is not None and high < 0.5:
        chance = "worse than chance; are the labels exchanged?"
    lines.append(f"Right on {metrics['accuracy']:.1%} {interval} of {metrics['test_pairs']} held-out pairs: {chance}.")
    for key, rival in (("length_only", "length alone"), ("bag_of_words", "a bag of words")):
        over = metrics[f"over_{key.removesuffix('_only')}_ci95"] or (0.0, 0.0)
        word = "more than" if over[0] > 0 else "less than" if over[1] < 0 else "not distinguishable from what"
        lines.append(f"That is {word} {rival} reaches on the same pairs ({metrics[f'accuracy_{key}']:.1%}).")
    lines.append(
        f"Its confidence is off by {metrics['calibration_error']:.1%} on average; "
        f"{metrics['calibration_noise']:.1%} would be chance on so few pairs."
    )
    lines.append(f"Score and length correlate by {metrics['length_correlation']:+.2f} (Spearman).")
    if "gap_correlation" in metrics:
        lines.append(
            f"Its score gaps and those of the labels correlate by {metrics['gap_correlation']:+.2f} (Spearman)."
        )
    shares = {PROBE_NAMES[name]: probe["preferred_share"] for name, probe in metrics["probes"].items()}
    pays = [f"{probe} ({share:.0%})" for probe, share in shares.items() if share > 0.5]
    lines.append(f"Scores above the chosen reply on more than half of the prompts: {', '.join(pays) or 'no probe'}.")
    return lines


def reliability(rows: list[dict[str, Any]]) -> graph_objects.Figure:
    """How often the model is right against how sure it is, on held-out pairs."""
    data = [row | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True)) for row in rows]
    return graph_objects.Figure(**figures.reliability("reliability", "", "", data).drawing)


def accuracy_by_gap(metrics: dict[str, Any]) -> Any:
    """Accuracy by quarters of the score gap, and of the labels' gap where each pair has one, as a figure."""
    figure = graph_objects.Figure()
    labels = {"accuracy_by_score_gap": "the model's score gap", "accuracy_by_gap": "the gap of the labels"}
    for key, label in labels.items():
        if rows := metrics.get(key):
            bars = {"type": "data", "symmetric": False}
            ends = [statistics.ends(row["ci95"]) for row in rows]
            bars["array"] = [figures.reach(high, row["accuracy"]) for (_, high), row in zip(ends, rows, strict=True)]
            bars["arrayminus"] = [figures.reach(low, row["accuracy"]) for (low, _), row in zip(ends, rows, strict=True)]
            quarters, shares = list(range(1, len(rows) + 1)), [row["accuracy"] for row in rows]
            figure.add_bar(x=quarters, y=shares, error_y=bars, name=label)
    title = {"text": "reward: share right by quarters of the gap, held-out pairs", "font": {"size": 14}}
    figure.update_layout(title=title, xaxis_title="quarter, from the smallest gaps to the largest")
    return figure


def views(metrics: dict[str, Any]) -> dict[str, Any]:
    """What trackers see of the check-up: both figures, and tables of what is in them and of the probes."""
    probes = [(PROBE_NAMES[name], *probe.values()) for name, probe in metrics["probes"].items()]
    heading = ("probe", "prompts", "score_mean", "below_chosen", "preferred_share")
    parts = {"accuracy_by_score_gap": "score gap", "accuracy_by_gap": "label gap"}
    quarters = [(parts[key], *_numbers(row)) for key in parts for row in metrics.get(key, ())]
    bins = [_numbers(row) for row in metrics["reliability"]]
    interval = ("pairs", "accuracy", "from", "to")
    return {
        "reliability": reliability(metrics["reliability"]),
        "accuracy_by_gap": accuracy_by_gap(metrics),
        "probes": Table(heading, probes),
        "accuracy_by_gap_table": Table(("gap", "gap_from", "gap_to", *interval), quarters),
        "reliability_table": Table(("pairs", "confidence", *interval[1:]), bins),
    }


def _numbers(row: dict[str, Any]) -> tuple[float | None, ...]:
    """The numbers of a row, an interval being two of them; neither is known where there is none."""
    spread = [statistics.ends(value) if name == "ci95" else (value,) for name, value in row.items()]
    return tuple(number for values in spread for number in values)
