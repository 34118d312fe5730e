"""How overrides become one checked configuration.

Nothing in this module imports torch, so that a wrong key is answered in a second.

Texts in the files of `conf/`: YAML reads `run: 2026_11_28` as a number, which would be written back otherwise.
"""

import functools
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

import threefold.conf
from threefold.config.checks import REWARDS, check_together
from threefold.errors import UserError, nearest
from threefold.execution import interpolations
from threefold.schema.config import Config
from threefold.schema.stages import RewardPartConfig, TaskConfig

GROUPS = ["model", "data", "tasks", "tracker", "launch", "launcher", "cluster", "resources", "experiment"]
GROUPS += [f"reward@{key}" for key in REWARDS]


def compose(overrides: list[str]) -> DictConfig:
    """Compose `conf/` with `overrides` (Hydra's syntax), check it, and return it read-only.

    Values of the environment stay interpolations, so that what is saved of it holds no secret.
    Raises `UserError`, one line, for an unknown key, group or choice, a wrong type, or a value outside its limits.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    from threefold.config.overrides import as_typed

    _register()
    try:
        with initialize_config_module("threefold.conf", version_base="1.3"):
            typed = [_addable(as_typed(override)) for override in overrides]
            config = hydra_compose("config", overrides=typed, return_hydra_config=True)
        check_file_texts(config.hydra.runtime.choices)
        choices: Any = OmegaConf.to_container(config.hydra.runtime.choices)
        CHOSEN[tuple(overrides)] = {group: choice for group, choice in choices.items() if group in GROUPS}
        with open_dict(config):
            del config["hydra"]
        interpolations.note_variables(OmegaConf.to_container(config))
        missing = sorted(OmegaConf.missing_keys(config))
        interpolations.resolve(config)
        _find_home(config)
    except UserError:
        raise
    except Exception as error:  # Hydra answers some wrong overrides with errors of Python's own
        raise UserError(_explain(error, overrides)) from error
    if missing:
        raise UserError(f"{missing[0]} has no value: set it, for example {missing[0]}=VALUE")
    check(config, Config)
    check_together(config)
    OmegaConf.set_readonly(config, True)
    return config


CHOSEN: dict[tuple[str, ...], dict[str, Any]] = {}  # by the overrides that were composed


def chosen(overrides: list[str]) -> dict[str, Any]:
    """The choice of every group under `overrides`."""
    if tuple(overrides) not in CHOSEN:
        compose(overrides)
    return CHOSEN[tuple(overrides)]


@functools.cache
def _register() -> None:
    """Tell Hydra the schema and the resolvers of `conf/`, once: an eighth of a composition."""
    from hydra.core.config_store import ConfigStore

    from threefold.config.overrides import register_own_limit

    ConfigStore.instance().store(name="schema", node=Config)
    register_own_limit()


PATHS = {"path", "runs", "checkpoint", "policies", "earlier", "scorer", "pairs", "votes"}  # keys of files and folders


def _find_home(config: DictConfig) -> None:
    """Expand ~ at the beginning of paths, which the shell leaves as it is after "="."""
    for path, value in list(interpolations.leaves(config)):
        if isinstance(value, str) and value.startswith("~") and not PATHS.isdisjoint(path) and "args" not in path:
            try:
                interpolations.at(config, path[:-1])[path[-1]] = str(Path(value).expanduser())
            except RuntimeError as error:
                raise UserError(f"{'.'.join(map(str, path))}={value}: there is no such user") from error


def make_command(target: str, overrides: list[str], without: str) -> str:
    """The command that makes a stage under the same overrides, but for those below the section `without`."""
    kept = [override for override in overrides if not override.lstrip("+~").startswith(f"{without}.")]
    return f'make {target} ARGS="{" ".join(map(shlex.quote, kept))}"' if kept else f"make {target}"


def check(config: DictConfig, schema: Any, prefix: str = "") -> None:
    """Hold every key and value below `config` to `schema` and its limits; raises `UserError` naming the key."""
    entries: dict[Any, Field[Any]] = {entry.name: entry for entry in fields(schema)}
    for name in entries:
        if name not in config:
            raise UserError(f"{prefix}{name} was deleted, but is needed; give it a value instead")
    for name in config:
        key = f"{prefix}{name}"
        if name not in entries:
            raise UserError(f"{key} is not a configuration key{nearest(key, keys())}")
        value = config[name]
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            check(value, OmegaConf.get_type(value), f"{key}.")
        elif name in NAMED:
            for entry in value:
                check(value[entry], NAMED[name], f"{key}.{entry}.")
        elif value is not None:
            _check_value(key, value, entries[name].metadata)


def _check_value(key: str, value: Any, limits: Any) -> None:
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices and value not in choices:
        raise UserError(f"{key}={value}: must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: must be a finite number")
    if low is not None and value < low:
        raise UserError(f"{key}={value}: must be at least {low}")
    if high is not None and value > high:
        raise UserError(f"{key}={value}: must be at most {high}")


def _addable(override: str) -> str:
    """An override that gives a mapping to a key that holds one adds its entries, as people expect of columns={a: b}."""
    key, _, value = override.partition("=")
    return f"++{override.lstrip('+')}" if value.startswith("{") and key.split(".")[-1] in MAPPINGS else override


MAPPINGS = ("columns", "splits", "args", "parts", "needs", "probes", "tasks", "parameters")
NAMED: dict[Any, Any] = {
    "parts": RewardPartConfig,
    "tasks": TaskConfig,
}  # mappings from names to sections, and what each holds


def keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration with its dots, as overrides spell it."""
    dotted: list[str] = []
    for entry in fields(schema):
        nested = is_dataclass(entry.type)
        dotted += keys(entry.type, f"{prefix}{entry.name}.") if nested else [prefix + entry.name]
    return dotted


