"""Prompts and replies as tokens, rendered the same for training, sampling and scoring."""

import hashlib
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from threefold.columns import Message
from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.models import template

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
    """The tokenizer of a model folder or hub name, with one chat template whose clock is stopped (`template.settle`).

    Raises `UserError` that begins with `name` where there is no tokenizer, or none of its templates can be used.
    """
    from transformers import AutoTokenizer

    from threefold.models import checkpoints

    with checkpoints.loading(f"{name or folder}: its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": False} | options)
        if not tokenizer.is_fast or not len(tokenizer):
            raise UserError(f"{name or folder}: has no tokenizer.json; save its tokenizer as a fast one")
    try:
        template.settle(tokenizer)
    except UserError as error:
        raise UserError(f"{name or folder}: {error}") from error
    return tokenizer


def prompt_ids(tokenizer: Any, prompt: list[Message]) -> list[int]:
    """Token ids of a prompt up to and including the mark that opens the reply; exactly one BOS.

    Marks of turns written out in a message are removed from it: text cannot open or close a turn. Raises `UserError`
    with the chat template's words where it refuses the prompt.
    """
    rendered = template.render(tokenizer, without_special(tokenizer, prompt))
    return tokenizer.encode(rendered, add_special_tokens=False)


def reply_ids(tokenizer: Any, reply: str) -> list[int]:
    """Token ids of a reply with the end-of-turn token; tokenised apart from the prompt, so no merge crosses over."""
    return [*tokenizer.encode(_cleaned(tokenizer, reply)[0], add_special_tokens=False), tokenizer.eos_token_id]


def without_special(tokenizer: Any, messages: list[Message]) -> list[Message]:
    """The messages with the marks of turns (`template.turn_marks`) removed from their contents, and nothing else."""
    return [message | {"content": _cleaned(tokenizer, message["content"])[0]} for message in messages]


def marks_removed(tokenizer: Any, prompts: Iterable[list[Message]], replies: Iterable[str]) -> int:
    """How many marks of turns are removed from prompts and replies before they are tokenised."""
    texts = [message["content"] for prompt in prompts for message in prompt] + list(replies)
    return sum(_cleaned(tokenizer, text)[1] for text in texts)


def _cleaned(tokenizer: Any, text: str) -> tuple[str, int]:
    """The text without marks of turns, and their number: the leftmost goes first, of several there the longest."""
    pattern, removed = _marks(tokenizer)[0], 0
    while (cut := pattern.subn("", text))[1]:  # removing one may write another
        text, removed = cut[0], removed + cut[1]
    return text, removed


_MARKS: weakref.WeakKeyDictionary[Any, tuple[Any, re.Pattern[str], set[int]]] = weakref.WeakKeyDictionary()


def _marks(tokenizer: Any) -> tuple[re.Pattern[str], set[int]]:
    """A pattern of the marks of turns, and their ids; kept until the tokenizer changes, as the search is slow."""
    state = (tokenizer.chat_template, len(tokenizer), str(tokenizer.special_tokens_map))
    if tokenizer not in _MARKS or _MARKS[tokenizer][0] != state:
        marks = template.turn_marks(tokenizer)
        pattern = re.compile("|".join(map(re.escape, marks)) or "(?!)")  # (?!) matches nothing
        _MARKS[tokenizer] = (state, pattern, set(tokenizer.convert_tokens_to_ids(marks)))
    return _MARKS[tokenizer][1:]


def accepted(
    tokenizer: Any, rows: list[Any], source: Any, prompts: Callable[[Any], list[list[Message]]] = lambda e: [e.prompt]
) -> tuple[list[Any], dict[str, int]]:
    """The rows all of whose prompts the chat template renders, and how many it refuses for each reason.

    Raises `UserError` where these are a larger share than `source.max_unusable_share`, or all.
    """
    refused: dict[int, tuple[str, list[Message]]] = {}
    for number, row in enumerate(rows):
        for prompt in prompts(row):
            if reason := template.refusal(tokenizer, without_special(tokenizer, prompt)):
                refused[number] = reason, prompt
    reasons = Counter(reason for reason, _ in refused.values())
    if refused and len(refused) > min(source.max_unusable_share * len(rows), len(rows) - 1):
        [(reason, _)] = reasons.most_common(1)
        opening = next(prompt for why, prompt in refused.values() if why == reason)[0]["content"][:40]
        raise UserError(
            f"{source.path}: the chat template refuses {len(refused):,} of {len(rows):,} dialogues, most often with "
            f'"{reason}" (the first begins {opening!r}); give dialogues that it renders, or a checkpoint that takes '
            "them, or set max_unusable_share higher"
        )
    return [row for number, row in enumerate(rows) if number not in refused], dict(sorted(reasons.items()))


def reply_text(tokenizer: Any, ids: list[int]) -> str:
    """The text of a sampled reply, up to its end-of-turn token, without marks of turns."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    marks = _marks(tokenizer)[1]
    return tokenizer.decode([token for token in ids if token not in marks]).strip()


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
