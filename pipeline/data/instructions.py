"""Instructions that a program can check (IFEval, Zhou et al. 2023, arXiv 2311.07911), by the package if-verifiable.

The package holds Google's own checkers. It is an extra, so it is imported where a row or a reply is checked.
"""

import functools
import re
from typing import Any

from threefold.columns import Row, UnusableRowError
from threefold.errors import UserError

SAMPLE = "A sentence of a few words."  # that every instruction of a row is tried on


@functools.cache
def _library() -> Any:
    """The package, which then finds the same language in a text every time."""
    try:
        import if_verifiable
        import langdetect
    except ImportError as error:
        said = "format=ifeval: needs the package if-verifiable; install it with: pip install 'threefold[ifeval]'"
        raise UserError(said) from error
    langdetect.DetectorFactory.seed = 0
    return if_verifiable


def read(raw: Row) -> list[dict[str, Any]]:
    """The instructions of a row, each {"id", "kwargs"}. Raises `UnusableRowError` for one that cannot be checked."""
    names, kwargs = (_listed(raw, column) for column in ("instruction_id_list", "kwargs"))
    if not names:
        raise UnusableRowError("instruction_id_list is empty")
    if len(names) != len(kwargs):
        raise UnusableRowError("instruction_id_list and kwargs differ in length")
    if not all(isinstance(given, dict) for given in kwargs):
        raise UnusableRowError("kwargs is not a list of objects")
    found = [
        {"id": name, "kwargs": {key: value for key, value in given.items() if value is not None}}
        for name, given in zip(names, kwargs, strict=True)
    ]
    for instruction in found:
        _try(**instruction)
    return found


def _listed(raw: Row, column: str) -> list[Any]:
    if column not in raw:
        raise UnusableRowError(f"no column {column}")
    if not isinstance(raw[column], list):
        raise UnusableRowError(f"{column} is not a list")
    return raw[column]


def _try(id: str, kwargs: dict[str, Any]) -> None:
    """Check a text once. What a row leaves out the checkers would draw by chance, so all that they take is needed."""
    _library()
    from if_verifiable.ifeval import INSTRUCTION_DICT

    if id not in INSTRUCTION_DICT:
        raise UnusableRowError(f"IFEval has no instruction {id}")
    checker = INSTRUCTION_DICT[id](id)
    if lacking := [key for key in checker.get_instruction_args_keys() if key not in kwargs]:
        raise UnusableRowError(f"{id} lacks {lacking[0]} in kwargs")
    try:
        checker.build_description(**kwargs)
        checker.check_following(SAMPLE)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnusableRowError(f"{id} does not take its kwargs") from error
    except re.error as error:
        raise UnusableRowError(f"{id} has kwargs that are no regular expression") from error
    except LookupError as error:  # as nltk says that it lacks its data
        raise UnusableRowError(f"{id} needs data of nltk (python -m nltk.downloader punkt_tab)") from error


def followed(prompt: str, instructions: list[dict[str, Any]], reply: str) -> dict[str, list[bool]]:
    """Whether a reply follows each instruction, strictly, and in one of the loose readings of IFEval.

    Loosely it may lack its first or last line or both, and its asterisks. An empty reply follows none.
    """
    library = _library()
    names, kwargs = ([instruction[key] for instruction in instructions] for key in ("id", "kwargs"))
    row = library.IFEvalSample(key=0, prompt=prompt, instruction_id_list=names, kwargs=kwargs)
    results, _ = library.evaluate_output_for_sample("ifeval", row, reply)
    if not results:
        return {"strict": [False] * len(names), "loose": [False] * len(names)}
    return {"strict": [r.strict_pass for r in results], "loose": [r.loose_pass for r in results]}
