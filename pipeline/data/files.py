"""Data files: what the path of a source names, which files hold which split, and their rows, each with its line.

A broken file is refused on one line that names what and where.

What the path of a data source names, and which files of a local one hold rows, and of which split.

A path names files here, a file of an installed package, a task, or a name on the hub. The splits of files are as given,
by their names, or as save_to_disk left them.

Names are read as the library datasets reads them: `train.jsonl`, `test-00000-of-00002.parquet`, `validation/a.csv`.
"""

import csv
import gzip
import importlib.util
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from threefold.columns import Row
from threefold.data import tasks
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


Numbered = Iterator[tuple[int, Row]]


def read(file: Path) -> list[tuple[str, int, Row]]:
    """The rows of a file, each with the file's name and the row's first line. Raises `UserError` for an unreadable one.

    A folder of save_to_disk is read as one file.
    """
    reader = _saved if file.is_dir() else READERS.get(Path(file.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise UserError(f"{file}: must be {', '.join(READERS)}, each also with .gz; convert or rename it")
    rows = [(file.name, line, row) for line, row in reader(file)]
    if not rows:
        raise UserError(f"{file}: is empty; give it rows, or take it out of the source")
    return rows


def lines(file: Path) -> Iterator[str]:
    """The lines of a text file, compressed or not, with their line ends."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: line {number} is not UTF-8; save the file in that encoding") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: is no whole gzip file, it ends after line {number}; copy it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _json_lines(file: Path, content: Iterable[str] | None = None) -> Numbered:
    for number, line in enumerate(content or lines(file), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(file, number, error) from error
            except (ValueError, RecursionError) as error:
                raise _too_much(file, number) from error
            yield number, _object(file, number, row)


def _json(file: Path) -> Numbered:
    """A JSON list of objects, or one object on each line."""
    content = list(lines(file))
    text = "".join(content)
    if text.lstrip()[:1] != "[":
        yield from _json_lines(file, content)
        return
    try:
        line, counted = 1, 0
        for position, row in _elements(text):
            line, counted = line + text.count("\n", counted, position), position
            yield line, _object(file, line, row)
    except json.JSONDecodeError as error:
        raise _not_json(file, error.lineno, error) from error
    except (ValueError, RecursionError) as error:
        raise _too_much(file, line) from error


def _too_much(file: Path, line: int) -> UserError:
    return UserError(f"{file}: line {line} has a number of too many digits or is nested too deeply; mend or remove it")


SPACE = re.compile(r"\s*")


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of the JSON list in `text`, each with its position."""
    decode = json.JSONDecoder().raw_decode
    position = _after_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        element, end = decode(text, position)
        yield position, element
        position = _after_space(text, end)
        if text[position : position + 1] == ",":
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, position + 1)


def _after_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _object(file: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{file}: line {number} is not a JSON object; every row must be one")
    return row


def _not_json(file: Path, number: int, error: json.JSONDecodeError) -> UserError:
    return UserError(
        f"{file}: line {number} is not JSON ({error.msg} at column {error.colno}); mend or remove the line"
    )


def _csv(file: Path) -> Numbered:
    """Rows with the names of the first line as columns; every value is text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines(file), strict=True)
    header, first = [], 1
    try:
        for fields in reader:
            if header and fields and len(fields) != len(header):
                raise UserError(
                    f"{file}: line {first} has {len(fields)} fields, but the header has {len(header)}; "
                    "quote fields with commas or line ends"
                )
            if header and fields:
                yield first, dict(zip(header, fields, strict=True))
            header, first = header or fields, reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}: line {first} is not CSV ({error}); mend its quotes") from error


def _text(file: Path) -> Numbered:
    """One row for each text between blank lines."""
    content = (line.rstrip("\r\n") for line in lines(file))
    for blank, group in itertools.groupby(enumerate(content, start=1), key=lambda numbered: not numbered[1].strip()):
        if not blank:
            numbers, paragraph = zip(*group, strict=True)
            yield numbers[0], {"text": "\n".join(paragraph)}


def _parquet(file: Path) -> Numbered:
    import pyarrow.parquet

    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(stream.read())).to_pylist()
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: cannot be read as parquet ({reason}); copy it again") from error
    yield from enumerate(rows, start=1)


def _saved(folder: Path) -> Numbered:
    """A data set that datasets.save_to_disk wrote: Arrow tables, so no code runs."""
    from datasets import Dataset, load_from_disk

    try:
        rows = cast(Dataset, load_from_disk(str(folder))).to_list()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder}: is a folder of datasets.save_to_disk that cannot be read ({reason}); export it with to_parquet"
        ) from error
    yield from enumerate(rows, start=1)


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".txt": _text, ".parquet": _parquet,
}  # fmt: skip


def read_rows(source: SimpleNamespace, split: str) -> list[tuple[str, int, Row]]:
    """Raw rows, each with its file's name and its line there (for the hub and for conversations: its number)."""
    of_split = getattr(source, "files", {})
    local = [Path(file) for file in of_split.get(split) or of_split.get(ALL, ())]
    if source.format == "chitchat":
        return [row for file in local or local_files(source.path) for row in _read_chitchat(file)]
    if is_task(source.path):
        return [(source.path, number, row) for number, row in enumerate(tasks.generator(source.path)(), start=1)]
    if local:
        return [row for file in local for row in read(file)]
    return [(source.path, number, row) for number, row in enumerate(_read_hub(source, split), start=1)]


def _read_chitchat(file: Path) -> list[tuple[str, int, Row]]:
    try:
        conversations = json.loads(file.read_text())
        named = [{"id": key, **conversation} for key, conversation in conversations.items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file}: not a chitchat-dataset file (one JSON object of conversations); set format"
        ) from error
    return [(file.name, number, conversation) for number, conversation in enumerate(named, start=1)]


def _read_hub(source: SimpleNamespace, split: str) -> list[Row]:
    from datasets import load_dataset

    name = source.splits.get(split, split)
    try:
        return load_dataset(source.path, source.config_name, revision=source.revision, split=name).to_list()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source.path}: neither a file or folder here nor loadable from the hub ({reason})") from error
