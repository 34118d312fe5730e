"""What people's reward functions do wrong, in one line: how they fail, and what they give that is no list of scores."""

import asyncio
import contextlib
import copy
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Generator
from decimal import Decimal
from pathlib import Path
from typing import Any

from threefold.errors import UserError, first_line, queued_again
from threefold.rewards.composition import Scores

LARGEST = 3.4e38  # that fp32 holds
SHOWN = 40  # characters of a reply in a message


@contextlib.contextmanager
def one_line(name: str) -> Generator[None]:
    """Raises `UserError` with the `name` of a function for whatever its code raises, and where it ends Python."""
    try:
        yield
    except UserError:
        raise
    except SystemExit as error:
        if queued_again(error):
            raise
        raise UserError(f"{name}: called sys.exit({error.code!r}); it must raise an error instead") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a cancelled asynchronous function
        raise UserError(f"{name}: {described(error)}") from error


def described(error: BaseException) -> str:
    """An error as the type, the words, and the line of people's own code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename or '').name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    frame = ([f for f in frames if "site-packages" not in f.filename] or frames)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(frame.filename).name}, line {frame.lineno})"


def scores(
    name: str, function: Callable[..., Any], rows: dict[str, list[Any]], completions: list[str], messages: bool
) -> Scores:
    """One finite number or None for each row, of what `function` gives for a copy of the columns `rows`.

    Raises `UserError` with its `name`, and the row where there is one: its number, and how its reply begins. `messages`
    says that the columns hold chat messages.
    """
    try:
        given = _called(name, function, rows)
    except UserError as error:
        row = _failing(name, function, rows, completions)
        raise UserError(f"{error}; {row}{_advice(error, messages)}") from error
    listed = _listed(name, given, len(completions))
    return [_number(f"{name}: gives", score, row_of(i, completions)) for i, score in enumerate(listed)]


def _called(name: str, function: Callable[..., Any], rows: dict[str, list[Any]]) -> Any:
    with one_line(name):
        result = function(**copy.deepcopy(rows))
        return asyncio.run(result) if inspect.isawaitable(result) else result  # TRL takes asynchronous ones as well


def _advice(error: UserError, messages: bool) -> str:
    """What to try where a function may have wanted its prompts and completions in the other form."""
    if not isinstance(error.__cause__, TypeError | KeyError | AttributeError | IndexError):
        return ""
    shown, other = ("lists of chat messages", "texts") if messages else ("texts", "lists of chat messages")
    return f"; it is given {shown}, with messages={str(not messages).lower()} {other}"


def _failing(name: str, function: Callable[..., Any], rows: dict[str, list[Any]], completions: list[str]) -> str:
    """The row that a function fails at, found by halves; where it fails at no row alone, how many there were."""
    start, end = 0, len(completions)
    while end - start > 1:
        middle = (start + end) // 2
        for half in ((start, middle), (middle, end)):
            try:
                _called(name, function, {column: values[slice(*half)] for column, values in rows.items()})
            except UserError:
                start, end = half
                break
        else:
            return f"at {end - start} rows from {row_of(start, completions)} on"
    return f"at {row_of(start, completions)}" if completions else "at no rows"


def row_of(index: int, completions: list[str]) -> str:
    """A row as messages name it: its number, from 1, and how its reply begins."""
    text = completions[index]
    return f"row {index + 1}, {text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'!r}"


def _listed(name: str, given: Any, count: int) -> list[Any]:
    """The entries of a list, tuple or array of `count` scores; raises `UserError` for anything else."""
    wanted = f"must give a list of {count} scores"
    if given is None:
        raise UserError(f"{name}: gives None; it {wanted}, is a return missing?")
    if not isinstance(given, list | tuple):
        shape = getattr(given, "shape", None)
        if shape is None or not hasattr(given, "tolist"):
            raise UserError(f"{name}: gives a {type(given).__name__}; it {wanted}")
        if len(shape) != 1:
            raise UserError(f"{name}: gives a {type(given).__name__} of shape {tuple(shape)}; it {wanted}")
        given = given.tolist()
    if len(given) != count:
        raise UserError(f"{name}: gives {len(given)} scores to {count} completions")
    return list(given)


def _number(name: str, score: Any, row: str) -> float | None:
    """A score as a number, None as it is; raises `UserError` for what is none, or not finite in fp32."""
    if score is None:
        return None
    if hasattr(score, "item") and getattr(score, "shape", None) == ():  # of NumPy, or a tensor
        score = score.item()
    if not isinstance(score, numbers.Real | Decimal):
        raise UserError(f"{name} a {type(score).__name__} to {row}; a score is a number, or None where none applies")
    if not abs(number := _float(score)) <= LARGEST:
        shown = "a number too large for fp32" if isinstance(score, int) else number
        raise UserError(f"{name} {shown} to {row}; a score is finite, or None where none applies")
    return number


def _float(score: numbers.Real | Decimal) -> float:
    """A score as Python's float; infinite where it holds no number as large, not a number where it is none."""
    try:
        return float(score)
    except OverflowError:
        return math.inf
    except ValueError:  # of Decimal("sNaN")
        return math.nan


def require_all(name: str, given: Scores, completions: list[str]) -> list[float]:
    """The scores. Raises `UserError` with the reward's `name` and the row where it applies to none; PPO needs all."""
    if None in given:
        row = row_of(given.index(None), completions)
        raise UserError(f"{name}: gives no score (None) to {row}; PPO needs a reward that applies to all")
    return [score for score in given if score is not None]
