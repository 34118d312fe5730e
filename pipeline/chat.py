"""Prompts and replies as tokens: one way of rendering for training, sampling and scoring."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.columns import Message
from pipeline.errors import UserError

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BOS, *ROLES.values(), END]

TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_tokenizer(folder: Path | str, name: str | None = None, **options: Any) -> Any:
    """The tokenizer of a model folder or hub name. Raises `UserError` that begins with `name` where it has none."""
    from transformers import AutoTokenizer

    from pipeline import checkpoints

    with checkpoints.loading(f"{name or folder}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": False} | options)
        if not tokenizer.is_fast or not len(tokenizer):
            raise UserError(f"{name or folder}: has no tokenizer.json; save its tokenizer as a fast one")
    return tokenizer


def prompt_ids(tokenizer: Any, prompt: list[Message]) -> list[int]:
    """Token ids of a prompt up to and including the mark that opens the reply; exactly one BOS.

    Special tokens written out in a message are removed from it: text cannot open or close a turn.
    """
    rendered = tokenizer.apply_chat_template(
        without_special(tokenizer, prompt), add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(rendered, add_special_tokens=False)


def reply_ids(tokenizer: Any, reply: str) -> list[int]:
    """Token ids of a reply with the end-of-turn token; tokenised apart from the prompt, so no merge crosses over."""
    return [*tokenizer.encode(_without_special(tokenizer, reply), add_special_tokens=False), tokenizer.eos_token_id]


def without_special(tokenizer: Any, messages: list[Message]) -> list[Message]:
    """The messages with special tokens removed from what they say."""
    return [message | {"content": _without_special(tokenizer, message["content"])} for message in messages]


def _without_special(tokenizer: Any, text: str) -> str:
    template = tokenizer.chat_template or ""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special or str(token) in template]
    marks = {*tokenizer.all_special_tokens, *added}
    found = [mark for mark in marks if mark in text]
    while found:  # removing one may write another
        for mark in found:
            text = text.replace(mark, "")
        found = [mark for mark in marks if mark in text]
    return text


def reply_text(tokenizer: Any, ids: list[int]) -> str:
    """The text of a sampled reply, up to its end-of-turn token."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def template_hash(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, special tokens and chat template: models with one hash speak the same language."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {"padding", "truncation"}  # of the last call, not of the language
    language = {key: value for key, value in backend.items() if key not in state}
    content = [json.dumps(language, sort_keys=True), tokenizer.chat_template or "", str(tokenizer.special_tokens_map)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def require_same_template(folders: dict[str, Path]) -> Any:
    """The tokenizer that all artifacts share, and were made with. Raises `UserError` naming the one that differs."""
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        recorded = read_json(folder / "metrics.json")["template_hash"]
        if recorded != template_hash(tokenizers[name]):
            raise UserError(f"{name}: the tokenizer in {folder} is not the one it was made with; remove the folder")
    (first, tokenizer), *others = tokenizers.items()
    for name, other in others:
        if template_hash(other) != template_hash(tokenizer):
            raise UserError(f"{name} and {first} differ in tokenizer or chat template; train both from one tokenizer")
    return tokenizer
