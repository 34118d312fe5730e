"""Where data and code come from, and digests of their content for fingerprints. Imports nothing heavy.

What a reward function is made of beside its own file: local modules that it imports, and installed packages.

Files are read, not run. Local modules count by their content, with all that they import. Installed packages count by
name and version, small ones also by their content, which includes word lists and lexicons.
"""

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from threefold.data import tasks
from threefold.data.files import WORD_LIST, is_local, is_package, is_task, package_file, split_files
from threefold.errors import UserError, nearest
from threefold.fileio import read_json
from threefold.models.__init__ import adapter_base

OURS = "threefold"  # only its rewards are digested; elsewhere a change that matters raises a stage's version
VERSIONED = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")  # said in every manifest
SMALL = 8_000_000  # bytes up to which a package's content counts; the version alone stands for larger ones


def function_parts(function: str) -> dict[str, str]:
    """What identifies the function at an import path: its source, and its imports and packages where it has any."""
    module, file = defined_in(function)
    modules, packages = followed(file, module)
    parts = {"source": code_digest(file)}
    if others := {name: file_digest(module) for name, module in modules.items() if module != file}:
        parts["imports"] = hashlib.sha256(repr(sorted(others.items())).encode()).hexdigest()
    return parts | {f"packages.{name}": package_version(name) for name in sorted(packages)}


def followed(file: Path, module: str) -> tuple[dict[str, Path], set[str]]:
    """Local modules (name → file) that `file`, which is `module`, comes to import, and installed packages by name.

    An installed module counts by its package and by what it imports itself.
    """
    local: dict[str, Path] = {}
    packages: set[str] = set()
    waiting = [(module, file)]
    while waiting:
        name, current = waiting.pop()
        top = name.partition(".")[0]
        of_package = is_installed(current) and top != OURS
        if of_package:
            packages.add(top)
        elif name in local:
            continue
        else:
            local[name] = current
        for imported in imports_of(current, name):
            target = module_file(imported)
            if imported.partition(".")[0] == top and of_package:
                continue  # of the same package
            ours = imported.partition(".")[0] == OURS
            if target is None or (ours and not imported.startswith(f"{OURS}.rewards")):
                continue
            if is_installed(target) and not ours:
                packages.add(imported.partition(".")[0])
            else:
                waiting.append((imported, target))
    return local, packages


def imports_of(file: Path, module: str) -> set[str]:
    """The modules that a Python file imports anywhere, with the packages that they are in."""
    if file.suffix != ".py":
        return set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    modules: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            modules |= {base, *(f"{base}.{alias.name}" for alias in node.names)} if base else set()
    with_packages = {".".join(name.split(".")[:n]) for name in modules for n in range(1, name.count(".") + 2)}
    return {name for name in with_packages if name.partition(".")[0] not in sys.stdlib_module_names}


def module_file(name: str) -> Path | None:
    """The file of a module, found without importing its packages; None where there is no such module."""
    top, *rest = name.split(".")
    if top == OURS:  # whose folders lie beside each other
        top, rest = name, []
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    for folder in spec.submodule_search_locations or ():
        place = Path(folder).joinpath(*rest)
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file
    return None


def is_installed(file: Path) -> bool:
    """Whether a file lies where packages are installed."""
    return any(file.resolve().is_relative_to(folder) for folder in _installed_in())


@functools.cache
def _installed_in() -> set[Path]:
    paths = sysconfig.get_paths()
    folders = {paths["purelib"], paths["platlib"], paths["stdlib"], paths["platstdlib"]}
    folders |= {folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}
    return {Path(folder).resolve() for folder in folders}


@functools.cache
def package_version(name: str) -> str:
    """The version of the installed package `name`, followed by a digest of its files where it is small."""
    return " ".join(filter(None, (version_of(name), _content(name)))) or "unknown"


def version_of(name: str) -> str:
    """The version of the distribution that the package `name` belongs to; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a distribution of another name
        distributions = metadata.packages_distributions().get(name)
        return metadata.version(distributions[0]) if distributions else ""


def _content(name: str) -> str:
    """The first digits of a digest of a package's files; empty for large packages and single modules."""
    spec = importlib.util.find_spec(name)
    digest, files, size = hashlib.sha256(), {}, 0
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in Path(folder).rglob("*"):
            if "__pycache__" not in file.parts and file.is_file():
                files[str(file.relative_to(folder))] = file
                size += file.stat().st_size
                if size > SMALL:
                    return ""
    for inside in sorted(files):
        digest.update(f"{inside} {file_digest(files[inside])}\n".encode())
    return digest.hexdigest()[:12] if files else ""


