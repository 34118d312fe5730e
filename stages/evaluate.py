"""Stage `evaluate`: the models of the run reply to the same held-out prompts, judged by two judges."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from threefold import rewards
from threefold.data import reading
from threefold.data.files import is_task
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import arena, contamination, held_out, judge_model, measuring, statistics
from threefold.evaluation.measuring import Played, Shared
from threefold.evaluation.players import MODELS, Player, most_samples, player, policy_name
from threefold.evaluation.tasks import Task
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.fileio import read_json, read_lines, write_lines
from threefold.models import chat, ensemble, loading
from threefold.rewards import RewardFunction
from threefold.rewards.learned import learned
from threefold.rewards.repetition import repeated_share


def run(job: Job) -> dict[str, Any]:
    """Sample, judge, and compare with people's own replies; all replies are left in samples.jsonl."""
    config = job.config.evaluate
    taking_part = by_model(config)
    earlier = {policy_name(folder): Path(folder) for folder in config.earlier}
    folders = {name: job.inputs[stage] for name, stage in MODELS.items() if name in taking_part} | earlier
    made = {stage: folder for stage, folder in job.inputs.items() if stage != "comparisons"}
    tokenizer = chat.require_same_template(made | earlier)
    reference = loading.load_policy(job.inputs["sft"], job.device.type)
    smallest = narrowest(reference, earlier)
    drawn, unusable = prompts_of_splits(job, tokenizer, smallest)
    tasks = measuring.prepared_tasks(job, tokenizer, smallest, measuring.sampling_settings(job.config))
    texts = reading.texts(reading.load(job.config.data.text, "test").rows)
    texts = held_out.first_texts(texts, tokenizer, config.text_tokens)
    drawn, texts, contaminated = checked_for_copies(job, drawn, texts, tasks)
    examples = drawn["prompts"]
    problems = sum(len(task.problems) for task in tasks.values())
    announce(job, taking_part, sum(map(len, drawn.values())), problems, reference)
    if config.judge_model.path is not None:
        judge_model.check(config.judge_model, job.config.tokenizer.template_date)
    judges = [rewards.load(config.judge), rewards.load(config.second_judge)]
    shared = shared_by_all(job, tokenizer, reference, examples, texts, tasks)
    played = played_by_all(shared, folders, taking_part, problems)
    replies = {name: one.replies for name, one in played.items()}
    models, by_judge = results(shared, played, judges)
    for line in without_score(models, len(examples)):
        job.say(line)
    write_replies(shared, played, by_judge)
    wins = {judge: (arena.wins_by_scores(scores), list(scores)) for judge, scores in by_judge.items()}
    further: dict[str, Any] = {}
    if validation := drawn.get("validation_prompts"):
        further["validation"] = on_validation(shared, validation, folders, taking_part, judges)
        further["validation"]["unusable"] = unusable["validation_prompts"]
    if config.judge_model.path is not None:
        wins["judge_model"], further["judge_model"] = by_judge_model(job, examples, replies)
    if "dpo" in replies and "sft" in replies:
        further["dpo_drift"] = dpo_drift(job, replies)
    return ({"ppo_gold_mean": models["ppo"]["gold_mean"]} if "ppo" in models else {}) | {
        "models": models,
        "contamination": contaminated,
        "unusable": unusable["prompts"],
        "tasks": {name: measuring.described(task) for name, task in tasks.items()},
        **further,
        "paired": statistics.paired_tests({judge: by_judge[judge] for judge in ("gold", "second")}, config.seed),
        "arena": {judge: in_arena(counted, players, replies) for judge, (counted, players) in wins.items()},
        "prompts": len(examples),
        "judge": rewards.name(config.judge).rpartition(":")[2],
        "second_judge": rewards.name(config.second_judge).rpartition(":")[2],
        "shown": config.samples_shown,
    }


def prompts_of_splits(
    job: Job, tokenizer: Any, smallest: Any
) -> tuple[dict[str, list[Example]], dict[str, dict[str, dict[str, Any]]]]:
    """`prompts` of the test split and, where asked for, `validation_prompts`; what of each split is not used."""
    config = job.config.evaluate
    asked = {"prompts": (config.prompts, "test"), "validation_prompts": (config.validation_prompts, "validation")}
    drawn, unusable = {}, {}
    for name, (count, split) in asked.items():
        if count:
            drawn[name], unusable[name] = held_out.prompts(job, tokenizer, smallest, count, config.seed, split)
            held_out.require_reply(smallest, tokenizer, drawn[name])
    return drawn, unusable


