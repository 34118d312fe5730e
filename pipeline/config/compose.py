"""How overrides become one checked configuration.

Nothing in this module imports torch, so that a wrong key is answered in a second.

Texts in the files of `conf/`: YAML reads `run: 2026_11_28` as a number, which would be written back otherwise.
"""

import functools
import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

import threefold.conf
from threefold.config.checks import check_together
from threefold.config.names import GROUPS, check_folders, choices, keys, nearest_key
from threefold.config.overrides import (
    SeveralValuesError,
    as_arguments,
    as_typed,
    composed_in,
    kind_of,
    own_folders,
    register_own_limit,
)
from threefold.errors import UserError, nearest
from threefold.execution import interpolations
from threefold.schema.config import Config
from threefold.schema.stages import RewardPartConfig, TaskConfig


def compose(overrides: list[str]) -> DictConfig:
    """Compose `conf/` with `overrides` (Hydra's syntax), check it, and return it read-only.

    Values of the environment stay interpolations, so that what is saved of it holds no secret.
    Raises `UserError`, one line, for an unknown key, group or choice, a wrong type, or a value outside its limits.
    """
    folders = own_folders(overrides)
    check_folders(folders)
    for file in _own_files(overrides):
        check_own_file(file)
    try:
        config, _ = _merged([_addable(as_typed(override)) for override in overrides], folders)
        interpolations.note_variables(OmegaConf.to_container(config))
        missing = sorted(OmegaConf.missing_keys(config))
        interpolations.resolve(config)
        _find_home(config)
    except SeveralValuesError as error:
        raise UserError(f"{error}; a run for each is made by: threefold sweep {as_arguments(overrides)}") from error
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


def chosen(overrides: list[str]) -> dict[str, Any]:
    """The choice of every group under `overrides`, which compose."""
    return _merged([_addable(as_typed(override)) for override in overrides], own_folders(overrides))[1]


def _merged(overrides: list[str], folders: list[str]) -> tuple[DictConfig, dict[str, Any]]:
    """`conf/` with `overrides`, unresolved: its files as a copy of what Hydra made of the same choices before.

    Files may lie in a user's own `folders` as well. The second value is the choice of every group.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _register()
    places = (Path(threefold.conf.__file__).parent, *map(Path, folders))
    groups_here = [folder.name for folder in places[0].iterdir() if folder.is_dir()]
    files = [
        places[0] / "config.yaml",
        *(f for p in places for g in groups_here for f in sorted((p / g).rglob("*.yaml"))),
    ]
    state = tuple((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())
    of_groups = [override for override in overrides if _chooses(override)]
    config, groups = pickle.loads(_of_files(tuple(composed_in(of_groups, folders)), tuple(folders), state))
    values = [override for override in overrides if override not in of_groups]
    parser = OverridesParser.create()
    for override in values:
        ConfigLoaderImpl._apply_overrides_to_config(parser.parse_overrides([override]), config)
        if is_emptied(override):
            OmegaConf.update(config, key_of(override), {}, merge=False)
    return config, groups


def _chooses(override: str) -> bool:
    """Whether an override chooses a file, for Hydra: `model=tiny`, and not `model={...}`; or is one of Hydra's own."""
    key, _, value = override.lstrip("+~").partition("=")
    group = "@" in key or (Path(threefold.conf.__file__).parent / key).is_dir()
    return key.startswith("hydra") or (group and not value.startswith("{"))


@functools.lru_cache(maxsize=64)
def _of_files(chosen: tuple[str, ...], folders: tuple[str, ...], state: Any) -> bytes:
    """The pickled configuration of `chosen` files, while those of all places are in this `state`.

    Hydra reads and merges some forty files, which takes ten times as long as all else that a composition does.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("threefold.conf", version_base="1.3"):
        config = hydra_compose("config", overrides=list(chosen), return_hydra_config=True)
    check_file_texts(config.hydra.runtime.choices, folders)
    groups: Any = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return pickle.dumps((config, {group: choice for group, choice in groups.items() if group in GROUPS}))


@functools.cache
def _register() -> None:
    """Tell Hydra the schema and the resolvers of `conf/`, once: an eighth of a composition."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    register_own_limit()


# keys of files and folders
PATHS = {"path", "runs", "checkpoint", "policies", "start", "earlier", "scorer", "pairs", "votes"}


