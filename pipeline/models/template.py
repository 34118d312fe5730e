"""What a chat template writes: turns, their ends, marks, refusals, all read from how it renders plain conversations.

Nothing here looks for words in a template's source: a template may mention a token that it never writes.
"""

import datetime
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta

from threefold.columns import Message
from threefold.errors import UserError, nearest

SYSTEM, USER, REPLY, LATER = "qzxsystem", "qzxuser", "qzxreply", "qzxlater"  # contents that no template writes itself
PLAIN = {
    SYSTEM: {"role": "system", "content": SYSTEM},
    USER: {"role": "user", "content": USER},
    REPLY: {"role": "assistant", "content": REPLY},
    LATER: {"role": "user", "content": LATER},
}
SHAPES = {
    "a system message": (SYSTEM, USER),
    "a system message after a reply": (USER, REPLY, SYSTEM, LATER),
    "two user messages in a row": (USER, LATER),
    "a dialogue that the assistant begins": (REPLY, LATER),
    "a dialogue of several turns": (USER, REPLY, LATER),
}
THOUGHT = "<think>\nqzxthought\n</think>\n\n"  # before a reply, as most data and templates write it
FIXED = r"\{{# fixed #\}}\{{% {} %\}}\n"  # what `with_variables` writes
VARIANT = "{# TRL's variant for training #}"  # before one that took the place of the checkpoint's own
OPENED = "it opens a reply with"
SWITCHES = ("enable_thinking", "thinking")  # names by which templates let thinking blocks be switched off
DATE = "2026-01-01"  # where no configuration key gives one, as for a judge model
MARK = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)  # the spelling of a mark: no word, no white space, no comma
ROLE_NAMES = "system|user|assistant|human|chatbot|developer|role|turn|header"
TURN_NAME = re.compile(  # of special tokens in published checkpoints: <|eot_id|>, <|endoftext|>, </s>, <|pad|>, ...
    rf"(\w+_)?(im|eot|eom|bos|eos|(pad|reserved|unused|extra)\d*|{ROLE_NAMES})(_\w+)?|s|start|end|message|channel"
    r"|return|call|tool|observation|(begin|start|end)_?of_?(text|sentence|turn|message|role|prompt|document|seq)"
)
CLOCK = re.compile(r"\{% macro strftime_now\(format\) %\}.*?\{% endmacro %\}\n", re.DOTALL)
DIRECTIVE = re.compile(r"%-?[aAbBcdDeFgGhHIjlmMpSTuUVwWxXyY]")  # of strftime, without those for the time zone

ASKED = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1", re.DOTALL)  # a format that a template asks the clock for


def render(tokenizer: Any, messages: list[Message], generation_prompt: bool = True) -> str:
    """The messages as the chat template writes them. Raises `UserError` with its own words where it refuses them."""
    rendered, reason = _attempt(tokenizer, messages, generation_prompt)
    if reason is not None:
        raise refused(messages, reason)
    return rendered


def refused(messages: list[Message], reason: str) -> UserError:
    """The error that names a conversation which the chat template refuses."""
    roles, opening = ", ".join(m["role"] for m in messages[:6]), messages[0]["content"][:40]
    return UserError(f"its chat template refuses a dialogue ({roles}) that begins {opening!r}: {reason}")


@dataclass(frozen=True)
class Turn:
    """One reply within its conversation, as the template writes it: three texts that follow one another."""

    prompt: str  # up to where the model goes on
    completion: str  # what the model says itself: a thinking block that is left to it, the reply, the end token
    tail: str  # what the template adds for the next turn


def turns(
    tokenizer: Any, prompt: list[Message], replies: Iterable[str], end: str | None
) -> tuple[list[Turn], str | None]:
    """A turn for each reply, whose end token is `end`; and why the template cannot be trained on with one, or None."""
    given, reason = _attempt(tokenizer, prompt, True)
    written: list[Turn] = []
    for reply in replies if reason is None else ():
        turn, reason = _turn(tokenizer, prompt, given, reply, end)
        if turn is None:
            break
        written.append(turn)
    return written, reason


