"""Stage `dpo`: direct preference optimisation of the SFT model with TRL's DPOTrainer."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from trl import DPOConfig, DPOTrainer

from pipeline import chat, displacement, likelihood, models, preferences, ranks, statistics, training
from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.preferences import TokenisedPairs


def run(job: Job) -> dict[str, Any]:
    """Train against cached reference log-probabilities, and measure the change of held-out log-probabilities."""
    config = job.config.dpo
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"]})
    share = job.config.data.preferences.max_unusable_share
    train, test = preferences.load(job.inputs["comparisons"], tokenizer, config.max_length, share, "dpo")
    if train.one_by_one:
        raise UserError("dpo: replies that were labelled one by one (format unpaired) are no pairs; leave DPO out")
    model = models.load_policy(job.inputs["sft"])
    ordered = train.take(training.in_order(train.lengths(), config.batch_size, config.epochs, config.seed))
    steps = max(1, len(ordered.rows) // config.batch_size)
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in ordered.rows)
    job.announce(f"{tokens // steps:,} tokens", steps, (6 + 2) * models.parameter_count(model) * tokens)
    training.require_whole_batch(job, len(ordered.rows), config.batch_size)
    model = fit(job, model, tokenizer, ordered, steps)
    if not job.main:
        return {}
    models.save(model, tokenizer, job.out)
    policy, reference = (models.load_policy(folder, job.device.type) for folder in (job.out, job.inputs["sft"]))
    found = metrics(policy, reference, tokenizer.pad_token_id, test.rows, config.beta)
    if found["chosen_falls"]:
        low, high = found["chosen_logprob_change_ci95"]
        change = found["chosen_logprob_change"]
        job.say(f"held-out chosen replies became less likely: {change:+.1f} nats [{low:+.1f}, {high:+.1f}]")
    return found | {
        "pairs": len(train.rows),
        "dropped_too_long": train.dropped + test.dropped,
        "template_hash": chat.template_hash(tokenizer),
    }


def fit(job: Job, model: Any, tokenizer: Any, pairs: TokenisedPairs, steps: int) -> Any:
    """Train with TRL, which renders and tokenises the pairs; reference log-probabilities are computed once and kept.

    Raises `UserError` where TRL's tokens differ from those of the other stages.
    """
    config = job.config.dpo
    arguments = DPOConfig(
        **training.arguments(job, config.batch_size, steps, config.seed),
        **training.linear_schedule(config.learning_rate, config.warmup, steps),
        gradient_checkpointing=False,
        beta=config.beta,
        loss_type=[config.loss_type],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=True,
        max_length=None,
    )
    with ranks.main_first(job):
        train_dataset = on_disk(job, tokenizer, pairs)
    trainer = DPOTrainer(model, args=arguments, train_dataset=train_dataset, processing_class=tokenizer)
    for theirs, ours in zip(trainer.train_dataset, pairs.rows, strict=True):
        if any(theirs[name] != ours[name] for name in ours):
            raise UserError("dpo: this model's chat template writes text after the end token, which DPO would train on")
    return training.train(trainer, job, config.batch_size, "pairs")


def on_disk(job: Job, tokenizer: Any, train: TokenisedPairs) -> Dataset:
    """The pairs as conversations in the checkpoint folder; TRL keeps the reference log-probabilities beside them."""
    folder = job.checkpoints / "pairs"
    if not (folder / "state.json").exists():
        columns = [
            {
                "prompt": chat.without_special(tokenizer, pair.prompt),
                "chosen": chat.without_special(tokenizer, [{"role": "assistant", "content": pair.chosen}]),
                "rejected": chat.without_special(tokenizer, [{"role": "assistant", "content": pair.rejected}]),
            }
            for pair in train.pairs
        ]
        Dataset.from_list(columns).save_to_disk(folder)
    return load_from_disk(folder)


@torch.no_grad()
def metrics(policy: Any, reference: Any, pad: int, rows: list[dict[str, list[int]]], beta: float) -> dict[str, Any]:
    """Accuracy of the implicit reward on held-out pairs, and how log-probabilities moved, in nats per reply."""
    change, prompts = {}, [str(row["prompt_ids"]) for row in rows]
    for side in ("chosen", "rejected"):
        pairs = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
        change[side] = likelihood.replies_logprobs(policy, pairs, pad) - likelihood.replies_logprobs(
            reference, pairs, pad
        )
    right = (change["chosen"] > change["rejected"]).float() + 0.5 * (change["chosen"] == change["rejected"])
    return {
        "accuracy": right.mean().item(),
        "accuracy_ci95": statistics.share_interval(right.tolist(), prompts),
        **displacement.drift({side: moved.tolist() for side, moved in change.items()}, prompts),
        "chosen_tokens": float(np.mean([len(row["chosen_ids"]) for row in rows])),
        "rejected_tokens": float(np.mean([len(row["rejected_ids"]) for row in rows])),
        "reward_margin": beta * (change["chosen"] - change["rejected"]).mean().item(),
        "test_pairs": len(rows),
    }
