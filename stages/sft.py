"""Stage `sft`: supervised fine-tuning on replies with TRL's SFTTrainer; loss on the reply and its end token only."""

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from threefold.data import reading
from threefold.errors import require_most
from threefold.evaluation import held_out
from threefold.execution import ranks
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, loading
from threefold.sampling import sampler
from threefold.training import hf_trainer


def run(job: Job) -> dict[str, Any]:
    """Fine-tune the base model, and measure reply bits per byte before and after, and how often samples end."""
    config, source, dialogue = job.config.sft, job.config.data.replies, job.config.data.dialogue
    tokenizer = chat.require_same_template({"pretrain": job.inputs["pretrain"]})
    model = loading.load_policy(job.inputs["pretrain"], job.device.type)
    train = reading.draw(reading.training_examples(source, dialogue), config.examples, config.seed)
    train, tokenised, refused = chat.tokenised(tokenizer, train, source)
    removed = chat.marks_removed(tokenizer, [e.prompt for e in train], [e.reply for e in train])
    rows = [row for row in (labelled(*ids) for ids in tokenised) if len(row["input_ids"]) <= config.max_length]
    too_long = len(train) - len(rows)
    key, allowed = f"sft.max_length={config.max_length}", "data.replies.max_unusable_share"
    require_most(too_long, len(train), source.max_unusable_share, key, "examples", allowed)
    asked = reading.draw(reading.prompts(source, "validation", dialogue), config.eval_examples, config.seed)
    asked, pairs, held_out_refused = chat.tokenised(tokenizer, asked, source)
    fitting = [i for i, (prompt, reply) in enumerate(pairs) if len(prompt) + len(reply) <= config.max_length]
    require_most(len(asked) - len(fitting), len(asked), 1.0, key, "held-out examples", allowed)
    measured = [pairs[i] for i in fitting], [asked[i].reply for i in fitting]
    prompts = [pairs[i][0] for i in sampler.with_room([prompt for prompt, _ in pairs], model, job.config.sampling)]
    batch_size = hf_trainer.rows_of_a_batch(config.batch_size, len(rows))
    order = hf_trainer.in_order([len(row["input_ids"]) for row in rows], batch_size, config.epochs, config.seed)
    steps, tokens = len(order) // batch_size, sum(len(rows[i]["input_ids"]) for i in order)
    job.say(f"{len(rows):,} examples, {too_long} longer than {config.max_length} tokens dropped")
    counted = hf_trainer.trained_on(job, [order], len(rows), batch_size, "examples")
    if removed or refused:
        count = sum(refused.values())
        job.say(f"{removed:,} turn marks were removed from the training text; the template refuses {count:,} examples")
    shape, new = (batch_size, tokens // len(order)), len(prompts) * job.config.sampling.max_new_tokens
    work = Work(tokens, 2 * len(fitting) * shape[1], new, shape, job.config.sampling.batch_size)  # scored twice
    job.announce(f"{tokens // steps:,} tokens", steps, model, work)
    before = bits_per_byte(job, model, tokenizer, *measured) if job.main else None
    unseen = hf_trainer.held_out_rows(job, [labelled(*pair) for pair in measured[0]], len(order))
    model = fit(job, model, tokenizer, [rows[i] for i in order], batch_size, unseen)
    if not job.main:
        return {}
    loading.save(model, tokenizer, job.out)
    model = loading.load_policy(job.out, job.device.type)
    return {
        "reply_bits_per_byte": bits_per_byte(job, model, tokenizer, *measured),
        "reply_bits_per_byte_base": before,
        "ended_share": ended_share(job, model, tokenizer, prompts),
        **counted,
        "dropped_too_long": too_long,
        "marks_removed": removed,
        "refused_by_template": refused,
        "template_hash": chat.template_hash(tokenizer),
        "eval_refused_by_template": held_out_refused,
        "eval_dropped_too_long": len(asked) - len(fitting),
        "unusable": reading.left_out(source, "train", dialogue),
    }


def labelled(prompt: list[int], reply: list[int]) -> dict[str, list[int]]:
    """A training row: the prompt's labels are -100, those of what the model says itself are its tokens."""
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


class Trainer(hf_trainer.Undisturbed, SFTTrainer):
    """TRL's, undisturbed by what is measured."""


def fit(
    job: Job, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], batch_size: int, held_out: Any = None
) -> Any:
    """The model, trained with TRL on tokenised rows, so that TRL neither truncates nor renders them.

    Its loss is measured on rows that are `held_out`, where there are any.
    """
    config, processes, steps = job.config.sft, job.device.processes, len(rows) // batch_size
    if processes > 1:
        unseen = {"input_ids": rows[0]["input_ids"][:2], "labels": [-100, -100]}
        rows = ranks.evened(rows, batch_size, processes, unseen)
    arguments = SFTConfig(
        **hf_trainer.arguments(job, batch_size, steps, config.seed),
        **hf_trainer.linear_schedule(config.learning_rate, config.warmup, steps),
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    measured = Dataset.from_list(held_out) if held_out else None
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list(rows), eval_dataset=measured, processing_class=tokenizer
    )
    return hf_trainer.train(trainer, job, batch_size, "examples")


def bits_per_byte(
    job: Job, model: Any, tokenizer: Any, pairs: list[tuple[list[int], list[int]]], replies: list[str]
) -> float:
    """Bits per byte of held-out `replies`; `pairs` are their prompts and themselves in token ids."""
    bar = job.progress(len(pairs), "replies", part="held out")
    longest = job.config.sft.max_length
    bits = held_out.reply_bits_per_byte(model, pairs, replies, tokenizer.pad_token_id, longest, bar)
    bar.close()
    return bits


def ended_share(job: Job, model: Any, tokenizer: Any, prompts: list[list[int]]) -> float:
    """Share of sampled replies to held-out prompts that end by themselves within sampling.max_new_tokens."""
    numbers = sampler.random_numbers(job.config.sft.seed, len(prompts), job.config.sampling)
    bar = job.progress(len(prompts), "samples", part="samples")
    replies = sampler.sample(model, prompts, job.config.sampling, tokenizer, numbers, bar)
    bar.close()
    return sum(reply.ended for reply in replies) / len(replies)
