"""What "good" means: reward functions by rule and learned, all with TRL's signature.

f(prompts, completions, **columns) -> list[float | None]    prompts, completions: one text each per row

PPO and the evaluation give the column `answer`: the data's own reply to each prompt.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from pipeline.errors import UserError

RewardFunction = Callable[..., list[float | None]]


def load(config: Any, columns: tuple[str, ...] = ("answer",)) -> RewardFunction:
    """The function of a `reward` config group, with its `args` bound.

    Raises `UserError` when it is not there, or cannot be called with prompts, completions and `columns`.
    """
    module, _, name = config.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{config.function}: no such reward function ({error})") from error
    for name in config.args:
        if name not in inspect.signature(function).parameters:
            raise UserError(f"{config.function}: has no argument {name}; see its args in the configuration")
    bound = functools.partial(function, **config.args) if config.args else function
    given = ("prompts", "completions", *columns)
    try:
        inspect.signature(bound).bind(**dict.fromkeys(given))
    except TypeError as error:
        raise UserError(f"{config.function}: {error}; it is given {', '.join(given)}") from error
    return bound
