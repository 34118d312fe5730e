"""What a chat template writes: the end of a turn, marks, refusals, all read from how it renders plain conversations.

Nothing here looks for words in a template's source: a template may mention a token that it never writes.
"""

import datetime
import re
from typing import Any

from threefold.columns import Message
from threefold.errors import UserError

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
        roles, opening = ", ".join(m["role"] for m in messages[:6]), messages[0]["content"][:40]
        raise UserError(f"its chat template refuses a dialogue ({roles}) that begins {opening!r}: {reason}")
    return rendered


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


def with_date(source: str, date: str) -> str:
    """The template `source` with a `strftime_now` of its own, which gives midnight of `date` whatever the clock says.

    It is part of the template's text, so that every program renders the same. trim_blocks removes the line break after
    it, as after every block. Raises `UserError` where the template asks for what a date does not tell.
    """
    source = CLOCK.sub("", source, count=1)
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

    Raises `UserError` where the template does not render a question and a reply. A token that opens turns does not end
    one: an older template may write it after a reply without a generation prompt.
    """
    rendered = render(tokenizer, [PLAIN[USER], PLAIN[REPLY]], False)
    if REPLY not in rendered:
        raise UserError("its chat template leaves out what the assistant says as plain text")
    opening = rendered.partition(USER)[0].removeprefix(tokenizer.bos_token or "")
    tail = rendered.rpartition(REPLY)[2].lstrip()
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    end = max((token for token in added if tail.startswith(token)), key=len, default=None)
    opens = end is not None and end in opening and opening.rfind(end) == max(map(opening.rfind, added))
    return None if opens else end


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
    for opening, closing in _brackets({*tokens, *special}):
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


def _brackets(tokens: set[str]) -> list[tuple[str, str]]:
    """The pairs of tokens written as brackets: <x> and </x>, [x] and [/x], <|x|> and <|/x|>, <|x> and <x|>."""
    pairs = []
    for token in sorted(tokens):
        closings = [f"{token[:1]}/{token[1:]}", f"{token[:2]}/{token[2:]}"]
        if re.fullmatch(r"<\|\w+>", token):
            closings.append(f"<{token[2:-1]}|>")
        pairs += [(token, closing) for closing in closings if token[:1] in ("<", "[") and closing in tokens]
    return pairs
