"""Stage `evaluate`: the models of the run reply to the same held-out prompts, judged by two judges."""

from typing import Any

import numpy as np
from omegaconf import OmegaConf

import rewards
from pipeline import (
    arena,
    chat,
    contamination,
    data,
    ensemble,
    held_out,
    likelihood,
    models,
    sampling,
    statistics,
    suites,
)
from pipeline.artifact import read_lines, write_lines
from pipeline.data import Example
from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.sources import is_task
from rewards import RewardFunction
from rewards.learned import learned
from rewards.repetition import repeated_share
from stages import MODELS

GREEDY = {"temperature": 1e-4}  # at which the most likely token is all but certain


def run(job: Job) -> dict[str, Any]:
    """Sample, judge, and compare with people's own replies; all replies are left in samples.jsonl."""
    config = job.config.evaluate
    stages = {name: stage for name, stage in MODELS.items() if name in config.models}
    tokenizer = chat.require_same_template({s: folder for s, folder in job.inputs.items() if s != "comparisons"})
    reference = models.load_policy(job.inputs["sft"], job.device.type)
    examples = held_out.prompts(job, tokenizer, reference, config.prompts, config.seed)
    tasks = suites.prepared(job, tokenizer, reference, ways(job))
    examples, contaminated, counted = checked_for_copies(job, examples, tasks)
    problems = sum(len(suite.problems) for suite in tasks.values())
    announce(job, len(examples), problems, reference)
    judges = [rewards.load(config.judge), rewards.load(config.second_judge)]
    proxy = None
    if "reward" in job.inputs:
        proxy = learned(ensemble.load(job.inputs["reward"], job.device.type), tokenizer)
    texts = held_out.first_texts(
        data.texts(data.load(job.config.data.text, "test").rows), tokenizer, config.text_tokens
    )
    bar = job.progress((len(stages) + (config.best_of or 0)) * len(examples) + len(stages) * problems, "replies")
    found, replies, proxies, answers = {}, {}, {}, {}
    if not is_task(job.config.data.replies.path):  # of a generated problem nobody has written the answer
        found["human"], replies["human"] = {}, [example.reply for example in examples]
    for name, stage in stages.items():
        policy = models.load_policy(job.inputs[stage], job.device.type)
        found[name], replies[name], by_proxy = measured(job, policy, reference, proxy, judges[0], tokenizer, examples)
        found[name]["text_bits_per_byte"] = held_out.text_bits_per_byte(
            policy, tokenizer, texts, job.config.pretrain.context
        )  # as pretraining measures it: what alignment took from the language model
        if by_proxy is not None:
            proxies[name] = by_proxy
        in_tasks = {task: suites.answered(suite, policy, tokenizer) for task, suite in tasks.items()}
        found[name]["tasks"] = {task: metrics for task, (metrics, _) in in_tasks.items()}
        answers[name] = {task: replied for task, (_, replied) in in_tasks.items()}
        bar.update(len(examples) + problems)
    if config.best_of is not None:
        name = f"best_of_{config.best_of}"
        found[name], replies[name], proxies[name] = best_of(job, reference, proxy, tokenizer, examples, bar)
    bar.close()
    golds, seconds = ({name: judged_by(judge, examples, texts) for name, texts in replies.items()} for judge in judges)
    for name in replies:
        found[name] = judged(job, replies[name], golds[name], seconds[name]) | found[name]
    by_judge = {"gold": golds, "second": seconds} | ({"reward_model": proxies} if proxies else {})
    write_lines(job.out / "samples.jsonl", sample_rows(examples, replies, by_judge))
    write_lines(job.out / "tasks.jsonl", suites.rows(tasks, answers))
    return {f"{name}_gold_mean": found[name]["gold_mean"] for name in ("ppo",) if name in found} | {
        "models": found,
        "contamination": contaminated,
        "tasks": {name: suites.described(suite) | {"contamination": counted[name]} for name, suite in tasks.items()},
        "arena": {judge: in_arena(job, scores, replies) for judge, scores in by_judge.items()},
        "prompts": len(examples),
        "judge": rewards.name(config.judge).rpartition(":")[2],
        "second_judge": rewards.name(config.second_judge).rpartition(":")[2],
        "shown": config.samples_shown,
    }


