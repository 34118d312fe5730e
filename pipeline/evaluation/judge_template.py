"""The question to a judge model, as a Jinja template. Imports no torch: a wrong template is answered at once."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

from jinja2 import StrictUndefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from threefold.columns import Message
from threefold.errors import UserError, first_line

NEEDED = ("prompt", "reply_a", "reply_b")  # what a template must show of a pair
KEY = "evaluate.judge_model.template"
LONGEST = 5  # seconds that one question may take to render


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without the operators that make a huge value in one step, which no signal interrupts."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        small = all(isinstance(value, int | float) and abs(value) < 2**64 for value in (left, right))
        if small and operator != "**":
            return super().call_binop(context, operator, left, right)
        raise SecurityError(f"a question does not multiply or format by {operator}")


@functools.cache
def question(template: str, verdicts: tuple[str, str]) -> Callable[[list[Message], str, str], str]:
    """The function (prompt, reply A, reply B) → the text that the judge model is asked with.

    `prompt` is a list of messages with role and content; `verdicts` are at hand as `verdict_a` and `verdict_b`. Both
    raise `UserError` for a template that cannot be rendered, and this one where it leaves out one of the three.
    """
    environment = _Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    words = {"verdict_a": verdicts[0], "verdict_b": verdicts[1]}
    with _one_line(), _limited():  # Jinja works constants out when it compiles
        used = meta.find_undeclared_variables(environment.parse(template))
        compiled = environment.from_string(template)

    def render(prompt: list[Message], reply_a: str, reply_b: str) -> str:
        with _one_line(), _limited():
            return compiled.render(prompt=prompt, reply_a=reply_a, reply_b=reply_b, **words)

    render([{"role": "user", "content": "?"}], "A", "B")
    if missing := [name for name in NEEDED if name not in used]:
        raise UserError(f"{KEY}: does not show {', '.join(missing)}; a judge must see the prompt and both replies")
    return render


@contextlib.contextmanager
def _one_line() -> Generator[None]:
    """Turn whatever an expression of the template can raise into a `UserError`."""
    try:
        yield
    except Exception as error:
        names = ", ".join((*NEEDED, "verdict_a", "verdict_b"))
        raise UserError(f"{KEY}: cannot be rendered ({first_line(error)}); it is given {names}") from error


@contextlib.contextmanager
def _limited() -> Generator[None]:
    """End what takes longer than `LONGEST`, such as loops in loops; only a process's main thread can be ended so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise TimeoutError(f"takes more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
