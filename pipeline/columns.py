"""What a column of a raw row holds, checked: text, messages, a reply, a number; all else is refused with a reason."""

import ast
import contextlib
import json
import math
import re
from collections.abc import Collection
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

ROLES = ("system", "user", "assistant")


class UnusableRowError(Exception):
    """A row cannot be used; the message is the reason, short and the same for all rows with that defect."""


def text_of(raw: Row, column: str) -> str:
    """Text that is not blank, without white space at its ends."""
    if column not in raw:
        raise UnusableRowError(f"no column {column}")
    value = raw[column]
    if not isinstance(value, str):
        raise UnusableRowError(f"{column} is not text")
    if not value.strip():
        raise UnusableRowError(f"{column} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UnusableRowError(f"{column} has half of a character (a lone surrogate)")
    return value.strip()


def plain_text_of(raw: Row, column: str) -> str:
    """As `text_of`, for a prompt or a reply: messages that an export wrote as text are not text."""
    return text_of(raw | {column: value_of(raw, column)} if column in raw else raw, column)


# how messages begin where an export wrote them as text: brackets, perhaps dumped twice, then an object's first name
SPACE = r"(?:\s|\\[nrt])*"
OPENING = re.compile(rf"""{SPACE}(?:["']{SPACE})?(?:(?:array\s*)?[\[(]{SPACE})*\{{{SPACE}\\*["']""")
FIELDS = re.compile(r"""["'](role|content|from|value)\\*["']\s*:""")
READING_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def value_of(raw: Row, column: str) -> Any:
    """The value of a column that may hold messages; messages that an export wrote as text are read from it.

    Raises `UnusableRowError` where text begins as messages do and cannot be read as a list of them.
    """
    value = raw.get(column)
    if not isinstance(value, str) or not OPENING.match(value) or not _is_message(set(FIELDS.findall(value))):
        return value
    for read in (json.loads, ast.literal_eval, _shown_by_numpy):
        with contextlib.suppress(*READING_ERRORS):
            parsed = read(value.strip())
            if isinstance(parsed, str):  # dumped twice
                inner = value_of({column: parsed}, column)
                return value if isinstance(inner, str) else inner
            if isinstance(parsed, dict | list | tuple):
                return _messages_in(parsed, value, column)
    with contextlib.suppress(*READING_ERRORS):
        _, end = json.JSONDecoder().raw_decode(value.strip())
        if not OPENING.match(value.strip()[end:].lstrip(", ")):
            return value  # other words follow
    raise UnusableRowError(UNREADABLE.format(column))


UNREADABLE = "{} is a list of messages written as text, which cannot be read"


def _shown_by_numpy(text: str) -> Any:
    """A list as numpy and pandas write it: a line end alone may part its elements, and no string can hold one."""
    array = re.fullmatch(r"array\s*\((.*?)(?:,\s*dtype=\w+)?\)", text, re.DOTALL)
    return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "},{", array[1] if array else text))


def _messages_in(parsed: Any, text: str, column: str) -> Any:
    """What was parsed from `text` where that is messages; otherwise the text, as people write about JSON as well."""
    if isinstance(parsed, dict) and parsed.get("role") in ROLES and "content" in parsed:
        return [parsed]
    entries = list(parsed.values() if isinstance(parsed, dict) else parsed)
    if not any(map(_has_message, entries)):
        return text
    if isinstance(parsed, dict) or not all(isinstance(entry, dict) for entry in entries):
        raise UnusableRowError(UNREADABLE.format(column))
    return entries


def _has_message(entry: Any) -> bool:
    """Whether a parsed entry is a message, or holds one."""
    if isinstance(entry, dict):
        return _is_message(entry.keys()) or any(map(_has_message, entry.values()))
    return isinstance(entry, list | tuple) and any(map(_has_message, entry))


def _is_message(names: Collection[str]) -> bool:
    return {"role", "content"} <= set(names) or {"from", "value"} <= set(names)


def messages_of(raw: Row, column: str) -> list[Message]:
    """Messages; text is one message of the user."""
    turns = value_of(raw, column)
    if isinstance(turns, str):
        return [{"role": "user", "content": text_of(raw, column)}]
    if not turns:
        raise UnusableRowError(f"no column {column}" if column not in raw else f"{column} is empty")
    if not isinstance(turns, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in turns):
        raise UnusableRowError(f"{column} is not a list of messages with role and content")
    if not all(m["role"] in ROLES for m in turns):
        raise UnusableRowError(f"{column} has a role other than {', '.join(ROLES)}")
    return [{"role": m["role"], "content": text_of(m, "content")} for m in turns]


def dialogue_of(raw: Row, column: str) -> list[Message]:
    """Messages that end with a reply of the assistant; text is that reply alone."""
    if isinstance(value_of(raw, column), str):
        return [{"role": "assistant", "content": text_of(raw, column)}]
    messages = messages_of(raw, column)
    if messages[-1]["role"] != "assistant":
        raise UnusableRowError(f"{column} does not end with an assistant's reply")
    return messages


def number_of(raw: Row, column: str) -> float:
    """A finite number, which CSV gives as text."""
    if column not in raw:
        raise UnusableRowError(f"no column {column}")
    value = raw[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UnusableRowError(f"{column} is not a number")
    return number


def key_of(prompt: list[Message]) -> str:
    """The key of rows of one conversation: its first message of the user.

    All rows may share a system message or a greeting, and rows of one conversation may end at different turns.
    """
    spoken = [m for m in prompt if m["role"] != "system"] or prompt
    return next((m for m in spoken if m["role"] == "user"), spoken[0])["content"]