def _keys_of_named(key: str) -> list[str]:
    """Keys that stand beside `key` in a section of a mapping, if that is one which such sections do not have."""
    section, _, name = key.rpartition(".")
    schema = NAMED.get(section.split(".")[-2:][0])
    entries = [entry.name for entry in fields(schema)] if schema else []
    return [f"{section}.{entry}" for entry in entries] if name not in entries else []


def _explain(error: BaseException, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors on one line, with the nearest existing name."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        text = f"{error}\n{text}"
    unknown_key = re.search(r"Key '(.+?)' (?:is not in struct|not in '\w+')", text)
    unknown_choice = re.search(
        r"Could not find '(.+?)/([^/]+?)'.*?Available options.*?:\n(.+?)(?:\nConfig|$)", text, re.S
    )
    unknown_group = re.search(r"Could not override '(.+?)'", text)
    full_key = re.search(r"full_key: (\S+)", text)
    if unknown_choice:
        group, choice, options = unknown_choice[1], unknown_choice[2], unknown_choice[3].split()
        return f"{group}={choice}: no such choice{nearest(choice, options)}; there are {', '.join(options)}"
    if unknown := unknown_key or unknown_group:
        name = (full_key or unknown)[1]
        name = next(
            (o.partition("=")[0].lstrip("+~") for o in overrides if re.match(rf"[+~]*{re.escape(name)}\b", o)), name
        )
        return f"{name} is not a configuration key{nearest(name, GROUPS + keys() + _keys_of_named(name))}"
    if twice := re.search(r"An item is already at '(.+?)'", text):
        return f"+{twice[1]}: {twice[1]} has a value already; write it without the +"
    if full_key:
        return f"{full_key[1]}: {text.splitlines()[0]}"
    message = " ".join(text.split()).split(" See https://hydra")[0]
    return (
        f"{' '.join(overrides)}: {message}" if not any(o.partition("=")[0] in message for o in overrides) else message
    )


PACKAGE = re.compile(r"^# @package (\S+)$", re.MULTILINE)  # Hydra's: the section that a file fills


def check_file_texts(choices: Mapping[str, Any]) -> None:
    """Hold the texts in the files that are chosen, by group, to be no numbers for YAML; raises `UserError`."""
    for group, names in choices.items():
        if group.startswith(("hydra/", "section", "stage")):
            continue
        folder, _, section = group.partition("@")
        for name in [names] if isinstance(names, str) else names or ():
            file = Path(threefold.conf.__file__).parent / folder / f"{name}.yaml"
            if file.is_file():
                _check_file(file, section or folder)


def _check_file(file: Path, section: str) -> None:
    from threefold.config.overrides import kind_of

    content = file.read_text()
    header = PACKAGE.search(content)
    package = header[1].replace("_global_", "") if header else section
    for key, value in _leaves(OmegaConf.to_container(OmegaConf.create(content)), package):
        if isinstance(value, int | float) and kind_of(key) is str:
            raise UserError(f"{file}: {key} is a text, and YAML reads it as the number {value}; put it in quotes")


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value below `node` with its dotted key."""
    if not isinstance(node, dict | list):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{key}.{name}".lstrip("."))
