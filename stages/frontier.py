"""Stage `frontier`: gold and proxy reward of one method against its KL to the SFT model, on held-out prompts."""

from pathlib import Path
from typing import Any

import numpy as np

from threefold import rewards
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import best_of, held_out
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.fileio import read_json, write_lines
from threefold.models import chat, ensemble, likelihood, loading
from threefold.rewards import RewardFunction
from threefold.rewards.learned import learned
from threefold.sampling import sampler

SCORES = ("gold", "second", "proxy")  # of each prompt in points.jsonl


def run(job: Job) -> dict[str, Any]:
    """Measure every point of `frontier.method`; points.jsonl has each with the scores of every prompt."""
    config = job.config.frontier
    tokenizer = chat.require_same_template({s: folder for s, folder in job.inputs.items() if s != "comparisons"})
    reference = loading.load_policy(job.inputs["sft"], job.device.type)
    examples, unusable = held_out.prompts(job, tokenizer, reference, config.prompts, job.config.evaluate.seed)
    judges = {
        "gold": rewards.load(job.config.evaluate.judge),
        "second": rewards.load(job.config.evaluate.second_judge),
        "proxy": learned(ensemble.load(job.inputs["reward"], job.device.type), tokenizer),
    }
    if config.method == "best_of_n":
        points = best_of_points(job, reference, judges, tokenizer, examples)
    else:
        points = policy_points(job, reference, judges, tokenizer, examples)
    write_lines(job.out / "points.jsonl", points)
    means = [
        {key: float(np.mean(value)) if key in SCORES else value for key, value in point.items()} for point in points
    ]
    return {"points": means, "prompts": len(examples), "unusable": unusable}


def best_of_points(
    job: Job, policy: Any, judges: dict[str, RewardFunction], tokenizer: Any, examples: list[Example]
) -> list[dict[str, Any]]:
    """A point for each n: what the reward model's best of n samples of the SFT model scores on average."""
    count, choices = job.config.frontier.samples, sorted({1, *job.config.frontier.best_of})
    announce(job, policy, count * len(examples))
    asked = [example for example in examples for _ in range(count)]
    _, scores = replies_scored(job, policy, judges, tokenizer, asked)
    rows = [slice(start, start + count) for start in range(0, len(asked), count)]  # of each prompt
    points = []
    for n in choices:
        means = {name: [best_of.expected(scores["proxy"][at], scores[name][at], n) for at in rows] for name in SCORES}
        measured = [best_of.kl_measured(scores["proxy"][at], n) for at in rows]
        points.append({"n": n, "kl": best_of.kl_bound(n), "kl_measured": float(np.mean(measured)), **means})
    return points


def policy_points(
    job: Job, reference: Any, judges: dict[str, RewardFunction], tokenizer: Any, examples: list[Example]
) -> list[dict[str, Any]]:
    """A point for the SFT model, for each snapshot that the method left along its training, and for its end."""
    final = job.inputs[job.config.frontier.method]
    folders = {0: job.inputs["sft"], **snapshots(final)}
    announce(job, reference, len(folders) * len(examples))
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    points = []
    for episodes, folder in folders.items():
        policy = loading.load_policy(folder, job.device.type)
        ids, scores = replies_scored(job, policy, judges, tokenizer, examples)
        kl = likelihood.kl(policy, reference, prompts, ids, job.config.sampling.temperature, tokenizer.pad_token_id)
        points.append({"episodes": episodes, "kl": kl, **scores})
    return points


def snapshots(final: Path) -> dict[int, Path]:
    """Policies along training by the episodes behind them; the last is the artifact itself.

    Where a guard went back to an earlier policy, those after it do not count. DPO counts pairs instead of episodes.
    """
    metrics = read_json(final / "metrics.json")
    done = metrics["episodes"] if "episodes" in metrics else metrics["pairs"]
    kept = {int(folder.name): folder for folder in (final / "snapshots").glob("*")}
    return {episodes: kept[episodes] for episodes in sorted(kept) if episodes < done} | {done: final}


def replies_scored(
    job: Job, policy: Any, judges: dict[str, RewardFunction], tokenizer: Any, asked: list[Example]
) -> tuple[list[list[int]], dict[str, list[float]]]:
    """One sampled reply (token ids) to each prompt, and its scores by judge; `UserError` where one gives none."""
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in asked]
    numbers = sampler.random_numbers(job.config.frontier.seed, len(prompts), job.config.sampling)
    bar = job.progress(len(prompts), "replies")
    ids = [r.ids for r in sampler.sample(policy, prompts, job.config.sampling, tokenizer, numbers, bar)]
    bar.close()
    messages, texts = [e.prompt for e in asked], [chat.reply_text(tokenizer, reply) for reply in ids]
    tokens, answers = {"prompt_ids": prompts, "completion_ids": ids}, {"answer": [e.reply for e in asked]}
    given = {"gold": answers, "second": answers, "proxy": tokens}
    scores: dict[str, list[float]] = {}
    for name, judge in judges.items():
        by_judge = judge(messages, texts, **given[name])
        scores[name] = [score for score in by_judge if score is not None]
        if len(scores[name]) < len(by_judge):
            raise UserError(f"frontier: judge {name} gives no score (None) to a reply; choose one that applies to all")
    return ids, scores


def announce(job: Job, model: Any, replies: int) -> None:
    """One line: device, precision, and what is sampled."""
    tokens = replies * job.config.sampling.max_new_tokens
    work = Work(0, 2 * tokens, tokens, together=job.config.sampling.batch_size)
    job.announce(f"{replies:,} replies for the frontier of {job.config.frontier.method}", None, model, work)
