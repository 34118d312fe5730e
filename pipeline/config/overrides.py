"""Overrides as they were typed: text keys keep their text, where Hydra's grammar would read numbers out of it.

Hydra reads `run=2026_11_28` as a number and refuses `data.text.path=~/a=b.jsonl`. Here the type of a key decides: the
value of a text key is the text after "=", in quotes or not. `null`, `???` and interpolations are what they are.
"""

import functools
import re
import types
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_args, get_origin

from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf

from threefold.errors import UserError
from threefold.schema.config import Config

QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"")


class Typed(str):
    """A number or truth value as it was typed, with its `value`."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "Typed":
        """The text, which knows its value."""
        typed = super().__new__(cls, text)
        typed.value = value
        return typed


class _Visitor(HydraOverrideVisitor):
    """Hydra's, but for numbers and truth values, which keep their text."""

    def _createPrimitive(self, ctx: Any) -> Any:
        value = super()._createPrimitive(ctx)
        return Typed(ctx.getText().strip(), value) if isinstance(value, int | float) else value

    def visitFunction(self, ctx: Any) -> Any:
        if ctx.getChild(0).getText() == "choice":
            return super().visitFunction(ctx)
        return HydraOverrideVisitor(self.functions).visitFunction(ctx)  # range(1, 5) needs numbers


def as_typed(text: str) -> str:
    """The override `text` in Hydra's grammar, with the text of text keys in quotes.

    Raises `UserError` for what is no override, and for several values, which `threefold sweep` takes.
    """
    prefix, key, value = _split(text)
    kind = kind_of(key)
    if prefix == "~" or value is None:
        return cast(str, parse(text).input_line)
    if kind is str and (typed := _typed(text, value)) is not None:
        return f"{prefix}{assigned(key, typed)}"
    override = parse(text)
    if override.is_sweep_override():
        raise UserError(_several(text, key, value, kind))
    _require_kind(override.value(), text, kind)
    if not holds_text(kind) or not isinstance(override.value(), list | dict):
        return cast(str, override.input_line)
    return f"{prefix}{key}={override.get_value_element_as_str()}"


def _typed(text: str, value: str) -> str | None:
    """All that was typed for a text key; None where that is null or a sweep in so many words."""
    try:
        element = _parsed(text)._value
    except HydraException:
        return value.strip()
    if isinstance(element, QuotedString):
        return element.text
    if isinstance(element, ChoiceSweep) and element.simple_form:
        return None if any(isinstance(entry, QuotedString) for entry in element.list) else value.strip()
    if element is None or isinstance(element, Sweep):
        return None
    is_call = re.match(r"\s*\w+\s*\(", value)  # str(5), Hydra's way to write a text
    return str(element) if isinstance(element, str) and not is_call else value.strip()


def _several(text: str, key: str, value: str, kind: Any) -> str:
    if get_origin(kind) is list:
        return _no_list(key, value)
    number = kind is float and re.fullmatch(r"\s*-?\d+,\d+\s*", value)
    point = f"; write {value.strip().replace(',', '.')} with a decimal point" if number else ""
    return f"{text}: several values are for `threefold sweep`; give one, or quote a text that has a comma{point}"


def _require_kind(value: Any, text: str, kind: Any) -> None:
    """Raise `UserError` where a value has another form than its key: no list, no mapping, or no whole number."""
    if value is None or (isinstance(value, str) and ("${" in value or value == "???")):
        return
    key, _, written = text.partition("=")
    if get_origin(kind) is list and not isinstance(value, list):
        raise UserError(_no_list(key, written))
    if get_origin(kind) is dict and not isinstance(value, dict):
        raise UserError(f"{text}: {key} is a mapping; write {key}={{NAME: VALUE}}")
    if kind is int and not (type(value) is int or (isinstance(value, str) and value.lstrip("+-").isdecimal())):
        raise UserError(f"{text}: must be a whole number, written without point and exponent")
    if kind is float and isinstance(value, bool | list | dict):
        raise UserError(f"{text}: must be a number")


def _no_list(key: str, written: str) -> str:
    return f"{key}={written}: {key.lstrip('+')} is a list; write {key}=[{written}]"


def assigned(key: str, text: str) -> str:
    """An override that gives `key` exactly this text."""
    return f"{key}={_quoted(text)}"


def parse(text: str) -> Override:
    """An override, or a sweep over one, with the values of its key's type. Raises `UserError` for what is none."""
    kind = kind_of(_split(text)[1])
    try:
        override = _parsed(text)
    except HydraException as error:
        override = _in_quotes(text, kind, error)
    element = override._value
    if number := _number_as_name(element, kind):
        raise UserError(
            f"{text}: the name {number} is read as a number or truth value; write it in quotes in a file of conf"
        )
    if isinstance(element, ChoiceSweep):
        texts = kind is str  # compose takes them as typed
        element.list = [str(e) if texts and isinstance(e, Typed) else fitted(e, kind) for e in element.list]
    else:
        override._value = fitted(element, kind)
    return override


