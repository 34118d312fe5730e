"""Prompts and replies as tokens, rendered the same for training, sampling and scoring."""

import hashlib
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threefold.columns import Message
from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.models import template

ENDS = "end_tokens"  # in tokenizer_config.json: tokens that end a reply, next to that of the template
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


def row_ids(tokenizer: Any, prompt: list[Message], *replies: str) -> tuple[list[int], list[list[int]]]:
    """The tokens of `prompt_ids`, and those that a model says after them to give each reply.

    These are what the template writes behind the prompt where the reply is part of the conversation, up to the end
    token: a thinking block that is left to the model is part of them, what is added for the next turn is not. Raises
    `UserError` where the template refuses the conversation.
    """
    written, reason = _turns(tokenizer, prompt, replies)
    if reason is not None:
        raise template.refused(prompt, reason)
    return _tokens(tokenizer, written)


def reply_ids(tokenizer: Any, prompt: list[Message], reply: str) -> list[int]:
    """Token ids of a reply to a prompt, as of `row_ids`."""
    return row_ids(tokenizer, prompt, reply)[1][0]


def refusal(tokenizer: Any, prompt: list[Message], *replies: str) -> str | None:
    """Why nothing can be trained on of a prompt with these replies, in the chat template's words; None where it can."""
    return _turns(tokenizer, prompt, replies)[1]


def _turns(tokenizer: Any, prompt: list[Message], replies: Iterable[str]) -> tuple[list[template.Turn], str | None]:
    """A turn for each reply, all without marks of turns in their texts; and why the template refuses one, or None."""
    shape, messages = _shape(tokenizer), without_special(tokenizer, prompt)
    written, reason = template.turns(tokenizer, messages, (_cleaned(tokenizer, r)[0] for r in replies), shape.end)
    if shape.remedy and reason and reason.startswith(template.OPENED):
        reason = f"{reason}; {shape.remedy}"
    return written, reason


def _tokens(tokenizer: Any, written: list[template.Turn]) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt of turns, and of the completion of each."""
    given = tokenizer.encode(written[0].prompt, add_special_tokens=False)
    return given, [_following(tokenizer, _shape(tokenizer), turn, given) for turn in written]


def _following(tokenizer: Any, shape: "_Shape", turn: template.Turn, given: list[int]) -> list[int]:
    """Token ids of a completion as those of the whole conversation have it, where no token reaches over the seam.

    Added tokens part a text, so that the last one before the seam stands for all of the prompt. Where the seam is
    inside of a token of the whole, the completion is tokenised by itself, as a model has to say it after its prompt.
    """
    anchor, ids = turn.prompt, given
    if shape.anchor_ids and turn.prompt.endswith(shape.anchor):
        anchor, ids = shape.anchor, shape.anchor_ids
    whole = tokenizer.encode(anchor + turn.completion, add_special_tokens=False)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer.encode(str(shape.end) + turn.completion, add_special_tokens=False)[1:]


def without_special(tokenizer: Any, messages: list[Message]) -> list[Message]:
    """The messages with the marks of turns (`template.turn_marks`) removed from their contents, and nothing else."""
    return [message | {"content": _cleaned(tokenizer, message["content"])[0]} for message in messages]


def marks_removed(tokenizer: Any, prompts: Iterable[list[Message]], replies: Iterable[str]) -> int:
    """How many marks of turns are removed from prompts and replies before they are tokenised."""
    texts = [message["content"] for prompt in prompts for message in prompt] + list(replies)
    return sum(_cleaned(tokenizer, text)[1] for text in texts)


def _cleaned(tokenizer: Any, text: str) -> tuple[str, int]:
    """The text without marks of turns, and their number: the leftmost goes first, of several there the longest."""
    pattern, removed = _shape(tokenizer).pattern, 0
    while (cut := pattern.subn("", text))[1]:  # removing one may write another
        text, removed = cut[0], removed + cut[1]
    return text, removed


@dataclass(frozen=True)
class _Shape:
    """What is the same in every turn of a tokenizer's template."""

    pattern: re.Pattern[str]  # marks of turns
    marks: set[int]
    end: str | None  # the token that ends replies
    anchor: str = ""  # what a prompt ends with, from its last added token on
    anchor_ids: list[int] | None = None
    unclosed: str = ""  # the thinking block that a prompt opens, where it does
    opening: list[int] | None = None  # what a model says before a reply itself, such as an empty thinking block
    remedy: str | None = None  # where replies are not rendered after what their prompts end with


_SHAPES: weakref.WeakKeyDictionary[Any, tuple[Any, _Shape]] = weakref.WeakKeyDictionary()


def _shape(tokenizer: Any) -> _Shape:
    """The shape of a tokenizer's turns; kept until the tokenizer changes, as the search is slow."""
    state = (tokenizer.chat_template, len(tokenizer), str(tokenizer.special_tokens_map))
    if tokenizer not in _SHAPES or _SHAPES[tokenizer][0] != state:
        marks = template.turn_marks(tokenizer)
        pattern = re.compile("|".join(map(re.escape, marks)) or "(?!)")  # (?!) matches nothing
        ids = set(tokenizer.convert_tokens_to_ids(marks))
        _SHAPES[tokenizer] = (state, _with_turns(tokenizer, _Shape(pattern, ids, None)))
    return _SHAPES[tokenizer][1]