def shared_by_all(
    job: Job, tokenizer: Any, reference: Any, examples: list[Example], texts: list[str], tasks: dict[str, Task]
) -> Shared:
    """What all models are measured with; the reward model takes part where the run has one."""
    proxy = None
    if "reward" in job.inputs:
        proxy = learned(ensemble.load(job.inputs["reward"], job.device.type), tokenizer)
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    return Shared(job, tokenizer, reference, proxy, examples, prompts, texts, tasks)


def by_model(config: Any) -> dict[str, dict[str, Player]]:
    """The players of each model by their names: those of the run, and one for each policy of another run."""
    taking_part: dict[str, dict[str, Player]] = {}
    for name in config.models:
        entered = player(name, "evaluate.models")
        taking_part.setdefault(entered.model, {})[name] = entered
    earlier = [policy_name(folder) for folder in config.earlier]
    return taking_part | {name: {name: Player(name)} for name in earlier}


def replies_in_all(taking_part: dict[str, dict[str, Player]], prompts: int, problems: int) -> int:
    """How many replies all models together sample; the players of one model choose among the same samples."""
    return sum(most_samples(players) for players in taking_part.values()) * (prompts + problems)


def played_by_all(
    shared: Shared, folders: dict[str, Path], taking_part: dict[str, dict[str, Player]], problems: int
) -> dict[str, Played]:
    """What people and every player reply to the prompts, and to the `problems` of all tasks."""
    job, played = shared.job, {}
    bar = job.progress(replies_in_all(taking_part, len(shared.examples), problems), "replies")
    if not is_task(cast(str, job.config.data.replies.path)):  # of a generated problem nobody has written the answer
        played["human"] = Played([example.reply for example in shared.examples], None, {})
    for model, players in taking_part.items():
        played |= measuring.of_model(shared, folders[model], players, bar)
    bar.close()
    return played


def results(
    shared: Shared, played: dict[str, Played], judges: list[RewardFunction]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float | None]]]]:
    """What is measured of each player, and the score of each of its replies by every judge."""
    golds, seconds = (
        {name: judged_by(judge, shared.examples, one.replies) for name, one in played.items()} for judge in judges
    )
    verdicts = {score for scores in golds.values() for score in scores} <= {0.0, 1.0, None}
    metrics = {
        name: judged(shared.job, one.replies, golds[name], seconds[name], verdicts) | one.metrics
        for name, one in played.items()
    }
    for name, one in played.items():
        if one.greedy:
            metrics[name] |= with_interval("greedy_gold", judged_by(judges[0], shared.examples, one.greedy), verdicts)
    proxies: dict[str, list[float | None]] = {
        name: [*one.proxies] for name, one in played.items() if one.proxies is not None
    }
    return metrics, {"gold": golds, "second": seconds} | ({"reward_model": proxies} if proxies else {})


def without_score(models: dict[str, dict[str, Any]], prompts: int) -> list[str]:
    """A line for each judge that gives some replies no score: how many of whose, which its means leave out."""
    lines = []
    for judge, key in (("gold", "gold_unscored"), ("second", "second_judge_unscored")):
        counts = ", ".join(f"{metrics[key]:,} of {name}" for name, metrics in models.items() if metrics[key])
        if counts:
            lines.append(f"the {judge} judge gives no score to some of {prompts:,} replies each, left out: {counts}")
    return lines


def on_validation(
    shared: Shared, examples: list[Example], folders: dict[str, Path], taking_part: dict[str, dict[str, Player]],
    judges: list[RewardFunction],
) -> dict[str, Any]:  # fmt: skip
    """The same of prompts of the validation split, by which something may be chosen that the test split reports."""
    prompts = [chat.prompt_ids(shared.tokenizer, example.prompt) for example in examples]
    others = replace(shared, examples=examples, prompts=prompts, texts=[], tasks={})
    models, _ = results(others, played_by_all(others, folders, taking_part, 0), judges)
    return {"models": models, "prompts": len(examples)}


def narrowest(reference: Any, earlier: dict[str, Path]) -> Any:
    """Of the models the one that reads the fewest tokens; every model has room for the prompts that it has room for."""
    others = [loading.load_policy(folder, "meta") for folder in earlier.values()]
    return min([reference, *others], key=lambda model: loading.context_length(model.config))


def write_replies(
    shared: Shared, played: dict[str, Played], by_judge: dict[str, dict[str, list[float | None]]]
) -> None:
    """samples.jsonl with the replies to the prompts, tasks.jsonl with those to the problems of tasks."""
    replies = {name: one.replies for name, one in played.items()}
    answers = {name: one.answers for name, one in played.items() if one.answers}
    write_lines(shared.job.out / "samples.jsonl", sample_rows(shared.examples, replies, by_judge))
    write_lines(shared.job.out / "tasks.jsonl", measuring.task_rows(shared.tasks, answers))


