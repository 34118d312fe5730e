"""Names of models: their order in the report, their words in a sentence, and the form of numbers."""

from collections.abc import Iterable

ORDER = ("human", "base", "sft", "dpo", "ppo")
REFERENCE = "sft"  # what aligned models are compared with
WORDS = {"human": "people", "base": "the base model", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of models as the report lists them; best-of-n stands behind the SFT model that it samples from."""
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: places.get(name, places[REFERENCE] + 0.5))


def said(name: str) -> str:
    """A model's name within a sentence."""
    return WORDS.get(name, name.replace("_", "-"))


def opening(sentence: str) -> str:
    """The sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def interval(bounds: Iterable[float], form: str) -> str:
    """Both ends of an interval, as [0.123, 0.456]."""
    return f"[{', '.join(format(bound, form) for bound in bounds)}]"
