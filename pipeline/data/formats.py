"""How a raw row of each data format is read into one of three shapes; what cannot be used is refused with a reason.

    text        {"key", "text"}
    dialogue    {"key", "messages", "symmetric"}    messages: [{"role": system|user|assistant, "content"}]
    preference  {"key", "prompt", "chosen", "rejected"}, and "margin" where the data says how much better

Splits are made by `key`: rows with the same key never fall into different splits. In a symmetric dialogue both
speakers are people, and every turn after the first is a reply to learn from. A format counts in `dropped`, by reason,
what it leaves out on purpose, such as ties. The formats of preferences are in `preference_formats.py`.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threefold.columns import Message, Row, UnusableRowError, dialogue_of, key_of, messages_of, text_of
from threefold.data import instructions
from threefold.data.files import WORD_LIST, package_file
from threefold.data.preferences import PREFERENCE_FORMATS


def text(raw: Row, dropped: Counter) -> list[Row]:
    """Plain text in column `text`."""
    content = text_of(raw, "text")
    return [{"key": content, "text": content}]


def prompt_completion(raw: Row, dropped: Counter) -> list[Row]:
    """Columns `prompt` (text or messages) and `completion`."""
    prompt, reply = messages_of(raw, "prompt"), dialogue_of(raw, "completion")[-1]
    return [{"key": key_of(prompt), "messages": [*prompt, reply], "symmetric": False}]


def messages(raw: Row, dropped: Counter) -> list[Row]:
    """Column `messages`: a list of {"role", "content"}."""
    turns = messages_of(raw, "messages")
    if not any(m["role"] == "assistant" for m in turns):
        raise UnusableRowError("no assistant turn")
    return [{"key": key_of(turns), "messages": turns, "symmetric": False}]


def ifeval(raw: Row, dropped: Counter) -> list[Row]:
    """Columns `prompt`, `instruction_id_list` and `kwargs` of IFEval: no reply is known, `instructions` check one."""
    prompt = messages_of(raw, "prompt")
    return [{"key": key_of(prompt), "messages": prompt, "symmetric": False, "instructions": instructions.read(raw)}]


def chitchat(raw: Row, dropped: Counter) -> list[Row]:
    """A conversation of chitchat-dataset; the prompt is its topic, adjacent messages of one sender are one turn.

    Messages with an address, markup or profanity are left out and counted. Where a whole turn is left out the
    conversation is cut in two, so that every reply keeps the context that it was written in.
    """
    if not {"id", "messages"} <= raw.keys() or not _turns_of_senders(raw["messages"]):
        raise UnusableRowError("not a conversation of chitchat-dataset")
    if not isinstance(raw.get("prompt") or "", str):
        raise UnusableRowError("prompt is not text")
    topic = [{"role": "system", "content": raw["prompt"]}] if raw.get("prompt") else []
    segments: list[list[str]] = [[]]
    sender = None
    for turn in raw["messages"]:
        kept = [m["text"].strip() for m in turn if _presentable(m["text"], dropped)]
        if not kept:
            segments.append([])
        elif turn[0]["sender"] == sender and segments[-1]:
            segments[-1][-1] += "\n" + "\n".join(kept)
        else:
            segments[-1].append("\n".join(kept))
        sender = turn[0]["sender"]
    return [
        {"key": raw["id"], "messages": topic + alternating(turns), "symmetric": True}
        for turns in segments
        if len(turns) > 1
    ]


def _turns_of_senders(turns: Any) -> bool:
    """Whether these are turns of chitchat-dataset: lists of messages, each with its sender and its text."""
    if not isinstance(turns, list) or not all(isinstance(turn, list) and turn for turn in turns):
        return False
    messages = [message for turn in turns for message in turn]
    return all(isinstance(m, dict) and isinstance(m.get("text"), str) and "sender" in m for m in messages)


FORMATS: dict[str, Callable[[Row, Counter], list[Row]]] = {
    **{f.__name__: f for f in (text, prompt_completion, messages, ifeval)},
    **PREFERENCE_FORMATS,
    "chitchat": chitchat,
}


def alternating(turns: list[str]) -> list[Message]:
    """Turns as messages of alternating roles, the last of them the assistant's."""
    roles = ("assistant", "user")
    return [{"role": roles[(len(turns) - 1 - i) % 2], "content": turn} for i, turn in enumerate(turns)]


ADDRESS_OR_MARKUP = re.compile(r"https?:|www\.|\S@\S+\.\w|<[^>]*>|\[[^\]]*\]\(", re.IGNORECASE)
WORD = re.compile(r"[a-z0-9$@*!'-]+")


@functools.cache
def _profanity() -> tuple[frozenset[str], tuple[str, ...]]:
    """Words, and phrases of several words, of the list in the package better-profanity (MIT)."""
    lines = Path(package_file(WORD_LIST)).read_text().lower().split("\n")
    entries = {line.strip() for line in lines if line.strip()}
    return frozenset(e for e in entries if " " not in e), tuple(e for e in sorted(entries) if " " in e)


def _presentable(message: str, dropped: Counter) -> bool:
    """Whether a chat message is fit for training; counts the reason where it is not."""
    lowered = message.lower()
    words, phrases = _profanity()
    if not message.strip():
        reason = "empty message"
    elif ADDRESS_OR_MARKUP.search(message):
        reason = "address or markup"
    elif not words.isdisjoint(w.strip("'!-") for w in WORD.findall(lowered)) or any(p in lowered for p in phrases):
        reason = "profanity"
    else:
        return True
    dropped[f"message dropped: {reason}"] += 1
    return False
