"""What "good" means: reward functions by rule and learned, all with TRL's signature. docs/rewards.md lists them.

f(prompts, completions, **columns) -> list[float | None]    one entry per row; None: does not apply; higher is better

Every stage loads its reward here, from a `reward` group of the configuration. Importing this package imports no model.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from omegaconf import OmegaConf

from threefold.artifacts.digests import module_of
from threefold.errors import UserError, first_line
from threefold.rewards.composition import RewardFunction, Scores, composed
from threefold.rewards.messages import messages_of, text_of
from threefold.rewards.scores import one_line, scores

# further columns that the stages give to their rewards
GIVEN = {
    "comparisons": (),
    "ppo": ("answer", "prompt_ids", "completion_ids"),
    "frontier": ("answer",),
    "evaluate": ("answer",),
}


def functions(config: Any) -> dict[str, str | None]:
    """The functions of a `reward` config by import path; None is the learned reward model.

    Their names are the places in the config: "" for one function, "parts.NAME." for a part.
    """
    return {f"parts.{name}.": part.function for name, part in config.parts.items()} or {"": config.function}


def uses_model(config: Any) -> bool:
    """Whether a `reward` config needs the learned reward model, by itself or as a part."""
    return None in functions(config).values()


def name(config: Any) -> str:
    """What a `reward` config is called: its function's import path, or the names of its parts."""
    return " + ".join(config.parts) or config.function or "learned reward model"


def load(
    config: Any,
    columns: tuple[str, ...] = ("answer",),
    model: RewardFunction | None = None,
    gather: Callable[[Scores], Scores] = list,
) -> RewardFunction:
    """The reward function that a `reward` config describes.

    Its prompts are texts or lists of chat messages, its completions are texts; `columns` are the further columns it
    will be given. `model` is the learned reward model, and `gather` is that of `composed`. Raises `UserError` when a
    function is not there, refuses its `args`, or cannot be called with what it is given.
    """
    if not config.parts:
        return _loaded(config, columns, model)
    return composed({name: _loaded(part, columns, model) for name, part in config.parts.items()}, config.parts, gather)


def _loaded(config: Any, columns: tuple[str, ...], model: RewardFunction | None) -> RewardFunction:
    """One function, given what its config asks for, and held to a score for each completion."""
    if config.function is None:
        return cast(RewardFunction, model)  # None only where nothing is scored with it
    renamed = {column: config.columns.get(column, column) for column in ("prompts", "completions", *columns)}
    for column in config.columns:
        if column not in renamed:
            raise UserError(f"{config.function}: columns names {column}, but there are {', '.join(renamed)}")
    arguments = OmegaConf.to_container(config.args, resolve=True) if OmegaConf.is_config(config.args) else config.args
    function = _bound(config.function, arguments, tuple(renamed.values()))

    def reward(prompts: list[Any], completions: list[str], **given: Any) -> Scores:
        rows = {"prompts": [text_of(prompt) for prompt in prompts], "completions": completions, **given}
        if config.messages:
            rows["prompts"] = [messages_of(prompt, "user") for prompt in prompts]
            rows["completions"] = [messages_of(text, "assistant") for text in completions]
        rows = {renamed.get(column, column): values for column, values in rows.items()}
        return scores(config.function, function, rows, completions, config.messages)

    return reward


def _bound(path: str, arguments: Any, given: tuple[str, ...]) -> Callable[..., Any]:
    """The function at `path` with its arguments, which can be called with the columns `given`.

    One that takes neither further columns nor any of `given` makes the reward function from the arguments, as TRL's
    get_repetition_penalty_reward does.
    """
    function = _imported(path)
    with one_line(path):
        try:
            parameters = inspect.signature(function).parameters
            for argument in arguments:
                if argument not in parameters:
                    raise UserError(f"{path}: has no argument {argument}; see its args in the configuration")
            if any(p.kind is p.VAR_KEYWORD or p.name in given for p in parameters.values()):
                bound = functools.partial(function, **arguments)
            else:
                bound = function(**arguments)
            inspect.signature(bound).bind(**dict.fromkeys(given))
        except TypeError as error:
            raise UserError(
                f"{path}: {first_line(error)}; it is given {', '.join(given)}; columns renames these"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}: {first_line(error)}") from error
    return bound


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    with one_line(path):
        try:
            return getattr(importlib.import_module(module_of(module)), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{path}: no such reward function ({first_line(error)})") from error
