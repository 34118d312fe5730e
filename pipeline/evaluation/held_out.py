"""Held-out prompts that every model replies to, and how well a model predicts held-out text and replies."""

from typing import Any

import numpy as np
from torch import nn

from threefold.data import reading
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.execution.job import Job
from threefold.fileio import read_lines
from threefold.models import chat, likelihood, loading, template
from threefold.sampling import sampler
from threefold.training.packing import document_start


def prompts(
    job: Job, tokenizer: Any, model: Any, count: int, seed: int, split: str = "test"
) -> tuple[list[Example], dict[str, dict[str, Any]]]:
    """At most `count` prompts of a held-out split, with replies, that no training split and no comparison contains.

    For prompts of the test split, the validation split counts as training. Prompts that leave no room for a reply
    in `model`'s context, or that the chat template refuses, are left out. Also returns what of the split is not used,
    by reason; prompts that were not drawn are no part of it.
    """
    source, dialogue = job.config.data.replies, job.config.data.dialogue
    earlier = ("train", "validation") if split == "test" else ("train",)
    trained_on = {reading.prompt_key(e.prompt) for name in earlier for e in reading.examples(source, name, dialogue)}
    if "comparisons" in job.inputs:
        trained_on |= {
            reading.prompt_key(row["prompt"]) for row in read_lines(job.inputs["comparisons"] / "train.jsonl")
        }
    distinct = reading.prompts(source, split, dialogue)
    new = [e for e in distinct if reading.prompt_key(e.prompt) not in trained_on]
    if not new:
        raise UserError(
            f"{source.path}: every prompt of its {split} split is one of training; give other rows, or set splits"
        )
    examples = reading.draw(new, 2 * count, seed)
    drawn, refused = chat.accepted(tokenizer, examples, source, lambda e: [(e.prompt, e.reply)])
    ids = [chat.prompt_ids(tokenizer, example.prompt) for example in drawn]
    fitting = sampler.with_room(ids, model, job.config.sampling)
    more = {
        "prompt is in training": len(distinct) - len(new),
        "prompt leaves no room for a reply": len(ids) - len(fitting),
    }
    unused = {why: {"count": number} for why, number in more.items() if number} | template.counted(refused)
    return [drawn[i] for i in fitting][:count], reading.left_out(source, split, dialogue, once=True) | unused


def require_reply(model: nn.Module, tokenizer: Any, examples: list[Example]) -> None:
    """Raise `UserError` where no prompt with its reply fits into `model`: nothing could be measured on them."""
    longest = loading.context_length(model.config)
    lengths = [len(prompt) + len(reply) for prompt, reply in reply_pairs(tokenizer, examples)]
    if min(lengths) > longest:
        raise UserError(f"data.replies: none of {len(lengths)} held-out prompts with its reply fits {longest} tokens")


def reply_pairs(tokenizer: Any, examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    """Prompts and replies in token ids."""
    rows = (chat.row_ids(tokenizer, example.prompt, example.reply) for example in examples)
    return [(prompt, reply) for prompt, [reply] in rows]


def reply_bits_per_byte(
    model: nn.Module, pairs: list[tuple[list[int], list[int]]], replies: list[str], pad: int, longest: float,
    bar: Any = None,
) -> float:  # fmt: skip
    """Bits per byte of people's `replies` given their rendered prompts; the end token's bits count as well.

    `pairs` are prompts and replies in token ids; those longer than `longest` are left out. `bar` counts replies.
    """
    kept = [i for i, (prompt, reply) in enumerate(pairs) if len(prompt) + len(reply) <= longest]
    if not kept:
        raise UserError(
            f"none of {len(pairs)} held-out replies is, with its prompt, within {longest} tokens; give shorter"
        )
    nats = -likelihood.replies_logprobs(model, [pairs[i] for i in kept], pad, bar=bar).sum().item()
    return likelihood.bits_per_byte(nats, [replies[i] for i in kept])


def first_texts(texts: list[str], tokenizer: Any, tokens: int) -> list[str]:
    """The first of `texts`, together at most about `tokens` tokens, and at least one."""
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return texts[: max(1, int(np.searchsorted(np.cumsum(lengths), tokens)))]


def text_bits_per_byte(model: nn.Module, tokenizer: Any, texts: list[str], context: int, bar: Any = None) -> float:
    """Bits per UTF-8 byte of texts under a causal language model, each by itself after its BOS.

    Windows have `context` tokens, or as many as the model can read. `bar` counts tokens.
    """
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    window = int(min(context, loading.context_length(model.config)))
    nats = likelihood.texts_nats(model, [[document_start(tokenizer), *text] for text in ids], window, bar=bar)
    return likelihood.bits_per_byte(nats, texts)
