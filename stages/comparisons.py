"""Stage `comparisons`: pairs of replies to one prompt, labelled by a judge; or the pairs of a given data set."""

from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np

from threefold import rewards
from threefold.data import pairing, preferences, reading
from threefold.data.pairing import Answer, Candidate, overlapping
from threefold.data.preferences import Pair
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation.players import policy_name
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.fileio import write_lines
from threefold.models import chat, ensemble, loading, template
from threefold.sampling import sampler


def run(job: Job) -> dict[str, Any]:
    """Write train.jsonl and test.jsonl, disjoint by prompt; only pool.jsonl where people are still to label it."""
    if job.config.data.preferences.path is not None:
        train, test, metrics = given(job)
    else:
        train, test, metrics = made(job)
    if job.config.data.preferences.path is None and job.config.comparisons.label_by == "people":
        return metrics
    earlier, dropped = earlier_pairs(job, test)
    if earlier:
        train, metrics = train + earlier, metrics | {"pairs_from_earlier": len(earlier)}
    metrics["dropped_held_out_prompt"] += dropped
    train, test, template_counts = as_the_template_allows(job, train, test)
    if not train or not test:
        raise UserError(
            f"comparisons: {len(train)} training and {len(test)} held-out pairs; lower comparisons.min_gap or ask more"
        )
    preferences.write(job.out / "train.jsonl", train)
    preferences.write(job.out / "test.jsonl", test)
    job.say(f"{len(train):,} pairs for training, {len(test):,} held out")
    return {"pairs": len(train), "test_pairs": len(test), **template_counts, **metrics}


def as_the_template_allows(
    job: Job, train: list[Pair], test: list[Pair]
) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """The pairs that the chat template renders, what it refuses, and the marks of turns in training pairs."""
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"]})
    given = job.config.data.preferences
    source = job.config.data.replies if given.path is None else given
    train, refused = chat.accepted(tokenizer, train, source, Pair.dialogues)
    test, held_out_refused = chat.accepted(tokenizer, test, source, Pair.dialogues)
    prompts = [prompt for pair in train for prompt in pair.different_prompts()]
    removed = chat.marks_removed(
        tokenizer, prompts, [reply for pair in train for reply in (pair.chosen, pair.rejected)]
    )
    if removed or refused:
        count = sum(refused.values())
        job.say(f"{removed:,} turn marks were removed from the training text; the template refuses {count:,} pairs")
    counts = {"refused_by_template": refused, "eval_refused_by_template": held_out_refused}
    return train, test, {"marks_removed": removed, **counts}


def given(job: Job) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """The pairs of `data.preferences`; training pairs whose prompt is held out are dropped and counted."""
    loaded = {split: reading.load(job.config.data.preferences, split) for split in ("train", "test")}
    config = job.config.comparisons
    train, test = (pairs_of(loaded[split].rows, config.seed, split == "test") for split in ("train", "test"))
    kept = not_held_out(train, test)
    noisy, flipped = pairing.with_label_noise(kept, config.label_noise, np.random.default_rng(config.seed))
    unusable = {split: dict(rows.unusable) for split, rows in loaded.items()}
    held_out = loaded["test"].rows
    if held_out and "label" in held_out[0] and len(held_out) > 2 * len(test):
        unusable["test"]["no reply of the other label is left for it"] = {"count": len(held_out) - 2 * len(test)}
    counts = {"dropped_held_out_prompt": len(train) - len(kept), "labels_flipped": flipped}
    return noisy, test, counts | {"unusable": unusable}


def pairs_of(rows: list[dict[str, Any]], seed: int, once: bool) -> list[Pair]:
    """The pairs of preference rows; replies labelled one by one are matched at random (see `matched`)."""
    if rows and "label" in rows[0]:
        return preferences.matched([(row["prompt"], row["reply"], row["label"]) for row in rows], seed, once)
    return [Pair(row["prompt"], row["chosen"], row["rejected"], row.get("margin"), "dataset") for row in rows]


def not_held_out(train: list[Pair], test: list[Pair]) -> list[Pair]:
    """The training pairs of whose prompts none is held out, begins one that is, or continues one."""
    held_out = [prompt for pair in test for prompt in pair.different_prompts()]
    chosen, rejected = (overlapping([pair.prompts()[side] for pair in train], held_out) for side in (0, 1))
    return [pair for pair, *overlaps in zip(train, chosen, rejected, strict=True) if not any(overlaps)]


def earlier_pairs(job: Job, test: list[Pair]) -> tuple[list[Pair], int]:
    """The training pairs of `comparisons.earlier` whose prompts are not held out here, and how many are."""
    pairs = [pair for folder in job.config.comparisons.earlier for pair in preferences.read(Path(folder), "train")]
    kept = not_held_out(pairs, test)
    return kept, len(pairs) - len(kept)


