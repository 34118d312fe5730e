"""Stage `tokenizer`: byte-level BPE with special tokens and a chat template, or a checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline import chat, data, gguf_checkpoint
from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.models import check_checkpoint
from pipeline.sources import adapter_base


def run(job: Job) -> dict[str, Any]:
    """Make the tokenizer and measure its compression on held-out text."""
    loaded = data.load(job.config.data.text, "train")
    texts = data.texts(loaded.rows)
    job.say(f"{job.device} · one process · byte-level BPE on {len(texts):,} texts, {sum(map(len, texts)):,} characters")
    tokenizer = (
        from_checkpoint(job.config.model)
        if job.config.model.checkpoint
        else train(texts, job.config.tokenizer.vocab_size)
    )
    tokenizer.save_pretrained(job.out)
    held_out = data.texts(data.load(job.config.data.text, "test").rows)
    if not texts or not held_out:
        raise UserError(
            f"data.text: {len(texts)} texts for training and {len(held_out)} held out; give more texts, or set splits"
        )
    tokens = sum(len(ids) for ids in tokenizer(held_out, add_special_tokens=False)["input_ids"])
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": sum(len(text.encode()) for text in held_out) / tokens,
        "template_hash": chat.template_hash(tokenizer),
        "texts": len(texts),
        "unusable": loaded.unusable,
    }


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


def from_checkpoint(model: Any) -> Any:
    """The checkpoint's tokenizer, with a chat template and a pad token that is not the end token."""
    tokenizer = own_tokenizer(model)
    if tokenizer.eos_token is None:
        raise UserError(f"model.checkpoint={model.checkpoint}: its tokenizer has no end token")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": chat.PAD})
    if tokenizer.chat_template is None:
        tokenizer.add_special_tokens({"extra_special_tokens": [*chat.ROLES.values(), chat.END], "eos_token": chat.END})
        if tokenizer.bos_token is None:
            tokenizer.add_special_tokens({"bos_token": chat.BOS})
        tokenizer.chat_template = chat.TEMPLATE
    return tokenizer


def own_tokenizer(model: Any) -> Any:
    """The tokenizer as the checkpoint has it. Raises `UserError` where checkpoint or tokenizer cannot be taken."""
    name, place = f"model.checkpoint={model.checkpoint}", model.checkpoint
    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    check_checkpoint(model)
    if model.gguf_file:
        name, options["gguf_file"] = gguf_checkpoint.name_of(model), gguf_checkpoint.place(model)
    elif not (Path(place) / "tokenizer_config.json").is_file() and (base := adapter_base(Path(place))):
        place, options["revision"] = base, "main"
    tokenizer = chat.load_tokenizer(place, name, **options)
    if not type(tokenizer).__module__.startswith("transformers."):
        raise UserError(f"{name}: its tokenizer is code of its own, which later stages do not run; save a fast one")
    return tokenizer
