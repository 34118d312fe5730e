"""Stage `reward`: a reward model on pairwise comparisons with TRL's RewardTrainer, measured against baselines."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from pipeline import baselines, chat, likelihood, lora, models, preferences, sampling, statistics, training
from pipeline.job import Job
from pipeline.preferences import Pair


def run(job: Job) -> dict[str, Any]:
    """Train from the SFT model, normalise the scores on its samples, and measure held-out accuracy."""
    config = job.config.reward
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"]})
    train, test = preferences.load(job.inputs["comparisons"], tokenizer, config.max_length)
    model = with_score_head(job, tokenizer)
    ordered = train.take(training.in_order(train.lengths(), config.batch_size, config.epochs, config.seed))
    steps = max(1, len(ordered.rows) // config.batch_size)
    tokens = sum(len(s) for row in ordered.rows for s in sequences(row))
    job.announce(f"{tokens // steps:,} tokens", steps, 6 * models.parameter_count(model) * tokens)
    model = fit(job, model, tokenizer, ordered.rows, steps)
    normalise(job, model.eval(), tokenizer, test.pairs)
    models.save(model, tokenizer, job.out)
    chosen, rejected = test_scores(model, tokenizer, test.rows)
    return metrics(chosen, rejected, train.pairs, test.pairs) | {
        "score_mean": model.config.score_mean,
        "score_std": model.config.score_std,
        "pairs": len(train.pairs),
        "dropped_too_long": train.dropped + test.dropped,
        "template_hash": chat.template_hash(tokenizer),
    }


def with_score_head(job: Job, tokenizer: Any) -> torch.nn.Module:
    """The SFT model with a linear score in place of its output layer, initialised with std 1/sqrt(width + 1).

    Source of the initialisation: Huang et al. 2024, arXiv 2403.17031, detail 8. Dropout is off in every model here.
    """
    torch.manual_seed(job.config.reward.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        job.inputs["sft"], num_labels=1, dtype=torch.float32, use_safetensors=True
    )
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def sequences(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt with chosen reply, and prompt with rejected reply."""
    return row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]


def fit(
    job: Job, model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, list[int]]], steps: int
) -> torch.nn.Module:
    """Train with TRL on rows that are already tokenised; LoRA adapters are merged, and left in adapter/ as well."""
    config = job.config.reward
    arguments = RewardConfig(
        **training.arguments(job, config.batch_size, steps, config.seed),
        **training.linear_schedule(config.learning_rate, config.warmup, steps),
        gradient_checkpointing=False,
        center_rewards_coefficient=config.center_coef or None,
        max_length=None,
    )
    columns = [dict(zip(("chosen_ids", "rejected_ids"), sequences(row), strict=True)) for row in rows]
    peft_config = None
    if config.lora_rank is not None:
        options = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
        peft_config = lora.adapter_config(model, config.lora_rank, config.lora_alpha, **options)
    trainer = RewardTrainer(
        model, arguments, train_dataset=Dataset.from_list(columns), processing_class=tokenizer, peft_config=peft_config
    )
    training.train(trainer, job, config.batch_size, "pairs")
    if peft_config is None:
        return model
    trainer.model.save_pretrained(job.out / "adapter")
    return trainer.model.merge_and_unload()


def normalise(job: Job, model: torch.nn.Module, tokenizer: Any, test: list[Pair]) -> None:
    """Store mean and spread of the scores on the SFT model's own samples in the model's configuration."""
    policy = models.load_policy(job.inputs["sft"], job.device.type)
    distinct = list({str(pair.prompt): pair.prompt for pair in test}.values())[:NORMALISED_ON]
    prompts = [chat.prompt_ids(tokenizer, prompt) for prompt in distinct]
    prompts = [prompts[i] for i in sampling.with_room(prompts, policy, job.config.sampling)]
    numbers = sampling.random_numbers(job.config.reward.seed, len(prompts), job.config.sampling)
    replies = sampling.sample(policy, prompts, job.config.sampling, tokenizer, numbers)
    full = [prompt + reply.ids for prompt, reply in zip(prompts, replies, strict=True)]
    scores = torch.tensor(likelihood.scores(model, full, tokenizer.pad_token_id))
    model.config.score_mean = scores.mean().item()
    model.config.score_std = max(scores.std().item(), 1e-6)


NORMALISED_ON = 256  # prompts


def test_scores(
    model: torch.nn.Module, tokenizer: Any, rows: list[dict[str, list[int]]]
) -> tuple[list[float], list[float]]:
    """Normalised scores of the chosen and of the rejected replies."""
    both = [s for row in rows for s in sequences(row)]
    raw = likelihood.scores(model, both, tokenizer.pad_token_id)
    scores = [(s - model.config.score_mean) / model.config.score_std for s in raw]
    return scores[0::2], scores[1::2]


def metrics(chosen: list[float], rejected: list[float], train: list[Pair], test: list[Pair]) -> dict[str, Any]:
    """Held-out accuracy with its interval, beside what length and a bag of words reach from the same pairs."""
    right = [float(c > r) + 0.5 * float(c == r) for c, r in zip(chosen, rejected, strict=True)]
    known, new = ([(pair.chosen, pair.rejected) for pair in pairs] for pairs in (train, test))
    return {
        "accuracy": sum(right) / len(right),
        "accuracy_ci95": statistics.share_interval(sum(right), len(right)),
        "accuracy_length_only": baselines.length_accuracy(known, new),
        "accuracy_bag_of_words": baselines.bag_of_words_accuracy(known, new),
        "test_pairs": len(test),
        "chosen_score_mean": sum(chosen) / len(chosen),
        "rejected_score_mean": sum(rejected) / len(rejected),
    }