def made(job: Job) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """Pairs of samples of the SFT model (and of other policies), and of two people's replies to one context.

    Labelled by the judge or by the order of the policies, or left in pool.jsonl for people to label.
    """
    config, generator = job.config.comparisons, np.random.default_rng(job.config.comparisons.seed)
    judge = rewards.load(config.judge, rewards.GIVEN["comparisons"]) if config.label_by == "judge" else None
    sampled, held_out, left_out = sampled_answers(job)
    train, kept, unscored = paired(job, sampled, judge, generator)
    test, _, unscored_held_out = paired(job, held_out, judge, generator)
    pool = write_pool(job.out / "pool.jsonl", train, test, generator)
    metrics: dict[str, Any] = {"pool": pool, "kept_share": kept, **left_out}
    if config.label_by == "people":
        job.say(f"{pool:,} pairs to compare; label them with: make label ARGS=run={job.config.run}")
        return [], [], metrics
    samples_unscored = unscored + unscored_held_out
    require_scores(samples_unscored, sum(map(len, sampled + held_out)))
    human, human_kept, human_unscored = people(job, judge, generator) if judge else ([], 0.0, 0)
    if samples_unscored + human_unscored:
        job.say(f"{samples_unscored:,} samples and {human_unscored:,} replies of people have no score of the judge")
    labels = [pairing.labelled(c, "samples") for c in train] + human
    tested = [pairing.labelled(c, "samples") for c in test]
    kept_apart = not_held_out(labels, tested)
    noisy, flipped = pairing.with_label_noise(kept_apart, config.label_noise, np.random.default_rng(config.seed))
    gaps = [abs(c.gap) for c in train if c.gap is not None]
    metrics |= {
        "samples_unscored": samples_unscored,
        "people_unscored": human_unscored,
        "pairs_from_people": len(human),
        "kept_share_people": human_kept,
        "gap_deciles": np.quantile(gaps, np.linspace(0, 1, 11)).tolist() if gaps else [],
        "labels_flipped": flipped,
        "dropped_held_out_prompt": len(labels) - len(kept_apart),
    }
    return noisy, tested, metrics


def require_scores(unscored: int, samples: int) -> None:
    """Raises `UserError` where the judge gives no sample a score, so that no pair can be labelled."""
    if samples and unscored == samples:
        raise UserError(
            f"comparisons.judge: gives no score (None) to any of {samples:,} samples; choose one that applies"
        )


