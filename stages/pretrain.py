"""Stage `pretrain`: a base model by next-token prediction on packed text, measured in held-out bits per byte."""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_wsd_schedule

from threefold.data import reading
from threefold.evaluation import baselines, held_out
from threefold.execution import ranks
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, loading
from threefold.training import forward, fused, hf_trainer
from threefold.training.muon import MuonAdamW
from threefold.training.packing import EvenedRows, PackedRows, document_start, packed


def run(job: Job) -> dict[str, Any]:
    """Train the model (or take the checkpoint), save it, and compare it with n-grams and compressors."""
    config = job.config.pretrain
    tokenizer = chat.require_same_template({"tokenizer": job.inputs["tokenizer"]})
    train_texts, test_texts = (
        reading.texts(reading.load(job.config.data.text, split).rows) for split in ("train", "test")
    )
    texts = held_out.first_texts(test_texts, tokenizer, config.eval_tokens)
    model = start(job, tokenizer)
    steps = config.tokens // (config.batch_size * config.context)
    if steps:
        fused.layouts(model)  # a model that Muon cannot train is refused before its text is tokenised
        shuffled = reading.draw(train_texts, len(train_texts), config.seed)
        with ranks.main_first(job):
            stream = packed(shuffled, tokenizer, job.checkpoints / "tokens.bin")
        # windows of what is scored overlap by half
        work = Work(config.tokens, 2 * config.eval_tokens, shape=(config.batch_size, config.context))
        compared = baselines.estimated_seconds(train_texts, texts)
        job.announce(f"{config.batch_size * config.context:,} tokens", steps, model, work, compared)
        rows = PackedRows(stream, config.context, steps * config.batch_size)
        model = fit(job, model, rows, steps, held_out_rows(job, tokenizer, texts, len(rows)))
    if not job.main:
        return {}
    loading.save(model, tokenizer, job.out)
    bar = job.progress(config.eval_tokens, "tokens", part="held out")
    bits = held_out.text_bits_per_byte(model.eval(), tokenizer, texts, config.context, bar)
    bar.close()
    return {
        "bits_per_byte": bits,
        "eval_bytes": sum(len(text.encode()) for text in texts),
        "baselines": baselines.text_baselines(train_texts, texts),
        "parameters": sum(p.numel() for p in model.parameters()),
        "template_hash": chat.template_hash(tokenizer),
        "train_tokens": steps * config.batch_size * config.context,
    }


def held_out_rows(job: Job, tokenizer: Any, texts: list[str], trained: int) -> Any:
    """Rows of held-out texts on which the loss is measured during training; None where they do not fill one."""
    ids = [id for text in tokenizer(texts, add_special_tokens=False)["input_ids"]
           for id in (document_start(tokenizer), *text)]  # fmt: skip
    context = job.config.pretrain.context
    rows = [ids[at : at + context] for at in range(0, len(ids) - context + 1, context)]
    return hf_trainer.held_out_rows(job, [{"input_ids": row, "labels": row} for row in rows], trained)


def start(job: Job, tokenizer: Any) -> torch.nn.Module:
    """The model before training: new, or the checkpoint of the configuration."""
    if job.config.model.checkpoint:
        return loading.from_checkpoint(job.config.model, tokenizer)
    return loading.from_scratch(job.config.model, tokenizer, job.config.pretrain.seed)


class MuonTrainer(hf_trainer.Undisturbed, Trainer):
    """A Trainer with Muon and AdamW under a warm-up, stable, decay schedule.

    It makes them when it trains: processes that share out the weights do so first.
    """

    def __init__(self, job: Job, **options: Any):
        self.job = job
        super().__init__(**options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser."""
        config = self.job.config.pretrain
        self.optimizer = MuonAdamW(
            cast(nn.Module, self.model), config.matrix_learning_rate, config.learning_rate, self.job.device.bf16
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of both learning rates."""
        config = self.job.config.pretrain
        self.lr_scheduler = get_wsd_schedule(
            cast(torch.optim.Optimizer, self.optimizer),
            num_warmup_steps=round(config.warmup * num_training_steps),
            num_decay_steps=round(config.decay * num_training_steps),
            num_training_steps=num_training_steps,
            decay_type="linear",
        )
        return self.lr_scheduler


def fit(job: Job, model: torch.nn.Module, rows: PackedRows, steps: int, held_out: Any = None) -> torch.nn.Module:
    """The trained model; its loss is measured on rows that are `held_out`, where there are any."""
    config, processes = job.config.pretrain, job.device.processes
    trainer = MuonTrainer(
        job,
        model=model,
        args=TrainingArguments(
            **hf_trainer.arguments(job, config.batch_size, steps, config.seed), max_grad_norm=config.max_grad_norm
        ),
        train_dataset=rows if processes == 1 else EvenedRows(rows, config.batch_size, processes),
        eval_dataset=held_out,
    )
    with forward.installed(model) if forward.serves(model, job.device) else nullcontext():
        return hf_trainer.train(trainer, job, config.batch_size * config.context, "tokens")
