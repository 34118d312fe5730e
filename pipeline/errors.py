"""The one error that people see: what is wrong, where, and what to do, on one line."""

import difflib
import re
import traceback
from collections.abc import Iterable

# an address before its user, and the user with the password: all up to the last @ of the authority (RFC 3986, 3.2), or
# what a password with unescaped signs makes of it
URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?#@\"<>]+:(?![0-9]*[/?#])[^\s\"<>]*|[^\s/?#\"<>]*)@")
USER_ALONE = re.compile(r"(?<![\w:/])//[^\s/?#@:\"<>]+:[^\s/?#@\"<>]+@")  # of an address without its scheme
SECRETS: dict[str, str] = {}  # value that the environment gives → the interpolation that stands for it


class UserError(Exception):
    """Bad input or configuration. The command line prints its message on one line and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(public(message))


def public(text: str) -> str:
    """`text` as it may be shown and kept: URLs without user and password, secrets by the names of their variables."""
    for value in sorted(SECRETS, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(value, SECRETS[value])
    return USER_ALONE.sub("//", URL_USER.sub(r"\1", text))


def public_traceback(error: BaseException) -> str:
    """The traceback of an error as it may be shown and kept."""
    return public("".join(traceback.format_exception(error)))


def nearest(name: str, names: Iterable[str]) -> str:
    """A suggestion for a misspelt `name`, as " (nearest: ppo.kl_coef)", or the empty string."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {matches[0]})" if matches else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    return public((str(error).strip() or type(error).__name__).splitlines()[0])


def queued_again(error: SystemExit) -> bool:
    """Whether Python ends because Slurm signalled and submitit, in its signal handler, has queued the job again.

    The handler is not always the last to be called: W&B puts a function of its own in the place of `sys.exit`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith("submitit/core/job_environment.py") for frame in frames)


def require_most(left_out: int, of: int, share: float, key: str, what: str, share_key: str) -> None:
    """Raise `UserError` where the limit `key` leaves out all, or more than a `share` of what there is."""
    if left_out == of or left_out > share * of:
        allowed = f", or set {share_key} > {left_out / of:.3f}" if left_out < of else ""
        raise UserError(
            f"{key}: leaves out {left_out:,} of {of:,} {what} as too long; set it higher, or cut them{allowed}"
        )