def _turn(
    tokenizer: Any, prompt: list[Message], given: str, reply: str, end: str | None
) -> tuple[Turn | None, str | None]:
    """The turn of a reply after `given`, the rendered prompt."""
    if end is None:
        return None, "it writes no end token after a reply"
    whole, reason = _attempt(tokenizer, [*prompt, {"role": "assistant", "content": reply}], False)
    if reason is not None:
        return None, reason
    if not whole.startswith(given):
        common = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(whole))
        return None, f"{OPENED} {given[max(given.rfind('<', 0, common), 0) :]!r}, and renders this one after other text"
    text, written_end, tail = whole[len(given) :].rpartition(end)
    if not written_end:
        return None, f"it writes no {end} after this reply"
    if reply.strip() not in text:
        asked, answered, wanted = ("".join(part.split()) for part in (given, given + text, reply))
        if answered.count(wanted) == asked.count(wanted):  # a thinking block may begin in the prompt
            return None, "it leaves a part of the reply out"
    return Turn(given, text + end, tail), None


def problem(tokenizer: Any) -> str | None:
    """Why nothing can be trained on as the chat template writes it; None where replies can, with thinking or without.

    Raises `UserError` where the template does not render a question and a reply.
    """
    if _takes_parts(tokenizer):
        return "its chat template takes messages in parts, of text and images, and no plain text; give it one for text"
    end = end_of_turn(tokenizer)
    if end is None:
        return (
            "its chat template writes no end token after a reply, so a model could not learn to stop; give it a "
            "template that ends replies with one token, as {{ eos_token }} does"
        )
    reasons = [turns(tokenizer, [PLAIN[USER]], [reply], end)[1] for reply in (REPLY, THOUGHT + REPLY)]
    return None if None in reasons else f"its chat template cannot be trained on: {reasons[0]}; {remedy(tokenizer)}"


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template renders a message as a list of parts, and not as a text."""
    parts = [{"role": "user", "content": [{"type": "text", "text": USER}]}]
    if refusal(tokenizer, [PLAIN[USER]]) is None:
        return False
    try:
        return USER in tokenizer.apply_chat_template(parts, tokenize=False)
    except Exception:  # as in `_attempt`
        return False


def remedy(tokenizer: Any) -> str:
    """What makes a template trainable that opens replies otherwise than it renders them."""
    source, end = tokenizer.chat_template, end_of_turn(tokenizer)
    for name in SWITCHES:
        if end and name in variables(source):
            tokenizer.chat_template = with_variables(source, {name: False})
            try:
                if turns(tokenizer, [PLAIN[USER]], [REPLY], end)[0]:
                    return f"set model.chat_template_kwargs={{{name}: false}}, or give replies that begin with <think>"
            finally:
                tokenizer.chat_template = source
    return "let the template's generation prompt end where the rendering of a reply begins"


def refusal(tokenizer: Any, messages: list[Message]) -> str | None:
    """Why the chat template cannot render the messages as a prompt, in its own words; None where it can."""
    return _attempt(tokenizer, messages, True)[1]


def _attempt(tokenizer: Any, messages: list[Message], generation_prompt: bool) -> tuple[str, str | None]:
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)
    except Exception as error:  # a template may do whatever an expression can
        return "", " ".join(str(error).split()) or type(error).__name__
    lost = [m["role"] for m in messages if m["role"] != "assistant" and m["content"].strip() not in rendered]
    return rendered, f"it leaves a {lost[0]} message out" if lost else None


def variables(source: str) -> set[str]:
    """The names that a template reads and does not define: messages, and switches such as enable_thinking."""
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)  # tags of transformers, which jinja does not know
    return jinja2.meta.find_undeclared_variables(
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    )


def with_variables(source: str, values: dict[str, Any]) -> str:
    """The template with variables of a fixed value: part of its text, so that every program renders the same.

    Raises `UserError` where the template does not read one.
    """
    if not values:
        return source
    for name in values:
        source = re.sub(FIXED.format(rf"set {name} = .*"), "", source)  # of an artifact that is a checkpoint
    read = variables(source)
    for name in values:
        if name not in read:
            raise UserError(f"model.chat_template_kwargs.{name}: its chat template reads no such variable"
                            f"{nearest(name, read)}; it reads {', '.join(sorted(read))}")  # fmt: skip
    fixed = (f"{{# fixed #}}{{% set {name} = {_literal(value)} %}}\n" for name, value in values.items())
    return "".join(fixed) + source


def fixed(source: str) -> list[str]:
    """What is fixed in the text of a template: its clock, variables, and that it is TRL's variant for training."""
    parts = ["the clock"] if CLOCK.search(source) else []
    parts += re.findall(FIXED.format(r"set (\w+ = .*)"), source)
    return parts + [VARIANT[3:-3]] * (VARIANT in source)


