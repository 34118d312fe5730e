"""Threefold: text to an aligned chat model in three stages. `threefold.api` has what a program or notebook needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threefold.api import Run, compose, make, open_run, status
    from threefold.errors import UserError

__all__ = ["Run", "UserError", "compose", "make", "open_run", "status"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import what is asked for only then, so that the command line answers at once."""
    if name in __all__:
        return getattr(import_module("threefold.errors" if name == "UserError" else "threefold.api"), name)
    raise AttributeError(f"module 'threefold' has no attribute {name!r}")
