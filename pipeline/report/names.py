"""Names of models: their order in the report, their words in a sentence, and the form of numbers."""

from collections.abc import Iterable

ORDER = ("human", "base", "sft", "dpo", "ppo")
REFERENCE = "sft"  # what aligned models are compared with
WORDS = {"human": "people", "base": "the base model", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}


def in_order(names: Iterable[str]) -> list[str]:
    """Names as the report lists them: ways to decode behind the model they sample from, other runs' models last."""
    return sorted(names, key=lambda name: (_place(name), len(name), name))


def _place(name: str) -> float:
    if name in ORDER:
        return ORDER.index(name)
    model = name.partition("_")[0]
    return len(ORDER) if "/" in name else ORDER.index(model if model in ORDER else REFERENCE) + 0.5


def display_name(name: str) -> str:
    """A model's name within a sentence."""
    return WORDS.get(name, name.replace("_", "-"))


def opening(sentence: str) -> str:
    """The sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]