def _literal(value: Any) -> str:
    """A value of JSON's kinds as jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def counted(reasons: dict[str, int]) -> dict[str, dict[str, int]]:
    """How many prompts a chat template refuses for each reason, as entries of the metric `unusable`."""
    return {f"the chat template refuses it: {reason}": {"count": count} for reason, count in reasons.items()}


def refusals(tokenizer: Any) -> dict[str, str]:
    """The shapes of dialogues that the chat template refuses, each with its words."""
    reasons = {shape: refusal(tokenizer, [PLAIN[name] for name in names]) for shape, names in SHAPES.items()}
    return {shape: reason for shape, reason in reasons.items() if reason is not None}


def settle(tokenizer: Any, date: str | None = None) -> None:
    """Leave the tokenizer one chat template, the one that transformers would use, with its clock stopped at `date`.

    Without a date, a clock that is stopped already stays as it is, and a running one is stopped at `DATE`. Raises
    `UserError` where there are several templates and none is the default.
    """
    if isinstance(tokenizer.chat_template, dict):
        if "default" not in tokenizer.chat_template:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise UserError(f"none of its chat templates ({names}) is named default; name the one to use so")
        tokenizer.chat_template = tokenizer.chat_template["default"]
    if tokenizer.chat_template is not None and (date or not CLOCK.search(tokenizer.chat_template)):
        tokenizer.chat_template = with_date(tokenizer.chat_template, date or DATE)


def without_clock(source: str) -> str:
    """The template without a stopped clock: as its checkpoint has it."""
    return CLOCK.sub("", source, count=1)


def with_date(source: str, date: str) -> str:
    """The template `source` with a `strftime_now` of its own, which gives midnight of `date` whatever the clock says.

    It is part of the template's text, so that every program renders the same. trim_blocks removes the line break after
    it, as after every block. Raises `UserError` where the template asks for what a date does not tell.
    """
    source = without_clock(source)
    if "strftime_now" not in source:
        return source
    for _, wanted in ASKED.findall(source):
        if "%" in DIRECTIVE.sub("", wanted):
            raise UserError(
                f"its chat template asks the clock for {wanted!r}, of which a part cannot be fixed to a date; "
                "change that format in its chat template"
            )
    moment = datetime.datetime.fromisoformat(date)
    directives = sorted(set(DIRECTIVE.findall(source)))
    parts = "".join(f"|replace('{directive}', '{moment.strftime(directive)}')" for directive in directives)
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{source}"


def end_of_turn(tokenizer: Any) -> str | None:
    """The token that the template writes after a reply, with at most white space between; None where it writes none.

    Where several stand together and the tokenizer's end token is one of them (Cohere 2), it is that one. Raises
    `UserError` where the template does not render a question and a reply. A token that opens replies does not end one:
    an older template may write it after a reply without a generation prompt.
    """
    rendered = render(tokenizer, [PLAIN[USER], PLAIN[REPLY]], False)
    if REPLY not in rendered:
        raise UserError("its chat template leaves out what the assistant says as plain text")
    opening = rendered.partition(USER)[0].removeprefix(tokenizer.bos_token or "")
    tail = rendered.rpartition(REPLY)[2].lstrip()
    added = added_tokens(tokenizer)
    first = end = _token_at(tail, added)
    while end and end != tokenizer.eos_token:
        tail = tail.removeprefix(end)
        end = _token_at(tail, added)
    end = end or first
    prompt, _ = _attempt(tokenizer, [PLAIN[USER]], True)
    opens = end is not None and end in opening and opening.rfind(end) == max(map(opening.rfind, added))
    return None if opens and end in prompt.rpartition(USER)[2] else end


def added_tokens(tokenizer: Any) -> list[str]:
    """The tokens that part a text: special ones and others that are added to the vocabulary, without white space."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]


