"""What the path of a data source names, and which files of a local one hold rows, and of which split.

A path names files here, a file of an installed package, a task, or a name on the hub. The splits of files are as given,
by their names, or as save_to_disk left them.

Names are read as the library datasets reads them: `train.jsonl`, `test-00000-of-00002.parquet`, `validation/a.csv`.
"""

import importlib.util
import re
from pathlib import Path

from threefold.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # what datasets writes beside rows
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "held out": ("heldout", "held", "holdout"),  # names no split in particular, so the files are refused
}
SHARD = re.compile(r"[-_.]\d+-of-\d+")
ABOUT = re.compile(r"((readme|licen[sc]e|copying|requirements)([-_. ]\w+)*|notice|authors|changelog)\.txt")  # no data
WORD_LIST = "package:better_profanity/profanity_wordlist.txt"  # by which format chitchat leaves messages out
ALL = "all"  # stands for the split where a source's files name none
NONE, SEVERAL = "no split", "several splits"  # what else a name may tell


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


def local_files(path: str, pattern: str | None = None) -> list[Path]:
    """The data files of a local source: the file itself, or those in the folder that match `pattern`, sorted."""
    root = Path(path).expanduser()
    if root.is_file() and pattern:
        raise UserError(f"{path}: is one file, so it cannot have splits; name its folder, or leave splits out")
    if root.is_file() or (is_saved(root) and not pattern):
        return [root]
    if not root.is_dir():
        raise UserError(f"{path}: no such file or folder; set the source's path to your copy or to a hub name")
    matching_files = [f for f in (sorted(root.glob(pattern)) if pattern else _all(root)) if _has_rows(f)]
    if not matching_files:
        raise UserError(f"{path}: no data file{f' matches {pattern}' if pattern else ''} ({', '.join(SUFFIXES)}, .gz)")
    return matching_files


def split_files(path: str, splits: dict[str, str]) -> dict[str, list[Path]]:
    """The files of each split: by the patterns `splits`, or else by the files' names; under ALL where no name tells.

    Raises `UserError` where some names tell a split and others do not, or where no file is for training.
    """
    if splits:
        return {split: local_files(path, pattern) for split, pattern in splits.items()}
    root, files, by_split = Path(path).expanduser(), local_files(path), {}
    for file in files if root.is_dir() and not is_saved(root) else ():
        by_split.setdefault(_split_of(file, root), []).append(file)
    several = any(_are_several(named, root) for split, named in by_split.items() if split != NONE)
    if not several and list(by_split) in ([], [NONE], ["train"], [SEVERAL]):
        return {ALL: files}
    if several or "train" not in by_split or by_split.keys() - {"train", "validation", "test"}:
        ends = {split: dict.fromkeys((named[0], named[-1])) for split, named in by_split.items()}
        seen = ", ".join(f"{file.relative_to(root)} ({split})" for split, named in ends.items() for file in named)
        raise UserError(
            f"{path}: some of its files are named after splits, not all clearly: {seen}; set splits, for example "
            "splits={train: PATTERN, test: PATTERN}, or splits={train: '*'} to train on all"
        )
    return by_split


def is_saved(folder: Path) -> bool:
    """Whether a folder is a data set, or one split of it, that datasets.save_to_disk wrote."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def is_dictionary(folder: Path) -> bool:
    """Whether a folder holds the splits of a data set that datasets.save_to_disk wrote, each a folder."""
    return (folder / "dataset_dict.json").is_file()


def _all(root: Path) -> list[Path]:
    """The contents of a folder and of its subfolders that are named after a split, or `data`, as on the hub.

    Raises `UserError` where any other subfolder holds data files.
    """
    if is_dictionary(root):
        return [folder for folder in sorted(root.iterdir()) if is_saved(folder)]
    inside = sorted(f for f in root.iterdir() if not f.name.startswith("."))
    below = [f for f in inside if f.is_dir() and not is_saved(f) and (f.name == "data" or _named(f.name))]
    taken = [*inside, *(file for folder in below for file in sorted(folder.iterdir()))]
    read = {file for file in taken if _has_rows(file)}
    for file in sorted(root.rglob("*")):
        place = file.relative_to(root)
        hidden = any(part.startswith(".") for part in place.parts)
        if not hidden and _has_rows(file) and not read & {file, *file.parents}:
            raise UserError(
                f"{root}: {place} is in a folder that is not read; set splits, for example splits={{train: "
                "'data/train/*', test: 'data/test/*'}, or splits={train: '**/*'} to train on all"
            )
    return taken


def _has_rows(file: Path) -> bool:
    name = file.name.removesuffix(".gz")
    if file.is_dir() or name.startswith(".") or name in METADATA or ABOUT.fullmatch(name.lower()):
        return file.is_dir() and is_saved(file)
    return file.is_file() and name.endswith(SUFFIXES)


def _are_several(named: list[Path], root: Path) -> bool:
    """Whether the files of one split are several data sets: folders of a dictionary, or shards of several names."""
    wholes = {SHARD.split(str(file.relative_to(root)))[0] for file in named}
    sharded = any(SHARD.search(file.name) for file in named)
    return len(wholes) > 1 and (sharded or is_dictionary(root))


def _split_of(file: Path, root: Path) -> str:
    """The split that a file's folder is named after, or else the file itself; NONE or SEVERAL where it is not one."""
    names = (_named(file.parent.name) if file.parent != root else set()) or _named(file.name)
    return next(iter(names)) if len(names) == 1 else SEVERAL if names else NONE


def _named(name: str) -> set[str]:
    """The splits that the words of a name tell, as in my-train.jsonl, trainData.jsonl and trainset.jsonl."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name.removesuffix(".gz")).lower()
    words = {word.removesuffix("set").removesuffix("data") for word in re.split(r"[-._ 0-9]+", apart)}
    return {split for split, keywords in KEYWORDS.items() if words.intersection(keywords)}
