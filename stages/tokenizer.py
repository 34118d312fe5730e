"""Stage `tokenizer`: byte-level BPE with special tokens and a chat template, or a checkpoint's own tokenizer."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

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


def from_checkpoint(model: Any, template_date: str, weights: bool = True) -> Any:
    """The checkpoint's tokenizer as all stages use it. Raises `UserError` where it or its template cannot be taken.

    weights: the checkpoint's model is to be taken as well, and is looked at before.
    """
    name = f"model.checkpoint={model.checkpoint}"
    fixed: Any = OmegaConf.to_container(model.chat_template_kwargs)
    if weights:
        check_checkpoint(model)
    return prepared(own_tokenizer(model), name, template_date, fixed, checkpoint_ends(model))


def prepared(
    tokenizer: Any, name: str, template_date: str, fixed: dict[str, Any] | None = None, ends: Iterable[int] = ()
) -> Any:
    """The tokenizer of the checkpoint `name`, with a template of a fixed date, whose end of a turn is the end token.

    `fixed` are variables of the template with their values, and `ends` other tokens that end a reply: of these, special
    ones are kept. The pad token is not the end token. Raises `UserError` where the template cannot be trained on.
    """
    if tokenizer.chat_template is None:
        _give_template(tokenizer)
    try:
        _settle(tokenizer, template_date, fixed or {})
        _end_as_the_template_does(tokenizer)
    except UserError as error:
        raise error if str(error).startswith("model.") else UserError(f"{name}: {error}") from error
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if more := [special[i] for i in ends if i in special and special[i] != tokenizer.eos_token]:
        tokenizer.init_kwargs[chat.ENDS] = more
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": chat.PAD})
    return tokenizer


def _settle(tokenizer: Any, template_date: str, fixed: dict[str, Any]) -> None:
    """Fix the template's date and variables.

    Where nothing can be trained on as it is, TRL's variant of it for training takes its place if there is one that can:
    so the replies of GLM 4.5 get an end token, and those of DeepSeek R1 keep their thinking.
    """
    given = template.without_clock(tokenizer.chat_template)
    _fix(tokenizer, given, template_date, fixed)
    if not (reason := template.problem(tokenizer)):
        return
    from trl import chat_template_utils

    tokenizer.chat_template = given
    with contextlib.suppress(ValueError):  # TRL has none
        if variant := chat_template_utils.get_training_chat_template(tokenizer):
            _fix(tokenizer, template.VARIANT + variant, template_date, fixed)
    if template.problem(tokenizer):
        raise UserError(reason)


def _fix(tokenizer: Any, source: str, template_date: str, fixed: dict[str, Any]) -> None:
    tokenizer.chat_template = template.with_variables(source, fixed)
    template.settle(tokenizer, template_date)


def checkpoint_ends(model: Any) -> list[int]:
    """The tokens at which the checkpoint's own generation stops, as its configuration lists them."""
    place, revision = model.checkpoint, model.revision or "main"
    if model.gguf_file:
        return []
    if base := adapter_base(Path(place)):
        place, revision = base, adapter_revision(Path(model.checkpoint)) or "main"
    ends = None
    with checkpoints.loading(f"model.checkpoint={model.checkpoint}"), contextlib.suppress(OSError):
        try:
            ends = GenerationConfig.from_pretrained(place, revision=revision).eos_token_id
        except OSError:  # it has no generation_config.json
            ends = PreTrainedConfig.get_config_dict(place, revision=revision)[0].get("eos_token_id")
    return [ends] if isinstance(ends, int) else list(ends or [])


def own_tokenizer(model: Any) -> Any:
    """The tokenizer as the checkpoint has it. Raises `UserError` where checkpoint or tokenizer cannot be taken."""
    name, place = f"model.checkpoint={model.checkpoint}", model.checkpoint
    if not model.gguf_file:
        checkpoints.check_place(place, name)
    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
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
    end, former = str(template.end_of_turn(tokenizer)), tokenizer.eos_token
    if end == former:
        return
    if former and "eos_token" in tokenizer.chat_template:  # what the template writes stays as it was
        tokenizer.chat_template = f"{{% set eos_token = {json.dumps(former)} %}}\n{tokenizer.chat_template}"
    tokenizer.add_special_tokens({"eos_token": end})
    if former and tokenizer.bos_token is None and tokenizer.sep_token is None:
        tokenizer.add_special_tokens({"sep_token": former})
