"""How a raw row of each data format is read into one of three shapes; what cannot be used is refused with a reason.

    text        {"key", "text"}
    dialogue    {"key", "messages", "symmetric"}    messages: [{"role": system|user|assistant, "content"}]
    preference  {"key", "prompt", "chosen", "rejected"}    prompt: messages; chosen, rejected: text

`key` is what splits are made by: rows with one key never fall into different splits. In a symmetric dialogue both
speakers are people, and every turn after the first is a reply to learn from.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.sources import package_file

Row = dict[str, Any]
Message = dict[str, str]


class UnusableRowError(Exception):
    """A row cannot be used; the message is the reason, short and the same for all rows with that defect."""


def text(raw: Row, dropped: Counter) -> list[Row]:
    """Plain text in column `text`."""
    content = _text_of(raw, "text")
    return [{"key": content, "text": content}]


def prompt_completion(raw: Row, dropped: Counter) -> list[Row]:
    """Columns `prompt` (text or messages) and `completion`."""
    prompt = _messages_of(raw, "prompt")
    reply = {"role": "assistant", "content": _reply_of(raw, "completion")}
    return [{"key": _key(prompt), "messages": [*prompt, reply], "symmetric": False}]


def messages(raw: Row, dropped: Counter) -> list[Row]:
    """Column `messages`: a list of {"role", "content"}."""
    found = _messages_of(raw, "messages")
    if not any(m["role"] == "assistant" for m in found):
        raise UnusableRowError("no assistant turn")
    opening = next(m for m in found if m["role"] != "system")
    return [{"key": opening["content"], "messages": found, "symmetric": False}]


def preference(raw: Row, dropped: Counter) -> list[Row]:
    """Columns `prompt` (text or messages), `chosen` and `rejected` (text, or messages that end with the reply)."""
    prompt, chosen, rejected = _messages_of(raw, "prompt"), _reply_of(raw, "chosen"), _reply_of(raw, "rejected")
    return [_preference_row(prompt, chosen, rejected)]


def preference_dialogues(raw: Row, dropped: Counter) -> list[Row]:
    """Anthropic's format: `chosen` and `rejected` are whole dialogues that differ from some reply on."""
    chosen, rejected = _dialogue_of(raw, "chosen"), _dialogue_of(raw, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("chosen and rejected do not share their prompt")
    return [_preference_row(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])]


def chitchat(raw: Row, dropped: Counter) -> list[Row]:
    """A conversation of chitchat-dataset; the prompt is its topic, adjacent messages of one sender are one turn.

    Messages with an address, markup or profanity are left out and counted; where a whole turn falls away the
    conversation is cut, so that no reply follows a context that it did not follow.
    """
    if not {"id", "messages"} <= raw.keys():
        raise UnusableRowError("not a conversation of chitchat-dataset")
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


FORMATS: dict[str, Callable[[Row, Counter], list[Row]]] = {
    f.__name__: f for f in (text, prompt_completion, messages, preference, preference_dialogues, chitchat)
}


def alternating(turns: list[str]) -> list[Message]:
    """Turns as messages of alternating roles, the last of them the assistant's."""
    roles = ("assistant", "user")
    return [{"role": roles[(len(turns) - 1 - i) % 2], "content": turn} for i, turn in enumerate(turns)]


def _preference_row(prompt: list[Message], chosen: str, rejected: str) -> Row:
    if chosen == rejected:
        raise UnusableRowError("chosen equals rejected")
    return {"key": _key(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _key(prompt: list[Message]) -> str:
    return "\n".join(m["content"] for m in prompt)


def _text_of(raw: Row, column: str) -> str:
    if column not in raw:
        raise UnusableRowError(f"no column {column}")
    value = raw[column]
    if not isinstance(value, str):
        raise UnusableRowError(f"{column} is not text")
    if not value.strip():
        raise UnusableRowError(f"{column} is empty")
    return value.strip()


def _messages_of(raw: Row, column: str) -> list[Message]:
    if isinstance(raw.get(column), str):
        return [{"role": "user", "content": _text_of(raw, column)}]
    found = raw.get(column)
    if not found:
        raise UnusableRowError(f"no column {column}" if column not in raw else f"{column} is empty")
    if not isinstance(found, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
        raise UnusableRowError(f"{column} is not a list of messages with role and content")
    if not all(m["role"] in ("system", "user", "assistant") for m in found):
        raise UnusableRowError(f"{column} has a role other than system, user, assistant")
    return [{"role": m["role"], "content": _text_of(m, "content")} for m in found]


def _reply_of(raw: Row, column: str) -> str:
    return _text_of(raw, column) if isinstance(raw.get(column), str) else _messages_of(raw, column)[-1]["content"]


def _dialogue_of(raw: Row, column: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + _text_of(raw, column))
    if parts[0].strip() or len(parts) < 5:
        raise UnusableRowError(f"{column} does not alternate Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    found = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    if found[-1]["role"] != "assistant" or not found[-1]["content"]:
        raise UnusableRowError(f"{column} does not end with an assistant's reply")
    return found


ADDRESS_OR_MARKUP = re.compile(r"https?:|www\.|\S@\S+\.\w|<[^>]*>|\[[^\]]*\]\(", re.IGNORECASE)
WORD = re.compile(r"[a-z0-9$@*!'-]+")


@functools.cache
def _profanity() -> tuple[frozenset[str], tuple[str, ...]]:
    """Words, and phrases of several words, of the list in the package better-profanity (MIT)."""
    lines = Path(package_file("package:better_profanity/profanity_wordlist.txt")).read_text().lower().split("\n")
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
    dropped[reason] += 1
    return False