def _find_home(config: DictConfig) -> None:
    """Expand ~ at the beginning of paths, which the shell leaves as it is after "="."""
    for path, value in interpolations.leaves(OmegaConf.to_container(config, resolve=True)):
        if isinstance(value, str) and value.startswith("~") and not PATHS.isdisjoint(path) and "args" not in path:
            try:
                interpolations.at(config, path[:-1])[path[-1]] = str(Path(value).expanduser())
            except RuntimeError as error:
                raise UserError(f"{'.'.join(map(str, path))}={value}: there is no such user") from error


def make_command(target: str, overrides: list[str], without: str) -> str:
    """The command that makes a stage under the same overrides, but for those below the section `without`."""
    kept = [override for override in overrides if not override.lstrip("+~").startswith(f"{without}.")]
    return f'make {target} ARGS="{as_arguments(kept)}"' if kept else f"make {target}"


def check(config: DictConfig, schema: Any, prefix: str = "") -> None:
    """Hold every key and value below `config` to `schema` and its limits; raises `UserError` naming the key."""
    entries: dict[Any, Field[Any]] = {entry.name: entry for entry in fields(schema)}
    for name in entries:
        if name not in config:
            raise UserError(f"{prefix}{name} was deleted, but is needed; give it a value instead")
    for name in config:
        key = f"{prefix}{name}"
        if name not in entries:
            raise UserError(f"{key} is not a configuration key{nearest_key(key)}")
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
    if choices and value in limits.get("instead", {}):
        raise UserError(f"{key}={value}: {limits['instead'][value]}")
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


def is_emptied(override: str) -> bool:
    """Whether an override leaves a mapping without entries, as dpo.loss_weights={} does."""
    value = override.partition("=")[2]
    return re.sub(r"\s", "", value) == "{}" and key_of(override).split(".")[-1] in MAPPINGS


def key_of(override: str) -> str:
    """The key that an override is of, without + and ~."""
    return override.partition("=")[0].lstrip("+~")


MAPPINGS = (
    "columns", "splits", "args", "parts", "needs", "probes", "tasks", "parameters", "loss_weights",
    "chat_template_kwargs",
)  # fmt: skip
NAMED: dict[Any, Any] = {
    "parts": RewardPartConfig,
    "tasks": TaskConfig,
}  # mappings from names to sections, and what each holds


def _keys_of_named(key: str) -> list[str]:
    """Keys that stand beside `key` in a section of a mapping, if that is one which such sections do not have."""
    section, _, name = key.rpartition(".")
    schema = NAMED.get(section.split(".")[-2:][0])
    entries = [entry.name for entry in fields(schema)] if schema else []
    return [f"{section}.{entry}" for entry in entries] if name not in entries else []


KINDS = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false", "String": "a text"}
# what Hydra and OmegaConf write, and what it means; {key} is the key that they name, {0} what the first group matches
ANSWERS = {
    r"Value '(.*)' of type '\w+' could not be converted to (\w+)": "{key}={0}: must be {kind}",
    r"Value '(.*)' is not a valid bool": "{key}={0}: must be true or false",
    r"Invalid type assigned: .* is not a subclass of .* value: (.*)": "{key}={0}: {key} is a section of keys",
    r"Interpolation key '(.+?)' not found": "{key}: ${{{0}}} is not found: no key has that name",
    r"Environment variable '(.+?)' not found": "{key}: the environment has no variable {0}",
    r"does not support deletion": "{key}: is needed and cannot be taken out; give it a value instead",
    r"Could not delete from config\. .*?'(.+?)'": "{0}: is not there, or has another value; give it a value instead",
    r"(\S+) appears more than once in the": "+{0}: {0} has a choice already; write it without the +",
    r"An item is already at '(.+?)'": "+{0}: {0} has a value already; write it without the +",
    r"Multiple values for (\S+)\. To override": "{0}: has a choice already; write `override /{0}: NAME` in a file",
    r"Config group override must be a string": "a group takes the name of a choice, for example experiment=demo",
}


