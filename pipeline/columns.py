"""What a column of a raw row holds, checked: text, messages, a reply, a number; all else is refused with a reason."""

import ast
import json
import math
import re
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


# text that begins and ends as messages do where an export wrote them as text, and names what messages have
WRITTEN = re.compile(r"\s*(\[\s*\{.*\}\s*\]|\{.*\})\s*", re.DOTALL)
FIELDS = re.compile(r"""["'](role|content|from|value)["']\s*:""")


def value_of(raw: Row, column: str) -> Any:
    """What a column that may hold messages has; messages that an export wrote as text are read from it."""
    value = raw.get(column)
    if not isinstance(value, str) or not WRITTEN.fullmatch(value):
        return value
    if not {"role", "content"} <= (names := set(FIELDS.findall(value))) and not {"from", "value"} <= names:
        return value
    for read in (json.loads, ast.literal_eval, _shown_by_numpy):
        try:
            return _messages_in(read(value.strip()), value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise UnusableRowError(f"{column} is a list of messages written as text, which cannot be read")


def _shown_by_numpy(text: str) -> Any:
    """A list as pandas writes it to CSV: between its elements stands a line end alone, which no string can hold."""
    return ast.literal_eval(re.sub(r"\}\s*\n\s*\{", "},{", text))


def _messages_in(parsed: Any, text: str) -> Any:
    """What was read from `text` where that is messages, and otherwise the text: people write about JSON as well."""
    if isinstance(parsed, dict):
        return [parsed] if parsed.get("role") in ROLES and "content" in parsed else text
    fields = [set(entry) if isinstance(entry, dict) else set() for entry in parsed]
    return parsed if all({"role", "content"} <= names or {"from", "value"} <= names for names in fields) else text


def messages_of(raw: Row, column: str) -> list[Message]:
    """Messages; text is one message of the user."""
    found = value_of(raw, column)
    if isinstance(found, str):
        return [{"role": "user", "content": text_of(raw, column)}]
    if not found:
        raise UnusableRowError(f"no column {column}" if column not in raw else f"{column} is empty")
    if not isinstance(found, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found):
        raise UnusableRowError(f"{column} is not a list of messages with role and content")
    if not all(m["role"] in ROLES for m in found):
        raise UnusableRowError(f"{column} has a role other than {', '.join(ROLES)}")
    return [{"role": m["role"], "content": text_of(m, "content")} for m in found]


def dialogue_of(raw: Row, column: str) -> list[Message]:
    """Messages that end with a reply of the assistant; text is that reply alone."""
    if isinstance(value_of(raw, column), str):
        return [{"role": "assistant", "content": text_of(raw, column)}]
    found = messages_of(raw, column)
    if found[-1]["role"] != "assistant":
        raise UnusableRowError(f"{column} does not end with an assistant's reply")
    return found


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
