"""Tasks with one right answer: problems that the project generates itself, as rows of {"prompt", "completion"}.

A generator gives the same problems in the same order every time. None occurs twice, not even with its terms exchanged,
and splits are made by prompt as for all data: what is held out occurs in no training data.
"""

import itertools
import random
import string
from collections.abc import Callable

from threefold.errors import UserError, nearest

Problems = list[dict[str, str]]


def arithmetic(seed: int = 0) -> Problems:
    """All sums and differences of two numbers from 0 to 99; `seed` decides which term of a sum comes first."""
    chance, found = random.Random(seed), []
    for low, high in itertools.combinations_with_replacement(range(100), 2):
        first, second = chance.sample([low, high], 2)
        found.append({"prompt": f"{first}+{second}", "completion": str(low + high)})
        found.append({"prompt": f"{high}-{low}", "completion": str(high - low)})
    return found


WORDS = 10_000  # of the letter task
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th")


def letters(seed: int = 0) -> Problems:
    """A question on the letters of each of 10,000 random words of 3 to 6 letters; `seed` decides words and questions.

    No word occurs twice, not even spelt backwards, and none reads the same both ways.
    """
    chance, seen, found = random.Random(seed), set(), []
    while len(found) < WORDS:
        word = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(3, 6)))
        if word == word[::-1] or not seen.isdisjoint((word, word[::-1])):
            continue
        seen.add(word)
        place = chance.randrange(len(word))
        asked = {
            f"reverse {word}": word[::-1],
            f"sort {word}": "".join(sorted(word)),
            f"spell {word}": " ".join(word),
            f"{ORDINALS[place]} letter of {word}": word[place],
        }
        prompt = chance.choice(list(asked))
        found.append({"prompt": prompt, "completion": asked[prompt]})
    return found


TASKS: dict[str, Callable[[], Problems]] = {f.__name__: f for f in (arithmetic, letters)}


def generator(path: str) -> Callable[[], Problems]:
    """The generator behind task:NAME. Raises `UserError` when there is no such task."""
    name = path.removeprefix("task:")
    if name not in TASKS:
        raise UserError(f"{path}: no such task{nearest(name, TASKS)}; there are {', '.join(TASKS)}")
    return TASKS[name]
