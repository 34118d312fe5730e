"""The one error that people see: what is wrong, where, and what to do, on one line."""

import difflib
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """Bad input or configuration. The command line prints its message on one line and exits with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt `name`, as " (nearest: ppo.kl_coef)", or the empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (nearest: {found[0]})" if found else ""


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def queued_again(error: SystemExit) -> bool:
    """Whether Python ends because Slurm signalled and submitit, in its signal handler, has queued the job again."""
    return any("submitit" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-1:])
