"""What the path of a data source names: files here, a file of an installed package, a task, or a name on the hub."""

import importlib.util
from pathlib import Path

from threefold.data.folders import SUFFIXES
from threefold.errors import UserError

WORD_LIST = "package:better_profanity/profanity_wordlist.txt"  # by which format chitchat leaves messages out


def is_package(path: str) -> bool:
    """Whether `path` names a file inside an installed package, package:MODULE/FILE."""
    return path.startswith("package:")


def is_task(path: str) -> bool:
    """Whether `path` names problems that the project generates, task:NAME."""
    return path.startswith("task:")


def is_local(path: str) -> bool:
    """Whether `path` is a file or folder here, rather than a name on the hub."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.removesuffix(".gz").endswith(SUFFIXES)


def package_file(path: str) -> Path:
    """The file behind package:MODULE/FILE. Raises `UserError` when the package or file is missing."""
    module, _, name = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the package {module} is not installed")
    file = Path(spec.submodule_search_locations[0]) / name
    if not file.is_file():
        raise UserError(f"{path}: the package {module} has no file {name}")
    return file
