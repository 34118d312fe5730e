"""Stage `dpo`: preference optimisation of the SFT model with TRL's DPOTrainer or KTOTrainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from threefold.data.preferences import TokenisedPairs
from threefold.errors import UserError
from threefold.evaluation import statistics
from threefold.execution import ranks
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, likelihood, loading
from threefold.schema.stages import BETAS, LABEL_LOSSES
from threefold.training import hf_trainer
from threefold.training.hf_trainer import load_pairs


def run(job: Job) -> dict[str, Any]:
    """Train against a reference, and measure the change of held-out log-probabilities."""
    config, start = job.config.dpo, Path(job.config.dpo.start or job.inputs["sft"])
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"], "dpo.start": start})
    train, test = load_pairs(job, tokenizer)
    of_labels = config.loss_type in LABEL_LOSSES
    if train.unpaired and not of_labels:
        raise UserError(
            "dpo: replies that were labelled one by one (format unpaired) are no pairs; set dpo.loss_type=kto, or "
            "leave DPO out"
        )
    data, unit = (replies_of(train), "replies") if of_labels else (train, "pairs")
    if line := unusual_beta(config):
        job.say(line)
    model = loading.load_policy(start)
    hf_trainer.require_whole_batch(job, len(data.rows), config.batch_size)
    batch_size = hf_trainer.rows_of_a_batch(config.batch_size, len(data.rows))
    order = hf_trainer.in_order(data.lengths(), batch_size, config.epochs, config.seed)
    counted = hf_trainer.trained_on(job, [order], len(data.rows), batch_size, unit)
    ordered, steps = data.take(order), len(order) // batch_size
    tokens = ordered.tokens()
    # scored by the reference, with kto by both on mismatched replies as well; held out, by both
    scored = (1 + 2 * (config.loss_type == "kto")) * tokens + 2 * test.tokens()
    rows = batch_size * (1 if of_labels else 2)
    work = Work(tokens, scored, shape=(rows, tokens // steps // rows))
    job.announce(f"{tokens // steps:,} tokens", steps, model, work)
    reference = None if config.reference_sync_every is None else loading.load_policy(start)
    held_out = None if of_labels else hf_trainer.held_out_rows(job, test.rows, len(order))
    model = fit(job, model, tokenizer, ordered, batch_size, reference, held_out)
    if not job.main:
        return {}
    loading.save(model, tokenizer, job.out)
    measured = measure(job, start, tokenizer, test)
    dropped = {"dropped_too_long": train.dropped + test.dropped}
    return measured | counted | dropped | {"template_hash": chat.template_hash(tokenizer)}


def beta_of(config: Any) -> float:
    """β, which is the usual one of the loss where it is null."""
    return BETAS[config.loss_type] if config.beta is None else config.beta


def unusual_beta(config: Any) -> str:
    """A line on a β that is ten times the usual one of the loss or more, or a tenth or less; empty for others."""
    usual, beta = BETAS[config.loss_type], beta_of(config)
    if usual / 10 < beta < usual * 10:
        return ""
    return f"dpo.beta={beta:g}: dpo.loss_type={config.loss_type} is used with {usual:g}, which dpo.beta=null takes"


def measure(job: Job, start: Path, tokenizer: Any, test: TokenisedPairs) -> dict[str, Any]:
    """What became of held-out replies, told where chosen ones became less likely."""
    policy, reference = (loading.load_policy(folder, job.device.type) for folder in (job.out, start))
    bar = job.progress(4 * len(test.rows), "replies", part="held out")
    measured = metrics(policy, reference, tokenizer.pad_token_id, test.rows, beta_of(job.config.dpo), bar)
    bar.close()
    if measured["chosen_falls"]:
        change = measured["chosen_logprob_change"]
        interval = statistics.shown(measured["chosen_logprob_change_ci95"], "+.1f")
        job.say(f"held-out chosen replies became less likely: {change:+.1f} nats {interval}")
    return measured


@dataclass(frozen=True)
class Replies:
    """Labelled replies with their tokens: prompt_ids, completion_ids, and label, whether the reply is a good one."""

    rows: list[dict[str, Any]]

    def take(self, order: list[int]) -> "Replies":
        """The replies numbered in `order`, in that order."""
        return Replies([self.rows[i] for i in order])

    def lengths(self) -> list[int]:
        """Tokens of each reply with its prompt."""
        return [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in self.rows]

    def tokens(self) -> int:
        """Tokens of all replies with their prompts."""
        return sum(self.lengths())


def replies_of(pairs: TokenisedPairs) -> Replies:
    """The replies of pairs one by one.

    Where replies were labelled one by one, those of the rarer label are in several pairs; here each is there once.
    """
    rows = {}
    for number, row in enumerate(pairs.rows):
        prompts = row["prompt_ids"], row.get("rejected_prompt_ids", row["prompt_ids"])
        for label, prompt, reply in zip((True, False), prompts, (row["chosen_ids"], row["rejected_ids"]), strict=True):
            key = (label, tuple(prompt), tuple(reply)) if pairs.unpaired else (label, number)
            rows[key] = {"prompt_ids": prompt, "completion_ids": reply, "label": label}
    return Replies(list(rows.values()))


class OwnRows:
    """A trainer of TRL on rows that have their tokens already, with a bar of the reference's log-probabilities.

    TRL renders no template, so every stage renders alike.
    """

    def __init__(self, *given: Any, bar: Any, gamma: float | None = None, **options: Any):
        self.bar, self.gamma = bar, gamma
        super().__init__(*given, **options)
        if bar is not None:
            bar.close()

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probabilities [B] of the replies of one batch: chosen and rejected, or matched and mismatched."""
        trainer = cast(Any, self)
        logprobs = cast(Any, super()).compute_ref_log_probs(model, inputs)
        self.bar.update(len(logprobs[0]) * trainer.accelerator.num_processes)
        return logprobs


