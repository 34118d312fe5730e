"""A prompt or completion as reward functions get it: a text, or chat messages as in TRL's conversational data."""

from threefold.data.formats import Message


def text_of(turn: str | list[Message]) -> str:
    """A prompt or completion as text: what its last message says."""
    return turn if isinstance(turn, str) else turn[-1]["content"]


def messages_of(turn: str | list[Message], role: str) -> list[Message]:
    """A prompt or completion as chat messages; a text is one message of `role`."""
    return [{"role": role, "content": turn}] if isinstance(turn, str) else turn
