"""Overrides as they were typed: text keys keep their text, where Hydra's grammar would read numbers out of it.

Hydra reads `run=2026_11_28` as a number and refuses `data.text.path=~/a=b.jsonl`. Here the type of a key decides: the
value of a text key is the text after "=", in quotes or not. `null`, `???` and interpolations are what they are.

A user's own folders beside conf/ are an override as well, Hydra's `hydra.searchpath`: so they go wherever overrides go,
into jobs of Slurm and runs of a sweep. People write and read `--config-dir FOLDER`.
"""

import functools
import re
import shlex
import types
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import DictConfig, OmegaConf

from threefold.config.names import GROUPS, REWARDS, choices, keys, nearest_key
from threefold.errors import UserError
from threefold.schema.config import Config

SEARCH_PATH = "hydra.searchpath"
NAME = re.compile(r"[A-Za-z_][\w.@/$:-]*")  # of a key or group
QUOTED = re.compile(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"")


class SeveralValuesError(UserError):
    """A key was given several values where it takes one."""


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

    Raises `UserError` for what is no override, and `SeveralValuesError` for what `threefold sweep` takes.
    """
    prefix, key, value = _split(text)
    kind = kind_of(key)
    _require_ours(text, key, value)
    if prefix == "~" or value is None:
        return cast(str, parse(text).input_line)
    if kind is str and (typed := _typed(text, value)) is not None:
        return f"{prefix}{assigned(key, typed)}"
    override = parse(text)
    if override.is_sweep_override():
        if get_origin(kind) is list:
            raise UserError(_no_list(key, value))
        raise SeveralValuesError(f"{text}: gives {key} several values{_decimal_point(value, kind)}")
    _require_kind(override.value(), text, kind)
    if not holds_text(kind) or not isinstance(override.value(), list | dict):
        return cast(str, override.input_line)
    return f"{prefix}{key}={override.get_value_element_as_str()}"


def _require_ours(text: str, key: str, value: str | None) -> None:
    """Raise `UserError` for keys that Hydra's grammar or Hydra itself would take, and that mean nothing here."""
    if value is None:
        return
    if not NAME.fullmatch(key):
        raise UserError(f"{text}: {f'{key} is no key' if key else 'names no key'}; overrides are written KEY=VALUE")
    if re.match(r"hydra\b", key) and key != SEARCH_PATH:
        raise UserError(f"{text}: {key} is a key of Hydra's that is not used here; {SEARCH_PATH} alone is")
    if key in ("stage", "section"):  # groups whose files are parts of every run
        raise UserError(f"{key} is not a configuration key{nearest_key(key)}")
    if key in GROUPS and re.fullmatch(r"|null|[\d.]+|true|false", value.strip(), re.IGNORECASE):
        none = f"; write {key}=[] for none" if key == "tasks" else ""
        raise UserError(f"{text}: names no choice; there are {', '.join(choices(key))}{none}")


def search_path(folders: Iterable[str | Path]) -> str:
    """The override that lets `conf/` find groups in a user's own folders as well; relative ones lie here."""
    places = dict.fromkeys(str(Path(folder).expanduser().absolute()) for folder in folders)
    return f"{SEARCH_PATH}=[{','.join(_quoted(f'file://{place}') for place in places)}]"


def own_folders(overrides: Iterable[str]) -> list[str]:
    """The user's own folders that `overrides` name; raises `UserError` where they are no list."""
    places: list[str] = []
    for text in (text for text in overrides if _split(text)[1] == SEARCH_PATH):
        value: Any = parse(text).value()
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError(_no_list(SEARCH_PATH, text.partition("=")[2]))
        places += [entry.removeprefix("file://") for entry in value]
    return places


def composed_in(overrides: list[str], folders: list[str]) -> list[str]:
    """`overrides` with one search path, of all `folders`: of several Hydra would read the first."""
    others = [text for text in overrides if _split(text)[1] != SEARCH_PATH]
    return [search_path(folders), *others] if folders else others


def as_arguments(overrides: Iterable[str]) -> str:
    """Overrides as they are given to a command, each quoted where the shell needs it."""
    words: list[str] = []
    for text in overrides:
        folders = own_folders([text])
        words += [word for folder in folders for word in ("--config-dir", folder)] if folders else [text]
    return shlex.join(words)


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


def _decimal_point(value: str, kind: Any) -> str:
    number = kind is float and re.fullmatch(r"\s*-?\d+,\d+\s*", value)
    return f"; write {value.strip().replace(',', '.')} with a decimal point" if number else ""


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
    if kind is float and (isinstance(value, bool | list | dict) or not _is_number(value)):
        raise UserError(f"{text}: must be a number")
    if is_dataclass(kind) and key.lstrip("+") not in GROUPS and not isinstance(value, dict):
        raise UserError(f"{text}: {_section(key.lstrip('+'))}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _section(key: str) -> str:
    """How to give a section of keys what was given to it as a whole."""
    if key in REWARDS:
        return f"{key} is a section; choose one with reward@{key}=NAME, or give {key}.function"
    if uses := [group for group in GROUPS if group.startswith(f"{key}@")]:
        return f"say what it is for: {', '.join(f'{use}=NAME' for use in uses)}"
    first = next(name for name in keys() if name.startswith(f"{key}."))
    return f"{key} is a section of keys; give one of them, for example {first}=VALUE"


def _no_list(key: str, written: str) -> str:
    return f"{key}={written}: {key.lstrip('+')} is a list; write {key}=[{written.strip('[] ')}]"


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
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text}: overrides are written KEY=VALUE{_meant(text)}"
    if not NAME.fullmatch(key.lstrip("+~")) or ".." in key or key.endswith("."):
        return f"{key} is not a configuration key{nearest_key(key.strip('+~.'))}"
    if kind_of(key.lstrip("+")) in (int, float) and re.match(r"[=:\s]", value):
        return f"{text}: must be a number"
    return f"{text}: cannot be read; put each text with spaces or other signs in quotes, for example 'a b'"


def _meant(word: str) -> str:
    """What someone who writes one word may mean."""
    from threefold.stages import STAGES

    key, colon, value = word.partition(":")
    if colon and kind_of(key) is not None:
        return f": {key}={value.strip()}"
    if word in STAGES:
        return f"; a stage is chosen with target={word}"
    for group in GROUPS:
        if word in choices(group):
            return f", for example {group}={word}"
    bare = word.lstrip("+~")
    return f", for example {bare}=VALUE" if NAME.fullmatch(bare) else ""


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
