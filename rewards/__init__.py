"""What "good" means: reward functions by rule and learned, all with TRL's signature.

f(prompts, completions, **columns) -> list[float | None]    prompts, completions: one text each per row
"""

import functools
import importlib
import inspect
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
    for name in config.args:
        if name not in inspect.signature(function).parameters:
            raise UserError(f"{config.function}: has no argument {name}; see its args in the configuration")
    return functools.partial(function, **config.args) if config.args else function
