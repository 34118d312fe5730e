"""Where data and code come from, and digests of their content for fingerprints. Imports nothing heavy."""

import ast
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import tasks
from pipeline.artifact import read_json
from pipeline.errors import UserError, nearest
from pipeline.folders import SUFFIXES, split_files

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


def source_parts(source: Any) -> dict[str, Any]:
    """What identifies a source's content: its reading options, and digests of its files or its name on the hub.

    The path of a local file is no part of it: the same content elsewhere is the same data. How a file is read, by its
    suffix, and which split it is counts.
    """
    parts = {key: source[key] for key in ("format", "columns", "splits", "max_unusable_share")}
    if source.format == "chitchat":
        parts["word_list"] = file_digest(package_file(WORD_LIST))
    if source.splits and (is_package(source.path) or is_task(source.path) or source.format == "chitchat"):
        kind = "generated" if is_task(source.path) else "one file"
        raise UserError(f"{source.path}: is {kind}, so it cannot have splits; leave splits out")
    if is_task(source.path):
        tasks.generator(source.path)  # refuses an unknown name
        return parts | {"path": source.path, "content": file_digest(Path(tasks.__file__))}
    if is_package(source.path):
        return parts | {"content": content_digest([package_file(source.path)])}
    if source.splits and "train" not in source.splits:
        raise UserError(
            f"{source.path}: splits names {', '.join(source.splits)} but not train; name every split you have"
        )
    if not is_local(source.path):
        return parts | {key: source[key] for key in ("path", "config_name", "revision")}
    by_split = split_files(source.path, source.splits)
    return parts | {"content": {split: content_digest(files) for split, files in by_split.items()}}


def content_digest(files: list[Path]) -> str:
    """Digest of what `files` hold, in their order, and of their suffixes, by which they are read.

    Of a folder that datasets.save_to_disk left, the tables count.
    """
    tables = [table for file in files for table in (sorted(file.rglob("*.arrow")) if file.is_dir() else [file])]
    read_as = [(Path(table.name.removesuffix(".gz")).suffix, file_digest(table)) for table in tables]
    return hashlib.sha256("".join(f"{suffix} {digest}\n" for suffix, digest in read_as).encode()).hexdigest()


def defined_in(path: str) -> tuple[str, Path]:
    """The module that defines `module:function`, and its file, found through relative imports of packages.

    Raises `UserError` when there is no such file, or no such name in it.
    """
    module, _, name = path.partition(":")
    try:
        spec = importlib.util.find_spec(module) if module and name else None
    except (ImportError, ValueError):
        spec = None
    except SystemExit as error:  # of a package above the module, which is imported here
        raise UserError(f"{path}: its package called sys.exit({error.code!r}) when it was imported") from error
    if spec is None or not spec.origin:
        raise UserError(f"{path}: no such reward function; write it as module:function of an importable module")
    defined = _names_defined(Path(spec.origin))
    if name not in defined:
        raise UserError(f"{path}: {module} defines no {name}{nearest(name, defined)}")
    if defined[name]:
        package = module if spec.submodule_search_locations else module.rpartition(".")[0]
        return defined_in(importlib.util.resolve_name(defined[name], package))
    return module, Path(spec.origin)


def parsed(file: Path) -> ast.Module:
    """A Python file as its syntax tree. Raises `UserError` naming the line that is no Python."""
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{file}: line {line} is no Python ({reason}); mend it") from error


def _names_defined(file: Path) -> dict[str, str]:
    """Names that a Python file defines or imports at its top level; the file is read, not run.

    With each stands where a relative import has it from, as ".module:name", or an empty string.
    """
    names: dict[str, str] = {}
    for node in _statements(parsed(file).body):
        names |= {target.id: "" for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{'.' * node.level}{node.module}:" if getattr(node, "level", 0) and node.module else ""
            names |= {alias.asname or alias.name: origin and origin + alias.name for alias in node.names}
        elif hasattr(node, "name"):
            names[node.name] = ""
    return names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top level of a module, those below if and try among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body + node.orelse)


def artifact_digest(path: str, key: str, stages: tuple[str, ...]) -> str:
    """The fingerprint of an artifact by its folder. Raises `UserError` naming `key` where it is none of `stages`."""
    file = Path(path) / "manifest.json"
    if not file.is_file():
        raise UserError(f"{key}: {path} is no finished stage; name its folder, for example runs/demo/{stages[-1]}")
    manifest = read_json(file)
    if manifest["stage"] not in stages:
        raise UserError(f"{key}: {path} was made by stage {manifest['stage']}; must be of {', '.join(stages)}")
    return manifest["fingerprint"]


def checkpoint_digest(folder: Path) -> str:
    """Digest of a local model folder: names and contents of its files, and for an adapter those of its base model."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    lines = [f"{f.relative_to(folder)} {file_digest(f)}\n" for f in files]
    base = adapter_base(folder)
    if base and Path(base).is_dir() and not adapter_base(Path(base)):
        lines.append(f"base {checkpoint_digest(Path(base))}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


ADAPTER = "adapter_config.json"


def adapter_base(folder: Path) -> str | None:
    """The model, a folder or a name on the hub, that the adapter in `folder` belongs to; None where it holds none."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: names no base_model_name_or_path; save the adapter again with peft") from error


def adapter_revision(folder: Path) -> str:
    """The commit, branch or tag of its base model that the adapter in `folder` belongs to."""
    return json.loads((folder / ADAPTER).read_text()).get("revision") or "main"


def model_digest(path: str, key: str) -> str:
    """What identifies a model: the fingerprint of an artifact, the content of another folder, or its name on the hub.

    Raises `UserError` naming `key` where a local folder is not there.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return read_json(folder / "manifest.json")["fingerprint"]
    if folder.is_dir():
        return checkpoint_digest(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{key}: {path} is no folder; name a model's, runs/demo/sft for example, or one of the hub")
    return path


@functools.cache
def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