def source_parts(source: Any) -> dict[str, Any]:
    """What identifies a source's content: its reading options, and digests of its files or its name on the hub.

    The path of a local file does not count: the same content elsewhere is the same data. Its suffix, by which it is
    read, and its split do.
    """
    parts = {key: source[key] for key in ("format", "columns", "splits", "max_unusable_share")}
    if source.format == "chitchat":
        parts["word_list"] = file_digest(package_file(WORD_LIST))
    if source.splits and (is_package(source.path) or is_task(source.path) or source.format == "chitchat"):
        kind = "generated" if is_task(source.path) else "one file"
        raise UserError(f"{source.path}: is {kind}, so it cannot have splits; leave splits out")
    if is_task(source.path):
        tasks.generator(source.path)  # refuses an unknown name
        return parts | {"path": source.path, "content": code_digest(Path(tasks.__file__))}
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

    A folder of datasets.save_to_disk counts by its tables.
    """
    tables = [table for file in files for table in (sorted(file.rglob("*.arrow")) if file.is_dir() else [file])]
    read_as = [(Path(table.name.removesuffix(".gz")).suffix, file_digest(table)) for table in tables]
    return hashlib.sha256("".join(f"{suffix} {digest}\n" for suffix, digest in read_as).encode()).hexdigest()


def defined_in(path: str) -> tuple[str, Path]:
    """The module that defines `module:function`, and its file, found through relative imports of packages.

    Raises `UserError` when there is no such file, or no such name in it.
    """
    written, _, name = path.partition(":")
    module = module_of(written)
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
        raise UserError(f"{path}: {written} defines no {name}{nearest(name, defined)}")
    if defined[name]:
        package = module if spec.submodule_search_locations else module.rpartition(".")[0]
        return defined_in(importlib.util.resolve_name(defined[name], package))
    return module, Path(spec.origin)


def module_of(name: str) -> str:
    """The module that a configuration calls `name`: `rewards.length` is ours, imported as threefold.rewards.length.

    A module of a user's own folder `rewards` keeps its name. Raises `UserError` where both have a module of this name,
    unless the folder is a checkout of this project.
    """
    top, _, inner = name.partition(".")
    ours = _files("threefold.rewards", inner)
    if top != "rewards" or not ours:
        return name
    theirs = {file for file in _files(top, inner) - ours if not (file.parent / "composition.py").is_file()}
    if theirs:
        raise UserError(f"{name}: is a module of Threefold, and {theirs.pop()} has the same name; rename yours")
    return f"threefold.{name}"


def _files(package: str, name: str) -> set[Path]:
    """The files of the module `name` in a package; its folder may be imported under two names."""
    spec = importlib.util.find_spec(package)
    files = [Path(folder) / f"{name}.py" for folder in (spec.submodule_search_locations or () if spec else ())]
    return {file.resolve() for file in files if file.is_file()}


def parsed(file: Path) -> ast.Module:
    """A Python file as its syntax tree. Raises `UserError` naming the line that is no Python."""
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{file}: line {line} is no Python ({reason}); mend it") from error


def _names_defined(file: Path) -> dict[str, str]:
    """Names that a Python file defines or imports at its top level, each with its origin; the file is read, not run.

    The origin is ".module:name" for a relative import and an empty string otherwise.
    """
    names: dict[str, str] = {}
    for node in _statements(parsed(file).body):
        names |= {target.id: "" for target in getattr(node, "targets", []) if isinstance(target, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            relative = isinstance(node, ast.ImportFrom) and node.level and node.module
            origin = f"{'.' * node.level}{node.module}:" if relative else ""
            names |= {alias.asname or alias.name: origin and origin + alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = ""
    return names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top level of a module, including those within if and try."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body + node.orelse)


def artifact_digest(path: str, key: str, stages: tuple[str, ...]) -> str:
    """The fingerprint of the artifact in a folder. Raises `UserError` naming `key` where none of `stages` made it."""
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


def code_digest(file: Path) -> str:
    """SHA-256 of a module's source; our package counts by its first name, so that older artifacts stay fresh."""
    return hashlib.sha256(file.read_bytes().replace(b"from threefold.", b"from pipeline.")).hexdigest()


@functools.cache
def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