class PairTrainer(hf_trainer.Undisturbed, OwnRows, DPOTrainer):
    """TRL's DPOTrainer; its loss `sft` is a mean over the tokens of an optimiser step rather than of one pass of it.

    With `gamma` sigmoid_norm becomes SimPO (Meng et al. 2024, arXiv 2405.14734), which has no reference and a target
    margin: β (chosen − rejected) − γ of mean log-probabilities is β ((chosen − γ / β) − (rejected − 0)).
    """

    tokens_of_a_pass: Tensor | None = None

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Summed log-probabilities [B] of chosen and rejected replies; with `gamma` γ / β and 0 for each token."""
        if self.gamma is None:
            return super().compute_ref_log_probs(model, inputs)
        chosen, rejected = inputs["completion_mask"].sum(1).float().chunk(2)
        self.bar.update(len(chosen) * self.accelerator.num_processes)
        return chosen * self.gamma / self.beta, rejected * 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without TRL's rewards/* where there is `gamma`: its sums against γ / β of each token are no rewards."""
        if self.gamma is not None:
            for metrics in self._metrics.values():
                for name in [name for name in metrics if name.startswith("rewards/")]:
                    del metrics[name]
        super().log(logs, start_time)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The passes of one optimiser step; notes how many tokens of chosen replies one has in the mean."""
        passes, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if "sft" in self.loss_types:
            tokens = torch.stack([chosen_tokens(inputs) for inputs in passes]).to(device).float().mean()
            self.tokens_of_a_pass = cast(Tensor, self.accelerator.gather(tokens)).mean()
        return passes, items

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        """The loss of one pass."""
        if self.tokens_of_a_pass is not None:
            share = (chosen_tokens(inputs) / self.tokens_of_a_pass).item() if model.training else 1.0
            weights = zip(self.loss_types, cast(Any, self.args).loss_weights, strict=True)
            self.loss_weights = [weight * share if kind == "sft" else weight for kind, weight in weights]
        return super().compute_loss(model, inputs, *rest, **options)


def chosen_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Tokens of the chosen replies, the first half of a batch of DPOTrainer."""
    return inputs["completion_mask"].chunk(2)[0].sum()


class LabelTrainer(OwnRows, KTOTrainer):
    """TRL's KTOTrainer."""


