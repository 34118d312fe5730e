"""Prompts that belong to one conversation: they are equal, or one is the beginning of the other."""

from threefold.columns import Message


def overlapping(prompts: list[list[Message]], others: list[list[Message]]) -> list[bool]:
    """Of each prompt whether it equals, begins or continues one of `others`."""
    conversations = {_turns(other) for other in others}
    beginnings = {turns[:end] for turns in conversations for end in range(1, len(turns) + 1)}
    return [_turns(prompt) in beginnings or _continues(_turns(prompt), conversations) for prompt in prompts]


def _turns(prompt: list[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in prompt)


def _continues(turns: tuple[tuple[str, str], ...], conversations: set[tuple[tuple[str, str], ...]]) -> bool:
    return any(turns[:end] in conversations for end in range(1, len(turns)))
