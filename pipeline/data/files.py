"""Data files read into raw rows, each with its line; a broken file is refused on one line that names what and where."""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from threefold.columns import Row
from threefold.errors import UserError

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
