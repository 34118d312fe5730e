"""What a run was told, in runs/<run>/choices.json: every command that names the run starts from it.

    groups      the choice of every group, `experiment` among them
    overrides   the last value of each key as it was typed: values of the environment stay interpolations
    data        where text and replies come from, and the checkpoint, as the configuration has them
    folder      from the run's folder to the one that the commands were given in; relative paths begin there

Hydra composes the stored overrides first and those of the command after them. Keys that say what one command does are
not stored (`PASSING`), and neither is what holds a password. Nothing here imports torch.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import threefold.conf
from threefold.config import overrides as texts
from threefold.config.compose import GROUPS, PATHS, chosen, compose, is_emptied, key_of
from threefold.errors import UserError, nearest, public
from threefold.execution import interpolations
from threefold.fileio import read_json, write_json
from threefold.stages import STAGES

# first names of keys that say what a command does, and where: they hold for that command alone
PASSING = ("run", "runs", "takeover", "target", "dependents", "seeds", "launch", "launcher")
PASSING += ("label", "sweep", "chat", "dashboard")
MADE_OF = ("experiment", "data", "model")  # groups of which another choice is another run
# keys of which another value is another run; preferences may come later, as votes on the run's own replies
DATA = ("data.text.path", "data.text.config_name", "data.replies.path", "data.replies.config_name")
DATA += ("data.preferences.path", "model.checkpoint")
LATER = ("data.preferences.path",)
SHORT = 100  # characters of the choices that are listed on a line


@dataclass
class Choices:
    """What a run was told."""

    groups: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    data: dict[str, str | None] = field(default_factory=dict)
    folder: str = "."


def compose_run(typed: Sequence[str], varied: Iterable[str] = (), reads: bool = False) -> tuple[DictConfig, list[str]]:
    """The configuration of the run that `typed` overrides name, and all overrides that it is composed from.

    It starts from what the run was told, and says on stderr, in a line, what is kept of that and what is new.
    varied: keys that a sweep gives values to; what is stored of these is left out. reads: the command makes nothing,
    so a run that is named must be there. Raises `UserError` for another experiment, data or model than the run's
    without takeover=true, for a run that is not there, and as `compose` does.
    """
    _require_one_value(typed)
    place, named = _named(typed)
    if place is None:  # the name depends on the configuration
        config = compose(list(typed))
        place = Path(config.runs), config.run
    runs, run = place
    folder = runs / run
    if reads and named and not folder.is_dir():
        raise no_such_run(runs, run)
    anew = _last(typed, "takeover") is True
    stored = None if anew else read(folder)
    base = Path(os.path.normpath(folder.resolve() / stored.folder)) if stored else Path.cwd()
    kept = _kept(stored, typed, varied, base) if stored else []
    full = last_of_each([*kept, *typed])
    if stored and _last(full, "experiment") is None and (experiment := stored.groups.get("experiment")):
        full = [f"experiment={experiment}", *full]
    full = [*(text for text in full if key_of(text) != "run"), texts.assigned("run", run)]
    try:
        config = compose(full)
    except UserError as error:
        raise _explained(error, _untouched(kept, typed), folder) from error
    if not anew:
        _require_same(stored or _of_stages(folder), chosen(full), config, base)
    if stored and (line := _difference(stored, _untouched(kept, typed), typed, reads)):
        print(public(f"run {run}{line}"), file=sys.stderr)
    return config, full


def _require_one_value(typed: Sequence[str]) -> None:
    """Refuse several values for a key, with the command that makes a run for each."""
    try:
        for text in typed:
            texts.as_typed(text)
    except texts.SeveralValuesError as error:
        command = f"threefold sweep {texts.as_arguments(typed)}"
        raise UserError(f"{error}; a run for each is made by: {command}") from error


def keep(config: DictConfig, overrides: list[str]) -> None:
    """Store what the run of `config` was told, composed from `overrides`; with takeover=true the run loses its links.

    What a command adds by itself, behind `run`, is not stored, nor what holds a password or a value of the environment.
    """
    folder = Path(config.runs) / config.run
    end = max((place for place, text in enumerate(overrides, 1) if key_of(text) == "run"), default=len(overrides))
    kept = [text for text in last_of_each(overrides[:end]) if _is_kept(text)]
    groups = {group: choice for group, choice in chosen(overrides).items() if group not in PASSING}
    data = {key: _written(config, key) for key in DATA}
    choices = Choices(groups, kept, data, os.path.relpath(Path.cwd(), folder.resolve()))
    folder.mkdir(parents=True, exist_ok=True)
    if config.takeover:
        for link in (folder / stage for stage in STAGES):
            if link.is_symlink():
                link.unlink()
    if read(folder) != choices:
        write_json(folder / "choices.json", asdict(choices))


def read(folder: Path) -> Choices | None:
    """What the run in `folder` was told; None where nothing is stored. Raises `UserError` for a damaged file."""
    file = folder / "choices.json"
    if not file.is_file():
        return None
    try:
        choices = Choices(**read_json(file))
    except TypeError as error:
        raise UserError(f"{file}: is damaged ({error}); remove the file, or mend it") from error
    return choices


def run_names(runs: Path, inside: str = "") -> list[str]:
    """The runs in the folder `runs` by name, without their variants."""
    names = []
    for folder in sorted(runs.joinpath(inside).iterdir()) if runs.is_dir() else ():
        name = f"{inside}/{folder.name}".lstrip("/")
        if not folder.is_dir() or folder.name in ((*STAGES, "variants", "report") if inside else ("artifacts",)):
            continue
        if (folder / "choices.json").is_file() or any((folder / stage).exists() for stage in STAGES):
            names.append(name)
        names += run_names(runs, name)
    return names


def no_such_run(runs: Path, run: str) -> UserError:
    """The error for a run that is not there."""
    return UserError(f"run={run}: there is no such run{nearest(run, run_names(runs))}; `threefold runs` lists them")


def last_of_each(overrides: Iterable[str]) -> list[str]:
    """The overrides without those that a later one of the same key replaces.

    Mappings add to each other and stay, but for those before an empty one; so do a user's own folders. Where an
    earlier one had to add the key with +, so does the later one.
    """
    last: dict[str, str] = {}
    for text in overrides:
        key, (before, equals, _) = key_of(text), text.partition("=")
        if is_emptied(text):
            last = {name: other for name, other in last.items() if not f"{key_of(other)}.".startswith(f"{key}.")}
        name = text if _adds(text) else key
        former = last.pop(name, "")
        if text.startswith("~") and former.startswith("+") and not former.startswith("++"):
            continue  # it took nothing but what was added
        added = former[: len(former) - len(former.lstrip("+"))] if name == key else ""
        last[name] = f"{added}{text}" if equals and before == key else text
    return list(last.values())


def _adds(text: str) -> bool:
    """Whether an override adds to what its key has: a mapping its entries, and a search path its folders."""
    key, _, value = text.partition("=")
    return key == texts.SEARCH_PATH or (value.startswith("{") and not is_emptied(text))


def _named(typed: Sequence[str]) -> tuple[tuple[Path, str] | None, bool]:
    """The folder of all runs and the run that overrides name, and whether they name it, without composing.

    None where that takes a composition: the name refers to other keys, or the experiment lies elsewhere.
    """
    conf, given = Path(threefold.conf.__file__).parent, {key: _last(typed, key) for key in ("runs", "run")}
    experiment = _last(typed, "experiment") or _default_experiment()
    content: dict[str, Any] = {}
    for file in (conf / "config.yaml", conf / "experiment" / f"{experiment}.yaml"):
        if not file.is_file():
            return None, given["run"] is not None
        loaded: Any = OmegaConf.to_container(OmegaConf.load(file))
        content |= {key: loaded[key] for key in given if key in loaded}
    content |= {key: value for key, value in given.items() if value is not None}
    try:
        place = OmegaConf.create(content)
        return (Path(str(place.runs)).expanduser(), str(place.run)), given["run"] is not None
    except (OmegaConfBaseException, RuntimeError):
        return None, given["run"] is not None


def _default_experiment() -> str:
    defaults = OmegaConf.load(Path(threefold.conf.__file__).parent / "config.yaml").defaults
    return next(entry["experiment"] for entry in defaults if "experiment" in entry)


def _last(overrides: Iterable[str], key: str) -> Any:
    """The last value that overrides give to `key`; None without one."""
    given = [text for text in overrides if key_of(text) == key and "=" in text]
    return texts.parse(texts.as_typed(given[-1])).value() if given else None


def _section(key: str) -> str:
    """The section that a group fills; empty for what is no group."""
    if key == "tasks":
        return "evaluate.tasks"
    group, _, section = key.partition("@")
    return section or (group if key in GROUPS else "")


def _kept(stored: Choices, typed: Sequence[str], varied: Iterable[str], base: Path) -> list[str]:
    """The stored overrides that hold for a command; relative paths among them begin in `base`.

    With another choice of a group the values below that group's section go, and so does what a sweep varies.
    """
    swept = dict.fromkeys(map(key_of, varied), "")
    values = {key_of(text): text.partition("=")[2] for text in typed} | swept
    sections = [_section(key) for key, value in values.items() if _plain(value) != _plain(stored.groups.get(key))]
    gone = tuple(f"{section}." for section in sections if section)
    held = [text for text in stored.overrides if key_of(text) not in swept and not key_of(text).startswith(gone)]
    return [_from(base, text) for text in held]


def _untouched(kept: list[str], typed: Sequence[str]) -> list[str]:
    """Those of `kept` that no typed override replaces."""
    replaced = {key_of(text) for text in typed if not _adds(text)}
    return [text for text in kept if key_of(text) not in replaced]


def _plain(choice: Any) -> str:
    return re.sub(r"[\s\[\]'\"]", "", str(choice))


def _from(base: Path, text: str) -> str:
    """An override whose relative paths begin in `base`, for a command that is given elsewhere."""
    before, equals, value = text.partition("=")
    names = key_of(text).split(".")
    if base == Path.cwd() or not equals or (PATHS.isdisjoint(names) and not value.startswith("{")):
        return text
    override = texts.parse(texts.as_typed(text))
    typed, override._value = override._value, _placed(base, override._value, names)
    return text if override._value == typed else f"{before}={override.get_value_element_as_str()}"


def _placed(base: Path, value: Any, names: list[str]) -> Any:
    """A parsed value with the paths in it that lead somewhere from `base`; `names` are those of the keys above it."""
    if isinstance(value, list):
        return [_placed(base, entry, names) for entry in value]
    if isinstance(value, dict):
        return {name: _placed(base, entry, [*names, str(name)]) for name, entry in value.items()}
    path = value.text if isinstance(value, QuotedString) else value
    if PATHS.isdisjoint(names) or "args" in names or not isinstance(path, str) or not path:
        return value
    return QuotedString(str(base / path), Quote.single) if (base / path).exists() else value


def _is_kept(text: str) -> bool:
    key = key_of(text)
    return key.partition(".")[0] not in PASSING and key != "experiment" and public(text) == text


def _written(config: DictConfig, key: str) -> str | None:
    section, _, name = key.rpartition(".")
    return interpolations.as_written(OmegaConf.select(config, section), name)


def _of_stages(folder: Path) -> Choices:
    """The data that the stages of a run saw, for one that was made before choices were stored."""
    data: dict[str, str | None] = {}
    for stage in STAGES:
        file = folder / stage / "config.yaml"
        seen: Any = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
        for key in DATA:
            section, _, name = key.rpartition(".")
            if name in (OmegaConf.select(seen, section) or ()):
                data[key] = _written(seen, key)
    return Choices(data=data)


def _require_same(told: Choices, groups: dict[str, Any], config: DictConfig, base: Path) -> None:
    """Raise `UserError` where a run that has a name would be replaced by another under the same name."""
    changed = {name: (told.groups[name], groups.get(name)) for name in MADE_OF if name in told.groups}
    changed |= {key: (value, _written(config, key)) for key, value in told.data.items()}
    differences = [
        f"{key} {former} → {now}" if former != now else f"{key} {_place(base, former)} → {_place(Path.cwd(), now)}"
        for key, (former, now) in changed.items()
        if not (key in LATER and None in (former, now)) and not _same(base, former, now)
    ]
    if differences:
        raise UserError(
            f"run={config.run}: would become another run: {', '.join(differences)}; give this one a name of its own "
            "with run=NAME, or let it take over the name with takeover=true, from what this command says alone"
        )


def _same(base: Path, former: Any, now: Any) -> bool:
    """Whether two values are the same name, or lead to the same place, where the former is a path from `base`."""
    if former is None or now is None or (base == Path.cwd() and former == now):
        return former == now
    places = _place(base, former), _place(Path.cwd(), now)
    return places[0] == places[1] or (former == now and not any(map(os.path.exists, places)))


def _place(base: Path, written: Any) -> str:
    """Where a path leads."""
    with contextlib.suppress(OmegaConfBaseException):  # a variable that is not set here
        written = OmegaConf.create({"path": written}).path
    return os.path.realpath(base / str(written))


def _explained(error: UserError, kept: list[str], folder: Path) -> UserError:
    """An error that begins with a key that is stored, with where it is stored."""
    named = re.match(r"[\w.@/]+", str(error))
    if not named or named[0] not in map(key_of, kept):
        return error
    return UserError(f"{error} (from {folder / 'choices.json'}, what this run was told; give another value)")


def _difference(stored: Choices, kept: list[str], typed: Sequence[str], reads: bool) -> str:
    """What a command keeps of the stored choices and what is new, as the end of a line; empty where neither is.

    What is new to a command that only reads holds for that command.
    """
    adding = [text for text in typed if _is_kept(text) and _adds(text) and text not in stored.overrides]
    given = {key_of(text): text for text in typed if _is_kept(text) and not _adds(text)}
    former = {key_of(text): text for text in stored.overrides}
    news = [
        f"{key} {former[key].partition('=')[2]} → {text.partition('=')[2]}" if key in former else text
        for key, text in given.items()
        if former.get(key) != text
        and not (key not in former and _plain(stored.groups.get(key)) == text.partition("=")[2])
    ]
    news += adding
    news += [f"without {text}" for key, text in former.items() if key not in given and key not in map(key_of, kept)]
    listed = ", ".join(kept)
    if len(listed) > SHORT:
        listed = f"{len(kept)} choices of choices.json"
    if reads and news:
        news[0] = f"for this command: {news[0]}"
    between = ("; " if kept else ", " if reads else ": ") if news else ""
    return (f" keeps {listed}" if kept else "") + between + ", ".join(news)
