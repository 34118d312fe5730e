"""Tasks with one right answer: problems that the project generates itself, as rows of {"prompt", "completion"}.

A generator gives the same problems in the same order every time. None occurs twice, not even with its terms exchanged,
and splits are made by prompt as for all data: what is held out occurs in no training data.
"""

import itertools
import random
from collections.abc import Callable

from pipeline.errors import UserError, nearest

Problems = list[dict[str, str]]


def arithmetic(seed: int = 0) -> Problems:
    """All sums and differences of two numbers from 0 to 99; `seed` decides which term of a sum comes first."""
    chance, found = random.Random(seed), []
    for low, high in itertools.combinations_with_replacement(range(100), 2):
        first, second = chance.sample([low, high], 2)
        found.append({"prompt": f"{first}+{second}", "completion": str(low + high)})
        found.append({"prompt": f"{high}-{low}", "completion": str(high - low)})
    return found


TASKS: dict[str, Callable[[], Problems]] = {f.__name__: f for f in (arithmetic,)}


def generator(path: str) -> Callable[[], Problems]:
    """The generator behind task:NAME. Raises `UserError` when there is no such task."""
    name = path.removeprefix("task:")
    if name not in TASKS:
        raise UserError(f"{path}: no such task{nearest(name, TASKS)}; there are {', '.join(TASKS)}")
    return TASKS[name]