def sample_rows(
    examples: list[Example], replies: dict[str, list[str]], by_judge: dict[str, dict[str, list[float | None]]]
) -> list[dict[str, Any]]:
    """A row for each prompt: it, and of each model the reply with the score of every judge that has one."""
    rows = []
    for i, example in enumerate(examples):
        by_model = {
            name: {"reply": texts[i]} | {judge: scores[name][i] for judge, scores in by_judge.items() if name in scores}
            for name, texts in replies.items()
        }
        rows.append({"prompt": example.prompt, **by_model})
    return rows


def in_arena(wins: np.ndarray, models: list[str], replies: dict[str, list[str]]) -> dict[str, Any]:
    """The arena of one judge from wins [P, M, M] of each two models' replies to a prompt, in the order of `models`."""
    anchor = "sft" if "sft" in models else models[0]
    lengths = {name: [len(text) for text in replies[name][: len(wins)]] for name in models}
    return arena.summary(wins, models, lengths, anchor)


def by_judge_model(
    job: Job, examples: list[Example], replies: dict[str, list[str]]
) -> tuple[tuple[np.ndarray, list[str]], dict[str, Any]]:
    """Wins [P, M, M] by the local judge model with their models, and its metrics; verdicts.jsonl has each verdict."""
    config = job.config.evaluate.judge_model
    count = min(config.prompts or len(examples), len(examples))
    different, same = judge_model.pairs(replies, count)
    job.say(f"{2 * len(different):,} questions to the judge model {config.path}")
    bar = job.progress(2 * len(different), "questions")
    judge = judge_model.load(config, job.device, job.config.tokenizer.template_date)
    verdicts, metrics = judge_model.judge(judge, [e.prompt for e in examples], replies, different, bar)
    bar.close()
    write_lines(job.out / "verdicts.jsonl", judge_model.rows(verdicts, config.margin))
    wins = judge_model.wins(verdicts, same, list(replies), count, config.margin)
    return (wins, list(replies)), {"path": config.path, **metrics, "same": len(same), "prompts": count}


def dpo_drift(job: Job, replies: dict[str, list[str]]) -> dict[str, Any]:
    """What became of chosen replies and of length under DPO, with its alarm; says so in one line."""
    of_stage = read_json(job.inputs["dpo"] / "metrics.json")
    metrics = statistics.alarm(of_stage, replies["dpo"], replies["sft"])
    job.say(statistics.alarm_in_words(metrics))
    return metrics


def judged(
    job: Job, replies: list[str], gold: list[float | None], second: list[float | None], verdicts: bool
) -> dict[str, Any]:
    """What the judges' scores of one model's replies, and the replies as text, come to."""
    return with_interval("gold", gold, verdicts) | {
        "gold_unscored": gold.count(None),
        "second_judge_mean": float(np.mean(applicable(second, "second_judge"))),
        "second_judge_unscored": second.count(None),
        "length": float(np.mean([len(text) for text in replies])),
        **{f"distinct_{n}": statistics.distinct_n(replies, n) for n in (1, 2, 3)},
        "self_bleu": statistics.self_bleu(replies, job.config.evaluate.seed),
        "repetition": float(np.mean([repeated_share(text, 3) for text in replies])),
    }


def with_interval(name: str, scores: list[float | None], verdicts: bool) -> dict[str, Any]:
    """The mean of the gold judge's scores and its 95 % interval over prompts; that of `verdicts` is a share's.

    Scores are verdicts where the judge gives nothing but 0 and 1 to the replies of all models. On another scale, scores
    that are all alike have no interval.
    """
    given = applicable(scores, "judge")
    interval = statistics.share_interval(given) if verdicts else statistics.mean_interval(given)
    return {f"{name}_mean": float(np.mean(given)), f"{name}_ci95": interval}


def announce(job: Job, taking_part: dict[str, dict[str, Player]], prompts: int, problems: int, model: Any) -> None:
    """One line: device, precision, what is sampled, and the time that sampling and four passes over it may take."""
    replies = replies_in_all(taking_part, prompts, problems)
    tokens = replies * job.config.sampling.max_new_tokens
    work = Work(0, 5 * tokens, tokens, together=job.config.sampling.batch_size)
    asked = f"{prompts} held-out prompts" + (f" and {problems:,} problems" if problems else "")
    job.announce(f"{replies:,} replies of {len(taking_part)} models to {asked}", None, model, work)