def measured(
    job: Job, policy: Any, reference: Any, proxy: RewardFunction | None, judge: RewardFunction, tokenizer: Any,
    examples: list[Example],
) -> tuple[dict[str, Any], list[str], list[float] | None]:  # fmt: skip
    """What is measured of a model itself, its sampled replies, and their scores by `proxy`, PPO's reward model."""
    sampled = sample(job, policy, tokenizer, examples, job.config.sampling)
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    ids = [reply.ids for reply in sampled]
    texts = [chat.reply_text(tokenizer, reply) for reply in ids]
    metrics = {
        "ended_share": float(np.mean([reply.ended for reply in sampled])),
        "kl": likelihood.kl(policy, reference, prompts, ids, job.config.sampling.temperature, tokenizer.pad_token_id),
        "reply_bits_per_byte": held_out.reply_bits_per_byte(
            policy, tokenizer, examples, policy.config.max_position_embeddings
        ),
    }
    by_proxy = None
    if proxy is not None:
        by_proxy = proxy([e.prompt for e in examples], texts, prompt_ids=prompts, completion_ids=ids)
        metrics["proxy_mean"] = float(np.mean(by_proxy))
    if job.config.evaluate.greedy:
        greedy = sample(job, policy, tokenizer, examples, ways(job)["greedy_"])
        gold = judged_by(judge, examples, [chat.reply_text(tokenizer, reply.ids) for reply in greedy])
        metrics |= with_interval("greedy_gold", gold, job.config.evaluate)
    return metrics, texts, by_proxy


def best_of(
    job: Job, policy: Any, proxy: RewardFunction, tokenizer: Any, examples: list[Example], bar: Any
) -> tuple[dict[str, Any], list[str], list[float]]:
    """Best-of-n: of `evaluate.best_of` samples of the SFT model the one that the reward model scores highest.

    Returns what is measured of it, the replies, and their scores. Its KL to the SFT model is at most
    log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879), which is what is reported.
    """
    count, config = job.config.evaluate.best_of, job.config.evaluate
    asked = [example for example in examples for _ in range(count)]
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in asked]
    numbers = sampling.random_numbers(config.seed + 1, len(prompts), job.config.sampling)
    sampled = sampling.sample(policy, prompts, job.config.sampling, tokenizer, numbers, bar)
    texts = [chat.reply_text(tokenizer, reply.ids) for reply in sampled]
    ids = {"prompt_ids": prompts, "completion_ids": [reply.ids for reply in sampled]}
    scores = proxy([e.prompt for e in asked], texts, **ids)
    best = [start + int(np.argmax(scores[start : start + count])) for start in range(0, len(asked), count)]
    chosen = [scores[i] for i in best]
    metrics = {
        "ended_share": float(np.mean([sampled[i].ended for i in best])),
        "kl": float(np.log(count) - (count - 1) / count),
        "proxy_mean": float(np.mean(chosen)),
    }
    return metrics, [texts[i] for i in best], chosen


def sample_rows(
    examples: list[Example], replies: dict[str, list[str]], by_judge: dict[str, dict[str, list[float | None]]]
) -> list[dict[str, Any]]:
    """A row for each prompt: it, and of each model the reply with the score of every judge that has one."""
    rows = []
    for i, example in enumerate(examples):
        said = {
            name: {"reply": texts[i]} | {judge: scores[name][i] for judge, scores in by_judge.items() if name in scores}
            for name, texts in replies.items()
        }
        rows.append({"prompt": example.prompt, **said})
    return rows


def in_arena(job: Job, scores: dict[str, list[float | None]], replies: dict[str, list[str]]) -> dict[str, Any]:
    """The arena of one judge: of each two models' replies to a prompt the one that it scores higher wins."""
    config = job.config.evaluate
    anchor = "sft" if "sft" in scores else next(iter(scores))
    lengths = {name: [len(text) for text in replies[name]] for name in scores}
    return arena.summary(scores, lengths, anchor, config.bootstrap, config.seed)


def judged(job: Job, replies: list[str], gold: list[float | None], second: list[float | None]) -> dict[str, Any]:
    """What the judges' scores of one model's replies, and the replies as text, come to."""
    return with_interval("gold", gold, job.config.evaluate) | {
        "second_judge_mean": float(np.mean(applicable(second, "second_judge"))),
        "length": float(np.mean([len(text) for text in replies])),
        "distinct_2": distinct_n(replies, 2),
        "repetition": float(np.mean([repeated_share(text, 3) for text in replies])),
    }


def with_interval(name: str, scores: list[float | None], config: Any) -> dict[str, Any]:
    """The mean of the gold judge's scores and its bootstrap 95 % interval over prompts."""
    found = applicable(scores, "judge")
    interval = statistics.mean_interval(found, config.bootstrap, config.seed)
    return {f"{name}_mean": float(np.mean(found)), f"{name}_ci95": interval}


