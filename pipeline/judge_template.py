"""The question to a judge model, as a Jinja template. Imports no torch: a wrong template is answered at once."""

import functools
from collections.abc import Callable

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.columns import Message
from pipeline.errors import UserError

NEEDED = ("prompt", "reply_a", "reply_b")  # what a template must show of a pair
KEY = "evaluate.judge_model.template"


@functools.cache
def question(template: str, verdicts: tuple[str, str]) -> Callable[[list[Message], str, str], str]:
    """The function (prompt, reply A, reply B) → the text that the judge model is asked with.

    `prompt` is a list of messages with role and content; `verdicts` are at hand as `verdict_a` and `verdict_b`. Raises
    `UserError` for a template that cannot be rendered, or leaves out one of the three.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
        compiled = environment.from_string(template)
        words = {"verdict_a": verdicts[0], "verdict_b": verdicts[1]}
        compiled.render(prompt=[{"role": "user", "content": "?"}], reply_a="A", reply_b="B", **words)
    except (TemplateError, TypeError) as error:
        known = ", ".join((*NEEDED, "verdict_a", "verdict_b"))
        raise UserError(f"{KEY}: cannot be rendered ({error}); it is given {known}") from error
    if missing := [name for name in NEEDED if name not in used]:
        raise UserError(f"{KEY}: does not show {', '.join(missing)}; a judge must see the prompt and both replies")

    def render(prompt: list[Message], reply_a: str, reply_b: str) -> str:
        return compiled.render(prompt=prompt, reply_a=reply_a, reply_b=reply_b, **words)

    return render
