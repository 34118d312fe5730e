"""Which files of a local source hold rows, and of which split: as given, by their names, or as save_to_disk left them.

Names are read as the library datasets reads them: `train.jsonl`, `test-00000-of-00002.parquet`, `validation/a.csv`.
"""

import re
from pathlib import Path

from pipeline.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # what datasets writes beside rows
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALL = "all"  # of a source whose files name no splits
NONE, SEVERAL = "no split", "several splits"  # what a name tells otherwise


def local_files(path: str, pattern: str | None = None) -> list[Path]:
    """The data files of a local source: the file itself, or those in the folder that match `pattern`, sorted."""
    root = Path(path).expanduser()
    if root.is_file() and pattern:
        raise UserError(f"{path}: is one file, so it cannot have splits; name its folder, or leave splits out")
    if root.is_file() or (is_saved(root) and not pattern):
        return [root]
    if not root.is_dir():
        raise UserError(f"{path}: no such file or folder; set the source's path to your copy or to a hub name")
    found = [f for f in (sorted(root.glob(pattern)) if pattern else _all(root)) if _has_rows(f)]
    if not found:
        raise UserError(f"{path}: no data file{f' matches {pattern}' if pattern else ''} ({', '.join(SUFFIXES)}, .gz)")
    return found


def split_files(path: str, splits: dict[str, str]) -> dict[str, list[Path]]:
    """The files of each split: by the patterns `splits`, else by names that tell; all under ALL where none does.

    Raises `UserError` where some names tell a split and others do not, or none is for training.
    """
    if splits:
        return {split: local_files(path, pattern) for split, pattern in splits.items()}
    root, files, by_split = Path(path).expanduser(), local_files(path), {}
    for file in files if root.is_dir() and not is_saved(root) else ():
        by_split.setdefault(_split_of(file, root), []).append(file)
    if by_split.keys() <= {NONE, "train"} or by_split.keys() == {SEVERAL}:
        return {ALL: files}
    twice = is_dictionary(root) and any(len(named) > 1 for named in by_split.values())
    if by_split.keys() & {NONE, SEVERAL} or "train" not in by_split or twice:
        seen = ", ".join(f"{named[0].relative_to(root)} ({split})" for split, named in by_split.items())
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
    """What is in a folder and in those below it that are named after a split, or data, as on the hub."""
    if is_dictionary(root):
        return [folder for folder in sorted(root.iterdir()) if is_saved(folder)]
    inside = sorted(root.iterdir())
    below = [f for f in inside if f.is_dir() and not is_saved(f) and (f.name == "data" or _named(f.name))]
    return [*inside, *(file for folder in below for file in sorted(folder.iterdir()))]


def _has_rows(file: Path) -> bool:
    if file.is_dir():
        return is_saved(file)
    return file.is_file() and file.name.removesuffix(".gz").endswith(SUFFIXES) and file.name not in METADATA


def _split_of(file: Path, root: Path) -> str:
    """The split that the folder of a file is named after, or else the file; NONE or SEVERAL where that is not one."""
    names = (_named(file.parent.name) if file.parent != root else set()) or _named(file.name)
    return next(iter(names)) if len(names) == 1 else SEVERAL if names else NONE


def _named(name: str) -> set[str]:
    words = set(re.split(r"[-._ 0-9]+", name.removesuffix(".gz").lower()))
    return {split for split, keywords in KEYWORDS.items() if words.intersection(keywords)}