def _explain(error: BaseException, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors on one line, in our words, with the nearest existing name."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        text = f"{error}\n{text}"
    key = match[1] if (match := re.search(r"full_key: (\S+)", text)) else ""
    below = next((o for o in overrides if key and o.lstrip("+").startswith(f"{key}.")), None)
    if choice := re.search(r"Could not (?:find|load) '([^'/]+)/([^']*)'", text):
        group, name, there = choice[1], choice[2], choices(choice[1], own_folders(overrides))
        return f"{group}={name}: no such choice{nearest(name, there)}; there are {', '.join(there)}"
    if unknown := re.search(r"Key '(.+?)' (?:is not in struct|not in '\w+')|Could not override '(.+?)'", text):
        return _unknown(key or unknown[1] or unknown[2], overrides)
    if below and kind_of(key) in (int, float, bool, str):
        return _unknown(key, overrides)
    for pattern, answer in ANSWERS.items():
        if match := re.search(pattern, text):
            kind = KINDS.get(match[match.lastindex or 0], "of another kind")
            return answer.format(*match.groups(), key=key, kind=kind)
    message = " ".join((text.splitlines()[0] if key else text).split()).split(" See https://hydra")[0]
    return f"{key or as_arguments(overrides)}: {message}"


def _unknown(name: str, overrides: list[str]) -> str:
    """The answer to a key that is none: as it was typed, or with the file of a user's own that has it."""
    where = ""
    if typed := next((o for o in overrides if re.match(rf"[+~]*{re.escape(name)}\b", o)), None):
        name = typed.partition("=")[0].lstrip("+~")
    elif file := next((f for f in _own_files(overrides) if name.rpartition(".")[2] in _words(f)), None):
        where = f"{file}: "
    return f"{where}{name} is not a configuration key{nearest_key(name, _keys_of_named(name))}"


def _own_files(overrides: list[str]) -> list[Path]:
    """The files in a user's own folders that overrides choose."""
    named = [text.lstrip("+").partition("=") for text in overrides]
    chosen = [Path(key.partition("@")[0]) / f"{name}.yaml" for key, _, name in named]
    files = [Path(folder) / file for folder in own_folders(overrides) for file in chosen]
    return [file for file in files if file.is_file()]


def _words(file: Path) -> set[str]:
    return set(re.findall(r"\w+", file.read_text()))


def check_own_file(file: Path) -> None:
    """Hold a file of a user's own to set keys, and an experiment to its form; raises `UserError` with what to write."""
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: cannot be read as YAML: {error.problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must set keys, for example seed: 2")
    if file.parent.name != "experiment":
        return
    header = PACKAGE.search(file.read_text())
    if not header or header[1] != "_global_":
        raise UserError(f"{file}: begin it with the line `# @package _global_`, so that it sets keys of every section")
    entries = [entry for entry in content.pop("defaults", ()) if isinstance(entry, dict)]
    for name, value in ((str(name), value) for entry in [*entries, content] for name, value in entry.items()):
        bare = name.removeprefix("override ").lstrip("/")
        if bare in GROUPS and not isinstance(value, dict) and name != f"override /{bare}":
            raise UserError(f"{file}: {bare} is chosen below `defaults:`, by the line `- override /{bare}: {value}`")
        if name == "takeover":
            raise UserError(f"{file}: takeover holds for one command; leave it out, and type takeover=true there")
        if name == "hydra":
            raise UserError(f"{file}: hydra is not used here; leave it out")
        if "." in name and name in keys():
            section, _, key = name.rpartition(".")
            raise UserError(f"{file}: {name} is written `{key}: {value}` below `{section.replace('.', ': ')}:`")


PACKAGE = re.compile(r"^# @package (\S+)$", re.MULTILINE)  # Hydra's: the section that a file fills


def check_file_texts(chosen: Mapping[str, Any], folders: Iterable[str] = ()) -> None:
    """Hold the texts in the files that are chosen, by group, to be no numbers for YAML; raises `UserError`.

    They lie in conf/, or in a user's own `folders`.
    """
    for group, names in chosen.items():
        if group.startswith(("hydra/", "section", "stage")):
            continue
        folder, _, section = group.partition("@")
        for name in [names] if isinstance(names, str) else names or ():
            for place in (Path(threefold.conf.__file__).parent, *map(Path, folders)):
                if (file := place / folder / f"{name}.yaml").is_file():
                    _check_file(file, section or folder)


def _check_file(file: Path, section: str) -> None:
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
