"""Stage `dpo`: direct preference optimisation of the SFT model with TRL's DPOTrainer."""

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from trl import DPOConfig, DPOTrainer

from threefold.data.preferences import TokenisedPairs
from threefold.errors import UserError
from threefold.evaluation import statistics
from threefold.execution import ranks
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, likelihood, loading
from threefold.training import hf_trainer
from threefold.training.hf_trainer import load_pairs


def run(job: Job) -> dict[str, Any]:
    """Train against cached reference log-probabilities, and measure the change of held-out log-probabilities."""
    config = job.config.dpo
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"]})
    train, test = load_pairs(job, tokenizer)
    if train.unpaired:
        raise UserError("dpo: replies that were labelled one by one (format unpaired) are no pairs; leave DPO out")
    model = loading.load_policy(job.inputs["sft"])
    hf_trainer.require_whole_batch(job, len(train.rows), config.batch_size)
    batch_size = hf_trainer.rows_of_a_batch(config.batch_size, len(train.rows))
    order = hf_trainer.in_order(train.lengths(), batch_size, config.epochs, config.seed)
    counted = hf_trainer.trained_on(job, [order], len(train.rows), batch_size, "pairs")
    ordered, steps = train.take(order), len(order) // batch_size
    tokens = ordered.tokens()
    # scored by the reference as well; held out, by both
    work = Work(tokens, tokens + 2 * test.tokens(), shape=(2 * batch_size, tokens // len(order) // 2))
    job.announce(f"{tokens // steps:,} tokens", steps, model, work)
    model = fit(job, model, tokenizer, ordered, batch_size, hf_trainer.held_out_rows(job, test.rows, len(order)))
    if not job.main:
        return {}
    loading.save(model, tokenizer, job.out)
    policy, reference = (loading.load_policy(folder, job.device.type) for folder in (job.out, job.inputs["sft"]))
    bar = job.progress(4 * len(test.rows), "replies", part="held out")
    measured = metrics(policy, reference, tokenizer.pad_token_id, test.rows, config.beta, bar)
    bar.close()
    if measured["chosen_falls"]:
        change = measured["chosen_logprob_change"]
        interval = statistics.shown(measured["chosen_logprob_change_ci95"], "+.1f")
        job.say(f"held-out chosen replies became less likely: {change:+.1f} nats {interval}")
    dropped = {"dropped_too_long": train.dropped + test.dropped}
    return measured | counted | dropped | {"template_hash": chat.template_hash(tokenizer)}


class TokenisedTrainer(hf_trainer.Undisturbed, DPOTrainer):
    """TRL's trainer on rows that have their tokens already, with a progress bar of the reference's log-probabilities.

    TRL renders no template, so every stage renders alike.
    """

    def __init__(self, *given: Any, bar: Any, **options: Any):
        self.bar = bar
        super().__init__(*given, **options)
        bar.close()

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed log-probabilities [B] of the chosen and of the rejected replies of one batch."""
        logprobs = super().compute_ref_log_probs(model, inputs)
        self.bar.update(len(logprobs[0]) * self.accelerator.num_processes)
        return logprobs


def fit(job: Job, model: Any, tokenizer: Any, pairs: TokenisedPairs, batch_size: int, held_out: Any = None) -> Any:
    """Train with TRL on pairs that are already tokenised; reference log-probabilities are computed once and kept.

    The loss is measured on rows that are `held_out`, where there are any.
    """
    config, steps = job.config.dpo, len(pairs.rows) // batch_size
    arguments = DPOConfig(
        **hf_trainer.arguments(job, batch_size, steps, config.seed),
        **hf_trainer.linear_schedule(config.learning_rate, config.warmup, steps),
        gradient_checkpointing=False,
        beta=config.beta,
        loss_type=[config.loss_type],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=True,
        max_length=None,
    )
    with ranks.main_first(job):
        rows = on_disk(job, pairs.rows, "pairs")
        measured = on_disk(job, held_out, "held_out") if held_out else None
    bar = job.progress(len(rows) + len(held_out or ()), "pairs", part="reference")
    trainer = TokenisedTrainer(
        model, args=arguments, train_dataset=rows, eval_dataset=measured, processing_class=tokenizer, bar=bar
    )
    return hf_trainer.train(trainer, job, batch_size, "pairs")


def on_disk(job: Job, rows: list[dict[str, list[int]]], name: str) -> Dataset:
    """The pairs' tokens in the checkpoint folder; TRL keeps the reference log-probabilities beside them."""
    folder = job.checkpoints / name
    if not (folder / "state.json").exists():
        Dataset.from_list(rows).save_to_disk(folder)
    return cast(Dataset, load_from_disk(folder))


@torch.no_grad()
def metrics(
    policy: Any, reference: Any, pad: int, rows: list[dict[str, list[int]]], beta: float, bar: Any = None
) -> dict[str, Any]:
    """Accuracy of the implicit reward on held-out pairs, and how log-probabilities moved, in nats per reply."""
    change, prompts = {}, [str(row["prompt_ids"]) for row in rows]
    for side in ("chosen", "rejected"):
        pairs = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
        ours, theirs = (likelihood.replies_logprobs(model, pairs, pad, bar=bar) for model in (policy, reference))
        change[side] = ours - theirs
    right = (change["chosen"] > change["rejected"]).float() + 0.5 * (change["chosen"] == change["rejected"])
    return {
        "accuracy": right.mean().item(),
        "accuracy_ci95": statistics.share_interval(right.tolist(), prompts),
        **statistics.drift({side: moved.tolist() for side, moved in change.items()}, prompts),
        "chosen_tokens": float(np.mean([len(row["chosen_ids"]) for row in rows])),
        "rejected_tokens": float(np.mean([len(row["rejected_ids"]) for row in rows])),
        "reward_margin": beta * (change["chosen"] - change["rejected"]).mean().item(),
        "test_pairs": len(rows),
    }
