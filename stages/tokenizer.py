"""Stage `tokenizer`: byte-level BPE with special tokens and a chat template, or a checkpoint's own tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from threefold.data import reading
from threefold.errors import UserError
from threefold.execution.job import Job
from threefold.models import chat, checkpoints, template
from threefold.models.__init__ import adapter_base, adapter_revision
from threefold.models.loading import check_checkpoint

ROUND_TRIPS = 2000  # held-out texts, at most, that are encoded and decoded again


def run(job: Job) -> dict[str, Any]:
    """Make the tokenizer, and measure on held-out text how it compresses and whether decoding gives the text back."""
    loaded = reading.load(job.config.data.text, "train")
    texts = reading.texts(loaded.rows)
    job.say(f"{job.device} · one process · byte-level BPE on {len(texts):,} texts, {sum(map(len, texts)):,} characters")
    tokenizer = (
        from_checkpoint(job.config.model, job.config.tokenizer.template_date)
        if job.config.model.checkpoint
        else train(texts, job.config.tokenizer.vocab_size)
    )
    refused = template.refusals(tokenizer)
    for shape, reason in refused.items():
        job.say(f"the chat template refuses {shape}: {reason}")
    tokenizer.save_pretrained(job.out)
    held_out = reading.texts(reading.load(job.config.data.text, "test").rows)
    if not texts or not held_out:
        raise UserError(
            f"data.text: {len(texts)} texts for training and {len(held_out)} held out; give more texts, or set splits"
        )
    tokens = sum(len(ids) for ids in tokenizer(held_out, add_special_tokens=False)["input_ids"])
    lossless = lossless_share(tokenizer, held_out[:ROUND_TRIPS])
    if lossless < 1:
        job.say(f"this tokenizer loses a part of {1 - lossless:.1%} of texts: its tokens are decoded to other text")
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": sum(len(text.encode()) for text in held_out) / tokens,
        "lossless_share": lossless,
        "template_refuses": refused,
        "template_hash": chat.template_hash(tokenizer),
        "texts": len(texts),
        "unusable": loaded.unusable,
    }


def lossless_share(tokenizer: Any, texts: list[str]) -> float:
    """Share of the texts that decoding their tokens gives back; marks of turns in a text do not count."""
    plain = [m["content"] for m in chat.without_special(tokenizer, [{"content": text} for text in texts])]
    ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    return sum(text == decoded for text, decoded in zip(plain, tokenizer.batch_decode(ids), strict=True)) / len(plain)


def train(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded, and encoding loses nothing."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=chat.SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=chat.PAD,
        bos_token=chat.BOS,
        eos_token=chat.END,
        extra_special_tokens=list(chat.ROLES.values()),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat.TEMPLATE
    return tokenizer


def from_checkpoint(model: Any, template_date: str) -> Any:
    """The checkpoint's tokenizer as all stages use it. Raises `UserError` where it or its template cannot be taken."""
    return prepared(own_tokenizer(model), f"model.checkpoint={model.checkpoint}", template_date)


def prepared(tokenizer: Any, name: str, template_date: str) -> Any:
    """The tokenizer of the checkpoint `name`, with a template of a fixed date, whose end of a turn is the end token.

    Its pad token is not the end token. Raises `UserError` where the template ends no reply with a token.
    """
    template.settle(tokenizer, template_date)
    if tokenizer.chat_template is None:
        _give_template(tokenizer)
    try:
        _end_as_the_template_does(tokenizer)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": chat.PAD})
    return tokenizer


def own_tokenizer(model: Any) -> Any:
    """The tokenizer as the checkpoint has it. Raises `UserError` where checkpoint or tokenizer cannot be taken."""
    name, place = f"model.checkpoint={model.checkpoint}", model.checkpoint
    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    check_checkpoint(model)
    if model.gguf_file:
        name, options["gguf_file"] = checkpoints.gguf_name(model), checkpoints.gguf_place(model)
    elif not (Path(place) / "tokenizer_config.json").is_file() and (base := adapter_base(Path(place))):
        place, options["revision"] = base, adapter_revision(Path(place))
    tokenizer = chat.load_tokenizer(place, name, **options)
    if not type(tokenizer).__module__.startswith("transformers."):
        raise UserError(f"{name}: its tokenizer is code of its own, which later stages do not run; save a fast one")
    return tokenizer


def _give_template(tokenizer: Any) -> None:
    """Our own chat template, with the special tokens that it writes."""
    tokenizer.add_special_tokens({"extra_special_tokens": [*chat.ROLES.values(), chat.END], "eos_token": chat.END})
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": chat.BOS})
    tokenizer.chat_template = chat.TEMPLATE


def _end_as_the_template_does(tokenizer: Any) -> None:
    """Make the token that the template ends a reply with the end token, so that no other one is trained.

    Where documents have no BOS, the former end token goes on to separate them (`packing.document_start`).
    """
    end, former = template.end_of_turn(tokenizer), tokenizer.eos_token
    if end is None:
        raise UserError(
            "its chat template writes no end token after a reply, so a model could not learn to stop; give it a "
            "template that ends replies with one token, as {{ eos_token }} does"
        )
    if end == former:
        return
    if former and "eos_token" in tokenizer.chat_template:  # what the template writes stays as it was
        tokenizer.chat_template = f"{{% set eos_token = {json.dumps(former)} %}}\n{tokenizer.chat_template}"
    tokenizer.add_special_tokens({"eos_token": end})
    if former and tokenizer.bos_token is None and tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": former})
