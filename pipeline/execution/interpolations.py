"""Values that the environment gives, `${oc.env:NAME}`: used as they are, saved as they were written.

A composed configuration holds them as interpolations, which OmegaConf resolves wherever a value is read, and which stay
interpolations wherever a configuration is saved. User and password of a URL are moved into the environment, so that
the same holds for them.
"""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold.errors import SECRETS, URL_USER, UserError

FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^\s,{}$]*)")  # with the name of the variable
USERS = "THREEFOLD_USER_"  # how the variables begin that users of URLs are moved into
REFERENCE = re.compile(r"\$\{(\.*[\w@][\w.@]*)\}")  # ${data.preferences.path}, or from the same section ${.path}
SHORTEST = 6  # characters of a secret; shorter ones are none, and occur in other words

Path = tuple[str | int, ...]  # names and numbers of list entries, from the whole configuration downwards


def resolve(config: DictConfig) -> None:
    """Resolve every interpolation of `config` but those of the environment, and take the users out of its URLs.

    What refers to a key that the environment gives becomes that interpolation itself. Raises OmegaConf's errors for
    what cannot be resolved, and `UserError` for a secret that would be saved as it is.
    """
    written = OmegaConf.to_container(config)
    OmegaConf.resolve(config)
    resolved = OmegaConf.to_container(config)
    for path, value in leaves(resolved):
        text = _closed(*_followed(written, path), written, resolved)
        if isinstance(text, str) and FROM_ENVIRONMENT.search(text):
            at(config, path[:-1])[path[-1]] = text
        elif isinstance(value, str) and URL_USER.search(value):
            at(config, path[:-1])[path[-1]] = _without_users(value, path)
    note_secrets(config)
    for path, value, text in _valued(config):
        _require_no_secret(path, value, text, written)


def note_secrets(config: DictConfig) -> None:
    """Have what the environment gives stand in no error and no traceback, but for files and folders that exist."""
    for _, value, text in _valued(config):
        if isinstance(value, str) and text != value and not _exists(value):
            variables = FROM_ENVIRONMENT.findall(text)
            if len(value) >= SHORTEST and ("" in variables or any(name in os.environ for name in variables)):
                SECRETS[value] = text
            note_variables(text)


def note_variables(written: Any) -> None:
    """Note what the variables are set to that stand in a text, or in the texts of a section or list."""
    if isinstance(written, dict | list):
        for entry in written.values() if isinstance(written, dict) else written:
            note_variables(entry)
        return
    for name in FROM_ENVIRONMENT.findall(written) if isinstance(written, str) else ():
        value = os.environ.get(name, "")
        only_a_user = name.startswith(USERS) and ":" not in value
        if len(value) >= SHORTEST and not only_a_user and not _exists(value):
            SECRETS.setdefault(value, f"${{oc.env:{name}}}")


def _exists(path: str) -> bool:
    try:
        return File(path).exists()
    except (OSError, ValueError):  # too long, or with a null byte
        return False


def _require_no_secret(path: Path, value: Any, text: Any, written: Any) -> None:
    """Raise `UserError` where a secret has come into a value by other ways than those that are saved as written."""
    if not isinstance(value, str) or text != value or _followed(written, path)[0] == value:
        return
    if secret := next((secret for secret in SECRETS if secret in value), None):
        key = ".".join(map(str, path))
        raise UserError(f"{key}: would be saved with the value of {SECRETS[secret]}; write {SECRETS[secret]} itself")


def as_written(section: Any, name: str | int) -> Any:
    """A value of a section as it is saved: an interpolation where the environment gives it."""
    return section._get_node(name)._value() if OmegaConf.is_interpolation(section, name) else section[name]


def leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value of a plain configuration that is no section, no list and not missing, with its path."""
    if not isinstance(node, dict | list):
        if node != "???":
            yield path, node
        return
    for name, entry in node.items() if isinstance(node, dict) else enumerate(node):
        yield from leaves(entry, (*path, name))


def _valued(config: DictConfig) -> Iterator[tuple[Path, Any, Any]]:
    """Every value that is no section and no list, with its path, and as it is saved."""
    written = OmegaConf.to_container(config)
    for path, value in leaves(OmegaConf.to_container(config, resolve=True)):
        yield path, value, at(written, path)


def _without_users(url: str, path: Path) -> str:
    """`url` with the users of its addresses as interpolations of variables, which are set here."""
    number = itertools.count(1)

    def moved(address: re.Match) -> str:
        name = re.sub(r"\W", "_", f"{USERS}{next(number)}_OF_{'_'.join(map(str, path))}", flags=re.ASCII)
        os.environ[name] = address[2]
        return f"{address[1]}${{oc.env:{name}}}@"

    return URL_USER.sub(moved, url)


def _followed(written: Any, path: Path) -> tuple[Any, Path]:
    """What is written at `path`, through sections and values that are nothing but a reference, and where it stands."""
    value, place = written, ()
    for name in path:
        if not isinstance(value, dict | list):
            return None, place  # made by a resolver
        value, place = value[name], (*place, name)
        while isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
            value, place = _followed(written, _target(reference[1], place))
    return value, place


def _closed(text: Any, place: Path, written: Any, resolved: Any) -> Any:
    """`text` with its references to other keys replaced: by what is written there of the environment, or by values."""
    if not isinstance(text, str):
        return text

    def replaced(reference: re.Match) -> str:
        target = _target(reference[1], place)
        other = _closed(*_followed(written, target), written, resolved)
        return other if isinstance(other, str) and FROM_ENVIRONMENT.search(other) else str(at(resolved, target))

    return REFERENCE.sub(replaced, text)


def _target(reference: str, place: Path) -> Path:
    """The path of what a reference refers to that stands at `place`."""
    name = reference.lstrip(".")
    base = place[: -(len(reference) - len(name))] if reference.startswith(".") else ()
    return (*base, *(int(part) if part.isdigit() else part for part in name.split(".")))


def at(node: Any, path: Path) -> Any:
    """What stands at `path` below `node`."""
    for name in path:
        node = node[name]
    return node