def checked_for_copies(
    job: Job, drawn: dict[str, list[Example]], texts: list[str], tasks: dict[str, Task]
) -> tuple[dict[str, list[Example]], list[str], dict[str, dict[str, Any]]]:
    """How many items of each evaluation set occur in what each stage was trained on.

    The sets are the prompts `drawn` of each split (with their replies), base text, the problems of each task, and the
    pairs that the reward model was tested on. Returns prompts, base text and the counts of all sets; where asked for,
    what occurs is left out of all but the pairs.
    """
    sought = {name: [spoken(e.prompt, e.reply) for e in examples] for name, examples in drawn.items()}
    sought["base_text"] = texts
    sought |= {f"tasks.{name}": [measuring.sought(p) for p in task.problems] for name, task in tasks.items()}
    asked = {name: [spoken(e.prompt) for e in examples] for name, examples in drawn.items()}
    asked |= {f"tasks.{name}": [spoken(p.prompt) for p in task.problems] for name, task in tasks.items()}
    if "comparisons" in job.inputs:
        pairs = read_lines(job.inputs["comparisons"] / "test.jsonl")
        sought["held_out_pairs"] = [spoken(p["prompt"], f"{p['chosen']}\n{p['rejected']}") for p in pairs]
        asked["held_out_pairs"] = [spoken(p["prompt"]) for p in pairs]
    trained = trained_on(job)
    bar = job.progress(sum(map(len, trained.values())), "texts", part="copies")
    checked = contamination.against(sought, trained, asked, prompts_trained_on(job), bar)
    bar.close()
    counts = {name: counts for name, (counts, _) in checked.items()}
    drawn = {name: without_copies(job, name, examples, *checked[name]) for name, examples in drawn.items()}
    texts = without_copies(job, "base_text", texts, *checked["base_text"])
    for name, task in tasks.items():
        task.problems = without_copies(job, f"tasks.{name}", task.problems, *checked[f"tasks.{name}"])
    return drawn, texts, counts


def without_copies(job: Job, name: str, items: list[Any], counts: dict[str, Any], flags: np.ndarray) -> list[Any]:
    """The items of a set; with `evaluate.remove_contaminated` without the flagged [items], whose number is counted."""
    if not job.config.evaluate.remove_contaminated:
        return items
    kept = [item for item, flag in zip(items, flags, strict=True) if not flag]
    if len(kept) < min(2, len(items)):
        raise UserError(f"evaluate.remove_contaminated=true: leaves {len(kept)} of {len(items)} items of {name}")
    counts["removed"] = len(items) - len(kept)
    return kept


def trained_on(job: Job) -> dict[str, list[str]]:
    """The texts that each training stage saw, by its name."""
    source, dialogue = job.config.data.replies, job.config.data.dialogue
    trained = {
        "pretrain": reading.texts(reading.load(job.config.data.text, "train").rows),
        "sft": [spoken(e.prompt, e.reply) for e in reading.training_examples(source, dialogue)],
    }
    if "comparisons" in job.inputs:
        pairs = read_lines(job.inputs["comparisons"] / "train.jsonl")
        sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
        trained["comparisons"] = [spoken(pair["prompt"], pair[side]) for pair, side in sides]
    return trained


def prompts_trained_on(job: Job) -> dict[str, list[str]]:
    """The different prompts that each training stage with prompts saw, by its name."""
    examples = reading.training_examples(job.config.data.replies, job.config.data.dialogue)
    prompts = {"sft": [spoken(e.prompt) for e in examples]}
    if "comparisons" in job.inputs:
        pairs = read_lines(job.inputs["comparisons"] / "train.jsonl")
        prompts["comparisons"] = [spoken(pair["prompt"]) for pair in pairs]
    return {stage: list(dict.fromkeys(texts)) for stage, texts in prompts.items()}


def spoken(prompt: list[dict[str, str]], *reply: str) -> str:
    """A prompt without system messages, and its reply where one is given, as one text."""
    return "\n".join([*(m["content"] for m in prompt if m["role"] != "system"), *reply])


def judged_by(judge: RewardFunction, examples: list[Example], replies: list[str]) -> list[float | None]:
    """A judge's score of each reply; it gets the data's own reply as `answer`."""
    return judge([e.prompt for e in examples], replies, answer=[e.reply for e in examples])


def applicable(scores: list[float | None], judge: str) -> list[float]:
    """The scores that are not None. Raises `UserError` when the judge applies to no reply."""
    given = [score for score in scores if score is not None]
    if not given:
        raise UserError(f"evaluate.{judge}: applies to none of the replies; choose a judge that does")
    return given