class KeepReference(TrainerCallback):
    """Makes a reference that moves a part of every checkpoint, so that a resumed training goes on with the same one."""

    def __init__(self, reference: Any, job: Job):
        self.reference, self.job = reference, job

    def _file(self, state: Any) -> Path:
        return self.job.checkpoints / f"checkpoint-{state.global_step}" / "reference.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load the reference of the checkpoint that training continues from."""
        if state.global_step:
            self.reference.load_state_dict(torch.load(self._file(state), weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the reference beside the policy; the checkpoint is marked as complete afterwards."""
        if self.job.main:
            torch.save(self.reference.state_dict(), self._file(state))


def fit(
    job: Job, model: Any, tokenizer: Any, data: TokenisedPairs | Replies, batch_size: int, reference: Any = None,
    held_out: Any = None,
) -> Any:  # fmt: skip
    """Train with TRL on pairs or replies that are already tokenised.

    `reference` is a model where it moves; otherwise it is `model` before training, whose log-probabilities are computed
    once and kept. The loss is measured on rows of pairs that are `held_out`, where there are any.
    """
    rows = with_mismatched(data.rows, batch_size) if job.config.dpo.loss_type == "kto" else data.rows
    kind: Any = PairTrainer if isinstance(data, TokenisedPairs) else LabelTrainer
    gamma = job.config.dpo.simpo_gamma if job.config.dpo.loss_type == "simpo" else None
    with ranks.main_first(job):
        stored = on_disk(job, rows, "pairs")
        measured = on_disk(job, held_out, "held_out") if held_out else None
    unit, options = ("pairs" if kind is PairTrainer else "replies"), arguments(job, kind, len(rows), batch_size)
    total = len(rows) + len(held_out or ())
    bar = job.progress(total, unit, part="reference") if reference is None else None
    trainer = kind(
        model, reference, args=options, train_dataset=stored, eval_dataset=measured, processing_class=tokenizer,
        bar=bar, gamma=gamma,
    )  # fmt: skip
    if reference is not None:
        trainer.add_callback(KeepReference(trainer.accelerator.unwrap_model(trainer.ref_model), job))
    return hf_trainer.train(trainer, job, batch_size, unit)


def with_mismatched(rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The rows, each with KL_completion_ids, a reply to another prompt, by which KTO estimates the KL.

    It is that of the nearest row before in the optimiser step that has another prompt, going round from the first row
    to the last; where all have the same prompt, that of the row before. TRL turns the replies of a pass instead, which
    would make the number of processes count.
    """
    mismatched = []
    for number, row in enumerate(rows):
        first = number - number % batch_size
        step = rows[first : first + batch_size]
        before = [step[(number - first - back) % len(step)] for back in range(1, len(step) + 1)]
        other = next((other for other in before if other["prompt_ids"] != row["prompt_ids"]), before[0])
        mismatched.append(row | {"KL_completion_ids": other["completion_ids"]})
    return mismatched


def arguments(job: Job, kind: Any, rows: int, batch_size: int) -> Any:
    """What a trainer of `kind` is told."""
    config, steps, every = job.config.dpo, rows // batch_size, job.config.dpo.reference_sync_every
    shared: dict[str, Any] = {
        **hf_trainer.arguments(job, batch_size, steps, config.seed),
        **hf_trainer.linear_schedule(config.learning_rate, config.warmup, steps),
        "gradient_checkpointing": False,
        "beta": beta_of(config),
        "precompute_ref_log_probs": every is None,
        "sync_ref_model": every is not None,
        "ref_model_mixup_alpha": config.reference_mixup,
        **({} if every is None else {"ref_model_sync_steps": every}),
    }
    if kind is PairTrainer:
        weights = {"sigmoid_norm" if config.loss_type == "simpo" else config.loss_type: 1.0, **config.loss_weights}
        of_pairs = {"label_smoothing": config.label_smoothing, "ld_alpha": config.ld_alpha, "max_length": None}
        return DPOConfig(**shared, **of_pairs, loss_type=list(weights), loss_weights=list(weights.values()))
    return KTOConfig(
        **shared,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        max_length=config.max_length,  # which cuts mismatched replies that are too long behind their prompts
    )


def on_disk(job: Job, rows: list[dict[str, Any]], name: str) -> Dataset:
    """The rows' tokens in the checkpoint folder; TRL keeps the reference log-probabilities beside them."""
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
        prompt = "rejected_prompt_ids" if side == "rejected" else "prompt_ids"
        pairs = [(row.get(prompt, row["prompt_ids"]), row[f"{side}_ids"]) for row in rows]
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