def _token_at(text: str, tokens: list[str]) -> str | None:
    """The longest of the tokens that the text begins with."""
    return max((token for token in tokens if text.startswith(token)), key=len, default=None)


def turn_marks(tokenizer: Any) -> list[str]:
    """The tokens that could open or close a turn if a message held them, longest first, then by their text.

    These are the special tokens that have a role (bos_token, eos_token and others, except unk_token), those that are
    named after turns (`TURN_NAME`), and the added tokens that the template writes around contents. Other special
    tokens, such as [TOOL_CALLS] or <unk>, stay text. Tokens that come as a pair of brackets, such as <think> and
    </think>, belong inside a turn: they are marks only where one of the two has a role (<s>, </s>) or the template puts
    a user's words between them ([INST], [/INST]).
    """
    named = {token for part, token in tokenizer.special_tokens_map.items() if part != "unk_token"}
    tokens = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    special = {*tokenizer.all_special_tokens, *(token for token, is_special in tokens.items() if is_special)}
    of_turns = named | {t for t in special if TURN_NAME.fullmatch(re.sub(r"[\W_]+", "_", t).strip("_").lower())}
    around, before_reply = _written(tokenizer)
    marks = {token for token in tokens if token in special or MARK.fullmatch(token)}
    written = {token for token in marks if any(token in text for text in around + before_reply)}
    within: set[str] = set()
    for opening, closing in brackets({*tokens, *special}):
        if not {opening, closing} & named and all(text.count(opening) == text.count(closing) for text in around):
            within |= {opening, closing}
    return sorted((of_turns | written) - within, key=lambda token: (-len(token), token))


def _written(tokenizer: Any) -> tuple[list[str], list[str]]:
    """What the template writes around what system and user say and after replies; and what it writes before replies."""
    around: list[str] = []
    before_reply: list[str] = []
    for names in [(USER,), (SYSTEM, USER), (USER, REPLY), (USER, REPLY, LATER)] if tokenizer.chat_template else []:
        for generation_prompt in (False, True):
            rendered, reason = _attempt(tokenizer, [PLAIN[name] for name in names], generation_prompt)
            if reason is None:
                *before, after = re.split("|".join(names), rendered)
                for name, text in zip(names, before, strict=False):
                    (before_reply if name == REPLY else around).append(text)
                (before_reply if generation_prompt else around).append(after)
    return around, before_reply


def brackets(tokens: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of tokens written as brackets: <x> and </x>, [x] and [/x], <|x|> and <|/x|>, <|x> and <x|>."""
    pairs = []
    for token in sorted(tokens):
        closings = [f"{token[:1]}/{token[1:]}", f"{token[:2]}/{token[2:]}"]
        if re.fullmatch(r"<\|\w+>", token):
            closings.append(f"<{token[2:-1]}|>")
        pairs += [(token, closing) for closing in closings if token[:1] in ("<", "[") and closing in tokens]
    return pairs
