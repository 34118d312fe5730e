"""What "good" means: reward functions by rule and learned, all with TRL's signature.

f(prompts, completions, **columns) -> list[float | None]    prompts, completions: one text each per row
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError

RewardFunction = Callable[..., list[float | None]]


def load(config: Any) -> RewardFunction:
    """The function of a `reward` config group, with its `args` bound. Raises `UserError` when it is not there."""
    module, _, name = config.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{config.function}: no such reward function ({error})") from error
    return functools.partial(function, **config.args) if config.args else function
