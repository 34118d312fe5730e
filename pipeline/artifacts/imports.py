"""What a reward function is made of beside its own file: local modules that it imports, and installed packages.

Files are read, not run. Local modules count by their content, with all that they import. Installed packages count by
name and version, small ones also by their content, which includes word lists and lexicons.
"""

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from threefold.artifacts.digests import code_digest, defined_in, file_digest, parsed

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