def _in_quotes(text: str, kind: Any, error: HydraException) -> Override:
    """An override with characters that Hydra's grammar does not have in text: as if its texts were quoted."""
    prefix, key, value = _split(text)
    value = (value or "").strip()
    listed = kind == list[str] and value.startswith("[") and value.endswith("]")
    if value and not listed and get_origin(kind) is list:
        raise UserError(_no_list(f"{prefix}{key}", value)) from error
    if not value or not (kind is str or listed):
        raise UserError(_unreadable(text)) from error
    entries = [entry.strip() for entry in (value[1:-1] if listed else value).split(",")]
    quoted = ",".join(entry if QUOTED.fullmatch(entry) else _quoted(entry) for entry in entries)
    try:
        return _parsed(f"{prefix}{key}={f'[{quoted}]' if listed else quoted}")
    except HydraException:
        raise UserError(_unreadable(text)) from error


def _unreadable(text: str) -> str:
    key = text.partition("=")[0]
    if key == text:
        return f"{text}: overrides are written KEY=VALUE, for example {key.lstrip('+~') or 'run'}=VALUE"
    return f"{text}: cannot be read; put each text with spaces or other signs in quotes, for example 'a b'"


def _number_as_name(value: Any, kind: Any) -> str | None:
    """A number or truth value that stands for a name within a mapping of type `kind`; Hydra has no quotes there."""
    if not isinstance(value, dict) or not (is_dataclass(kind) or get_origin(kind) is dict):
        return None
    names = (
        str(n) if isinstance(n, Typed) else _number_as_name(entry, _below(kind, str(n))) for n, entry in value.items()
    )
    return next(filter(None, names), None)


def fitted(value: Any, kind: Any) -> Any:
    """A parsed value with text where its type `kind` has text, and numbers and truth values where it has not."""
    if isinstance(value, list):
        inner = get_args(kind)[0] if get_origin(kind) is list else None
        return [fitted(entry, inner) for entry in value]
    if isinstance(value, dict):
        # names stay unquoted: Hydra's grammar has no quotes there
        return {
            str(name) if isinstance(name, Typed) else name: fitted(entry, _below(kind, str(name)))
            for name, entry in value.items()
        }
    if isinstance(value, Typed):
        return QuotedString(str(value), Quote.single) if kind is str else value.value
    if isinstance(value, str) and "${" in value:  # Hydra would escape its signs
        return QuotedString(value, Quote.single)
    return value


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def kind_of(key: str) -> Any:
    """The type of a key by the schema, without its "or null"; None for one of few words, and for unknown keys."""
    kind: Any = Config
    for name in key.split("."):
        kind = _below(kind, name)
    return kind


def holds_text(kind: Any) -> bool:
    """Whether values of a type are text, or have text among their parts."""
    if is_dataclass(kind):
        return any(holds_text(_plain(entry.type)) for entry in fields(kind))
    return kind is str or any(holds_text(part) for part in get_args(kind))


def _below(kind: Any, name: str) -> Any:
    """The type of what is called `name` within a value of type `kind`."""
    if is_dataclass(kind):
        entry = next((entry for entry in fields(kind) if entry.name == name), None)
        return _plain(entry.type) if entry and "choices" not in entry.metadata else None
    if get_origin(kind) in (dict, list):
        return _plain(get_args(kind)[-1])
    return None


def _plain(kind: Any) -> Any:
    """A type without its "or null"."""
    if isinstance(kind, types.UnionType):
        return next(part for part in get_args(kind) if part is not types.NoneType)
    return kind


def _split(text: str) -> tuple[str, str, str | None]:
    """What stands before the key of an override, the key, and its value if it has one."""
    key, equals, value = text.partition("=")
    bare = key.lstrip("+~")
    return key[: len(key) - len(bare)], bare, value if equals else None


@functools.cache
def _functions() -> Any:
    return create_functions()


def _parsed(text: str) -> Override:
    """What Hydra's `OverridesParser.parse_rule` gives, with our visitor."""
    lexer = OverrideLexer(InputStream(text))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    override = _Visitor(_functions()).visit(parser.override())
    override.input_line = text
    override.validate()
    return override


def register_own_limit() -> None:
    """Let `conf/` write ${own_limit:N} for a limit of `data.dialogue` that holds for one data set, and for no other."""
    OmegaConf.register_new_resolver("own_limit", _own_limit, replace=True)


def _own_limit(limit: int, *, _root_: DictConfig) -> int | None:
    return limit if _root_.data.replies.path == _root_.data.limits_for else None