def ways(job: Job) -> dict[str, Any]:
    """How replies are sampled, by the prefix of their metrics: as everywhere, and greedily where that is asked for."""
    greedy = {"greedy_": OmegaConf.merge(job.config.sampling, GREEDY)} if job.config.evaluate.greedy else {}
    return {"": job.config.sampling} | greedy


def announce(job: Job, prompts: int, problems: int, model: Any) -> None:
    """One line: device, precision, what is sampled, and the time that sampling and four passes over it may take."""
    compared = len(set(job.config.evaluate.models))
    replies = (compared + (job.config.evaluate.best_of or 0)) * prompts + compared * problems
    flops = 2 * 6 * models.parameter_count(model) * replies * job.config.sampling.max_new_tokens
    asked = f"{prompts} held-out prompts" + (f" and {problems:,} problems" if problems else "")
    job.announce(f"{replies:,} replies of {compared} models to {asked}", None, flops)


def checked_for_copies(
    job: Job, examples: list[Example], tasks: dict[str, suites.Suite]
) -> tuple[list[Example], dict[str, Any], dict[str, dict[str, Any]]]:
    """Counts of prompts (with their replies) and of each task's problems that occur in what each stage was trained on.

    Returns the prompts, their counts, and those of each task; where asked for, what occurs is left out of both.
    """
    texts = {"prompts": [spoken(e.prompt, e.reply) for e in examples]}
    texts |= {f"tasks.{name}": [suites.sought(p) for p in suite.problems] for name, suite in tasks.items()}
    found = contamination.against(texts, trained_on(job))
    examples, counts = without_copies(job, "prompts", examples, *found["prompts"])
    by_task = {}
    for name, suite in tasks.items():
        suite.problems, by_task[name] = without_copies(
            job, f"problems of evaluate.tasks.{name}", suite.problems, *found[f"tasks.{name}"]
        )
    return examples, counts, by_task


def without_copies(
    job: Job, what: str, items: list[Any], counts: dict[str, Any], flags: np.ndarray
) -> tuple[list[Any], dict[str, Any]]:
    """The items and their counts; with `evaluate.remove_contaminated` without those flagged."""
    if not job.config.evaluate.remove_contaminated:
        return items, counts
    kept = [item for item, flag in zip(items, flags, strict=True) if not flag]
    if len(kept) < 2:
        raise UserError(f"evaluate.remove_contaminated=true: leaves {len(kept)} of {len(items)} {what}")
    return kept, counts | {"removed": len(items) - len(kept)}


def trained_on(job: Job) -> dict[str, list[str]]:
    """The texts that each training stage saw, by its name."""
    source, dialogue = job.config.data.replies, job.config.data.dialogue
    trained = {
        "pretrain": data.texts(data.load(job.config.data.text, "train").rows),
        "sft": [spoken(e.prompt, e.reply) for e in data.training_examples(source, dialogue)],
    }
    if "comparisons" in job.inputs:
        pairs = read_lines(job.inputs["comparisons"] / "train.jsonl")
        sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
        trained["comparisons"] = [spoken(pair["prompt"], pair[side]) for pair, side in sides]
    return trained


def spoken(prompt: list[dict[str, str]], reply: str) -> str:
    """A prompt without system messages, and its reply, as one text."""
    return "\n".join([*(m["content"] for m in prompt if m["role"] != "system"), reply])


def sample(job: Job, policy: Any, tokenizer: Any, examples: list[Example], how: Any) -> list[sampling.Reply]:
    """One reply to each prompt, sampled as `how` says."""
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    numbers = sampling.random_numbers(job.config.evaluate.seed, len(prompts), how)
    return sampling.sample(policy, prompts, how, tokenizer, numbers)


def judged_by(judge: RewardFunction, examples: list[Example], replies: list[str]) -> list[float | None]:
    """A judge's score of each reply; it gets the data's own reply as `answer`."""
    return judge([e.prompt for e in examples], replies, answer=[e.reply for e in examples])


def applicable(scores: list[float | None], judge: str) -> list[float]:
    """The scores that are not None. Raises `UserError` when the judge applies to no reply."""
    found = [score for score in scores if score is not None]
    if not found:
        raise UserError(f"evaluate.{judge}: applies to none of the replies; choose a judge that does")
    return found


def distinct_n(texts: list[str], n: int) -> float:
    """Different word n-grams as a share of all, over all replies together (Li et al. 2016); 1 is no repetition."""
    words = [text.lower().split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