def sampled_answers(job: Job) -> tuple[list[list[Answer]], list[list[Answer]], dict[str, Any]]:
    """Replies of every policy, grouped by prompt, for training and held-out prompts.

    Also returns, as metrics, how many did not end or have no text, and what of each split is not used, by reason.
    Replies without an end token are left out, as the token would have to be made up, and those that the chat template
    does not write as they were sampled.
    """
    config, source, dialogue = job.config.comparisons, job.config.data.replies, job.config.data.dialogue
    replying = policies(job)
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"], **replying})
    model = loading.load_policy(job.inputs["sft"], "meta")
    train = reading.draw(reading.prompts(source, "train", dialogue), config.prompts, config.seed)
    held_out = reading.draw(reading.prompts(source, "validation", dialogue), config.eval_prompts, config.seed)
    unusable = {split: reading.left_out(source, split, dialogue, once=True) for split in ("train", "validation")}
    (train, refused), (held_out, held_out_refused) = (chat.accepted(tokenizer, e, source) for e in (train, held_out))
    unusable["train"] |= template.counted(refused)
    unusable["validation"] |= template.counted(held_out_refused)
    drawn = len(train), len(held_out)
    train, held_out = (with_room(examples, tokenizer, model, job.config.sampling) for examples in (train, held_out))
    for split, before, after in zip(unusable, drawn, (train, held_out), strict=True):
        if before > len(after):
            unusable[split]["prompt leaves no room for a reply"] = {"count": before - len(after)}
    asked = [example for example in train + held_out for _ in range(config.samples_per_prompt)]
    ids = [chat.prompt_ids(tokenizer, example.prompt) for example in asked]
    total, limits = len(asked) * len(replying), job.config.sampling
    read = sum(map(len, ids))
    shape = (limits.batch_size, read // max(1, len(ids)))
    work = Work(0, read * len(replying), total * limits.max_new_tokens, shape, limits.batch_size)
    policy = loading.load_policy(job.inputs["sft"], job.device.type)
    job.announce(f"{total:,} samples for {len(train) + len(held_out):,} prompts", None, policy, work)
    bar, unfinished, empty = job.progress(total, "samples"), 0, 0
    groups: list[list[Answer]] = [[] for _ in train + held_out]
    rewritten: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
    for number, (name, folder) in enumerate(replying.items()):
        numbers = sampler.random_numbers(config.seed + number, len(ids), job.config.sampling)
        policy = loading.load_policy(folder, job.device.type)
        for i, reply in enumerate(sampler.sample(policy, ids, job.config.sampling, tokenizer, numbers, bar)):
            unfinished += not reply.ended
            text = chat.reply_text(tokenizer, reply.ids)
            empty += reply.ended and not text
            group = i // config.samples_per_prompt
            if reply.ended and text and (reason := chat.refusal(tokenizer, asked[i].prompt, text)):
                rewritten["train" if group < len(train) else "validation"][reason] += 1
            elif reply.ended and text:
                groups[group].append(Answer(asked[i].prompt, text, name))
    bar.close()
    for split, reasons in rewritten.items():
        unusable[split] |= {f"a sample cannot be written as it is: {why}": {"count": n} for why, n in reasons.items()}
    metrics = {"samples_without_end": unfinished, "samples_empty": empty, "unusable": unusable}
    return groups[: len(train)], groups[len(train) :], metrics


def policies(job: Job) -> dict[str, Path]:
    """The folders of the policies that reply, by their names."""
    config = job.config.comparisons
    folders = {policy_name(folder): Path(folder) for folder in config.policies}
    return {"sft": job.inputs["sft"], **folders} if config.sft else folders


def with_room(examples: list[Example], tokenizer: Any, model: Any, limits: Any) -> list[Example]:
    """The examples whose prompts leave room for a reply."""
    ids = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    return [examples[i] for i in sampler.with_room(ids, model, limits)]


def paired(
    job: Job, groups: list[list[Answer]], judge: Any, generator: np.random.Generator
) -> tuple[list[Candidate], float, int]:
    """The pairs that `pairing` takes from the answers to each prompt, and the share of pairs that is usable.

    Also returns how many answers the judge gives no score (None): these take no part.
    """
    config = job.config.comparisons
    judged = pairing.judged(groups, judge) if judge else [None] * len(groups)
    if config.label_by == "order":
        judged = pairing.ranked(groups, list(policies(job)))
    scored = member_scores(job, groups) if config.scorer else [None] * len(groups)
    pairs, possible, good = [], 0, 0
    for group, by_judge, by_model in zip(groups, judged, scored, strict=True):
        every = pairing.candidates(group, by_judge, by_model)
        able = [candidate for candidate in every if pairing.usable(candidate, config.min_gap)]
        pairs += pairing.taken(able, config.pairs_per_prompt, config.pairing, generator)
        possible, good = possible + len(every), good + len(able)
    unscored = sum(score is None for group in judged if group is not None for score in group)
    return pairs, good / max(1, possible), unscored


def member_scores(job: Job, groups: list[list[Answer]]) -> list[np.ndarray]:
    """By group: the normalised scores [answers, members] of each member of the reward model `comparisons.scorer`."""
    folder = Path(cast(str, job.config.comparisons.scorer))
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"], "comparisons.scorer": folder})
    scorer = ensemble.load(folder, job.device.type)
    if job.config.comparisons.pairing == "uncertain" and len(scorer.members) < 2:
        raise UserError(
            f"comparisons.scorer={folder}: is one model; pairing=uncertain needs reward.ensemble >= 2 there"
        )
    rows = (chat.row_ids(tokenizer, answer.prompt, answer.reply) for group in groups for answer in group)
    ids = [prompt + reply for prompt, [reply] in rows]
    bar = job.progress(len(ids) * len(scorer.members), "samples", part="scores")
    rows = iter(scorer.member_scores(ids, tokenizer.pad_token_id, bar=bar).T.cpu().numpy())
    bar.close()
    return [np.array([next(rows) for _ in group]) for group in groups]


def people(job: Job, judge: Any, generator: np.random.Generator) -> tuple[list[Pair], float, int]:
    """At most `human_pairs` pairs of two people's replies to one context, and the other figures of `paired`."""
    source, dialogue = job.config.data.replies, job.config.data.dialogue
    groups = reading.replies_by_prompt(reading.training_examples(source, dialogue)).values()
    answers = [[Answer(e.prompt, e.reply, "people") for e in group] for group in groups]
    pairs, kept, unscored = paired(job, answers, judge, generator)
    return [pairing.labelled(c, "people") for c in pairs[: job.config.comparisons.human_pairs]], kept, unscored


def write_pool(file: Path, train: list[Candidate], test: list[Candidate], generator: np.random.Generator) -> int:
    """Different pairs without labels, the replies of each in an order drawn at random; returns how many."""
    both = [(candidate, "train") for candidate in train] + [(candidate, "test") for candidate in test]
    swaps = generator.random(len(both)) < 0.5
    rows = [pairing.pool_row(c, split, bool(swap)) for (c, split), swap in zip(both, swaps, strict=True)]
    distinct = list({row["pair"]: row for row in rows}.values())
    write_lines(file, distinct)
    return len(distinct)
