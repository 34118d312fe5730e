"""The one error that people see: what is wrong, where, and what to do, on one line."""

import difflib
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


def require_most(left_out: int, of: int, share: float, key: str, what: str, share_key: str) -> None:
    """Raise `UserError` where the limit `key` leaves out all, or more than a `share` of what there is."""
    if left_out == of or left_out > share * of:
        allowed = f", or set {share_key} > {left_out / of:.3f}" if left_out < of else ""
        raise UserError(
            f"{key}: leaves out {left_out:,} of {of:,} {what} as too long; set it higher, or cut them{allowed}"
        )