def _with_turns(tokenizer: Any, shape: _Shape) -> _Shape:
    """The shape with what one plain question and reply show of it."""
    prompt, reply = [template.PLAIN[template.USER]], template.PLAIN[template.REPLY]
    if not tokenizer.chat_template or template.refusal(tokenizer, [*prompt, reply]):
        return shape
    rendered, tokens = template.render(tokenizer, prompt), template.added_tokens(tokenizer)
    after = rendered.rpartition(template.USER)[2]
    start = max((after.rfind(token) for token in tokens), default=-1)
    if start >= 0:
        anchor = after[start:]
        ids = tokenizer.encode(anchor, add_special_tokens=False)
        opens = any(anchor.strip() == opening for opening, _ in template.brackets(tokens))
        shape = replace(shape, anchor=anchor, anchor_ids=ids, unclosed=anchor if opens else "")
    shape = replace(shape, end=template.end_of_turn(tokenizer))
    written, _ = template.turns(tokenizer, prompt, [template.REPLY], shape.end)
    if not written:
        return replace(shape, remedy=template.remedy(tokenizer))
    opening = written[0].completion.partition(template.REPLY)[0]
    if opening.strip():
        before, given = replace(written[0], completion=opening), tokenizer.encode(rendered, add_special_tokens=False)
        shape = replace(shape, opening=_following(tokenizer, shape, before, given))
    return shape


def accepted(
    tokenizer: Any, rows: list[Any], source: Any,
    dialogues: Callable[[Any], list[tuple[list[Message], *tuple[str, ...]]]] = lambda e: [(e.prompt,)],
) -> tuple[list[Any], dict[str, int]]:  # fmt: skip
    """The rows all of whose dialogues the chat template renders, and how many it refuses for each reason.

    A dialogue is a prompt, and replies to it that are trained on. Raises `UserError` where the refused rows are a
    larger share than `source.max_unusable_share`, or all.
    """
    refused: dict[int, tuple[str, list[Message]]] = {}
    for number, row in enumerate(rows):
        for prompt, *replies in dialogues(row):
            if reason := refusal(tokenizer, prompt, *replies):
                refused[number] = reason, prompt
    return _kept(rows, refused, source)


def tokenised(tokenizer: Any, examples: list[Any], source: Any) -> tuple[list[Any], list[Any], dict[str, int]]:
    """`accepted` of examples with their replies, and between its two results the tokens of each: (prompt, reply)."""
    refused, tokens = {}, []
    for number, example in enumerate(examples):
        written, reason = _turns(tokenizer, example.prompt, [example.reply])
        if reason is not None:
            refused[number] = reason, example.prompt
        else:
            prompt, [reply] = _tokens(tokenizer, written)
            tokens.append((prompt, reply))
    kept, reasons = _kept(examples, refused, source)
    return kept, tokens, reasons


def _kept(
    rows: list[Any], refused: dict[int, tuple[str, list[Message]]], source: Any
) -> tuple[list[Any], dict[str, int]]:
    """The rows that are not refused, with the results and errors of `accepted`."""
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


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a sampled reply: the template's own end token, and others that the checkpoint stops at."""
    more = tokenizer.convert_tokens_to_ids(tokenizer.init_kwargs.get(ENDS, []))
    return [tokenizer.eos_token_id, *(token for token in more if token != tokenizer.eos_token_id)]


def with_own_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """A sampled reply with the template's own end token in place of another one, so that both are scored alike."""
    return [*ids[:-1], tokenizer.eos_token_id] if ids and ids[-1] in end_ids(tokenizer) else ids


def reply_text(tokenizer: Any, ids: list[int]) -> str:
    """The text of a sampled reply, up to its first end token, without marks of turns.

    What the template itself writes before a reply, such as an empty thinking block, is no part of it; a thinking block
    that the prompt opens is, so that the text is rendered as it was sampled.
    """
    shape, ends = _shape(tokenizer), end_ids(tokenizer)
    ids, before = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))], shape.unclosed
    if opening := shape.opening:
        within = range(len(ids) - len(opening), -1, -1) if shape.marks & set(opening) else (0,)  # a channel may follow
        start = next((i for i in within if ids[i : i + len(opening)] == opening), None)
        if start is not None:
            ids, before = ids[start + len(opening) :], ""
    return (before + tokenizer.decode([token for token in ids if token not in shape.marks])).strip()


def template_hash(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, special tokens and chat template: models with one hash speak the same language."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {"padding", "truncation"}  # of the last call, not of the language
    language = {key: value for key, value in backend.items() if key not in state}
    content = [json.dumps(language, sort_keys=True), tokenizer.chat_template or "", str(tokenizer.special_tokens_map)]
    content += tokenizer.init_kwargs.get(ENDS, [])
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
