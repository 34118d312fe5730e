"""Votes: pairs that wait for one, votes and skips as JSON lines, read strictly and written durably; and agreement.

A journal grows by whole lines, each on disk before `append` returns. What a crash left of a last line is cut off when
the journal is opened again; a row is taken back by writing the file anew beside itself and renaming it.

How far labellers agree: the share of agreeing votes, and kappa, which corrects it for agreement by chance.

Cohen 1960 (two labellers) and Fleiss 1971 (more). 1 is full agreement, 0 what chance alone would bring.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from threefold.data.formats import Message
from threefold.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Two replies to one prompt, and the models that gave them. `pair` names it within its file."""

    pair: str
    prompt: list[Message]
    response_a: str
    response_b: str
    model_a: str
    model_b: str
    split: str = field(metadata={"choices": ("train", "test")})


@dataclass(frozen=True)
class Vote(Comparison):
    """What one labeller said of a comparison; `time` is ISO 8601 in UTC. Read by `data.preferences.format=arena`."""

    winner: str = field(metadata={"choices": ("model_a", "model_b", "tie")})
    labeller: str
    reason: str
    time: str


@dataclass(frozen=True)
class Skip:
    """A comparison that a labeller set aside."""

    pair: str
    labeller: str
    reason: str
    time: str


Row = TypeVar("Row", Comparison, Vote, Skip)


def parse(kind: type[Row], line: bytes) -> Row:
    """The row on one line. Raises `ValueError` with what is wrong; keys beyond those of `kind` are left out."""
    try:
        raw = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg})") from None
    if not isinstance(raw, dict):
        raise ValueError("is not a JSON object")
    for column in fields(kind):
        if column.name not in raw:
            raise ValueError(f'has no "{column.name}"')
        _check(column.name, raw[column.name], column.metadata.get("choices"))
    return kind(**{column.name: raw[column.name] for column in fields(kind)})


def _check(name: str, value: Any, choices: tuple[str, ...] | None) -> None:
    if name == "prompt":
        if not (isinstance(value, list) and value and all(map(_is_message, value))):
            raise ValueError('"prompt" must be a list of {"role", "content"}, both text')
    elif not _is_text(value):
        raise ValueError(f'"{name}" must be text')
    elif choices and value not in choices:
        raise ValueError(f'"{name}" is {value!r:.40}; it must be one of {", ".join(choices)}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(map(_is_text, value.values()))


def _is_text(value: Any) -> bool:
    """Whether `value` is a string that UTF-8 can hold: JSON can spell half a surrogate pair, which no file can."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_pool(file: Path) -> list[Comparison]:
    """The comparisons of a file. Raises `UserError` naming file and line where one is malformed or named twice."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    line_of: dict[str, int] = {}
    pool = _rows(Comparison, content, file)
    for number, comparison in pool:
        pair = comparison.pair
        if pair in line_of:
            raise UserError(f"{file}, line {number}: pair {pair} is on line {line_of[pair]} already")
        line_of[pair] = number
    if not pool:
        raise UserError(f"{file}: holds no pair to compare")
    return [comparison for _, comparison in pool]


def read_votes(file: Path) -> list[Vote]:
    """The votes of a file, empty where there is none; a last line without its end is still being written.

    Raises `UserError` naming file and line where one is malformed.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return [vote for _, vote in _rows(Vote, content[: content.rfind(b"\n") + 1], file)]


def _rows(kind: type[Row], content: bytes, file: Path) -> list[tuple[int, Row]]:
    """Rows with their line numbers; empty lines are passed over."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append((number, parse(kind, line)))
            except ValueError as error:
                raise UserError(f"{file}, line {number}: {error}") from None
    return rows


class Journal(Generic[Row]):
    """A JSON-lines file of one kind of row, held in memory as `rows`; `mended` says what opening it had to cut."""

    def __init__(self, file: Path, kind: type[Row]):
        self.file, self.kind = file, kind
        self.mended = ""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab"):  # says now, not at the first vote, when it cannot be written
                pass
            _sync_folder(file)
            content = self._whole_lines()
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror})") from error
        self.rows = [row for _, row in _rows(kind, content, file)]

    def append(self, row: Row) -> None:
        """Add a row; it is on disk when this returns. Raises `OSError`, with the file as it was, when it cannot be."""
        line = json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n"
        with self.file.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(line) != len(line):
                    raise OSError("no room for the whole line")
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(before)
                raise
        self.rows.append(row)

    def remove(self, *rows: Row) -> None:
        """Take rows back: the file is replaced in one step by one without the last line that holds each of them."""
        wanted, kept = list(rows), []
        for line in reversed(self.file.read_bytes().splitlines(keepends=True)):
            held = next((row for row in wanted if self._holds(line, row)), None)
            if held is None:
                kept.append(line)
            else:
                wanted.remove(held)
        self._replace(b"".join(reversed(kept)))
        for row in rows:
            self.rows.remove(row)

    def _holds(self, line: bytes, row: Row) -> bool:
        try:
            return parse(self.kind, line) == row
        except ValueError:
            return False

    def _replace(self, content: bytes) -> None:
        fresh = self.file.with_name(f".{self.file.name}.fresh")
        with fresh.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(self.file)
        _sync_folder(self.file)

    def _whole_lines(self) -> bytes:
        """The content up to its last whole line; what follows is completed or cut, on disk too."""
        content = self.file.read_bytes()
        end = content.rfind(b"\n") + 1
        tail = content[end:]
        if not tail:
            return content
        with contextlib.suppress(ValueError):
            parse(self.kind, tail)
            self._replace(content + b"\n")  # only the line's end was missing
            return content + b"\n"
        _rows(self.kind, content[:end], self.file)  # cut nothing from a file that is something else
        if not b'{"pair": "'.startswith(tail[:10]):
            number = content.count(b"\n") + 1
            raise UserError(f"{self.file}, line {number}: is no {self.kind.__name__.lower()}")
        self._replace(content[:end])
        self.mended = f"{self.file}: cut an unfinished last line of {len(tail)} bytes, left by a crash"
        return content[:end]


def _sync_folder(file: Path) -> None:
    """Write to disk which files the folder of `file` holds."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def only_writer(file: Path) -> Generator[None]:
    """Hold `file` against a second server; the system lets go when the process ends, however it ends."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: its folder cannot be made ({error.strerror}); set label.votes=FILE") from error
    try:
        with FileLock(f"{file}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"{file}: another threefold label writes to it; use that page, or set label.votes=FILE"
        ) from None


ENOUGH = 30  # shared pairs below which kappa's standard error is around 0.15 and more


@dataclass(frozen=True)
class Agreement:
    """What the votes of `labellers` on the pairs that all of them labelled say.

    `agreeing` is the share of pairs of votes that are equal, and None without shared pairs; `kappa` is None also
    where it is not defined, as everybody always gave one and the same answer.
    """

    labellers: tuple[str, ...]
    shared: int
    agreeing: float | None
    kappa: float | None


def cohen_kappa(first: list[str], second: list[str]) -> float | None:
    """Cohen's kappa of two labellers' answers to the same questions; chance is each one's own habit."""
    n = len(first)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    habits, others = Counter(first), Counter(second)
    return _corrected(observed, sum(habits[answer] * others[answer] for answer in habits) / n**2)


def fleiss_kappa(answers: list[list[str]]) -> float | None:
    """Fleiss' kappa; one list of answers a question, all of one length of two or more. Chance is the common habit."""
    if not answers:
        return None
    common = Counter(itertools.chain.from_iterable(answers))
    total = sum(common.values())
    return _corrected(agreeing_share(answers), sum((count / total) ** 2 for count in common.values()))


def agreeing_share(answers: list[list[str]]) -> float:
    """The share of pairs of answers to one question that are equal, averaged over questions."""
    shares = [
        sum(a == b for a, b in itertools.combinations(given, 2)) / (len(given) * (len(given) - 1) / 2)
        for given in answers
    ]
    return sum(shares) / len(shares)


def _corrected(observed: float, by_chance: float) -> float | None:
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def between(votes: Iterable[Vote], labellers: tuple[str, ...]) -> Agreement:
    """The agreement of two or more labellers on the pairs that each of them labelled."""
    winners: dict[str, dict[str, str]] = {labeller: {} for labeller in labellers}
    for vote in votes:
        if vote.labeller in winners:
            winners[vote.labeller][vote.pair] = vote.winner
    shared = set.intersection(*(set(given) for given in winners.values()))
    answers = [[winners[labeller][pair] for labeller in labellers] for pair in sorted(shared)]
    if not answers:
        return Agreement(labellers, 0, None, None)
    kappa = cohen_kappa(*map(list, zip(*answers, strict=True))) if len(labellers) == 2 else fleiss_kappa(answers)
    return Agreement(labellers, len(shared), agreeing_share(answers), kappa)


def summary(votes: list[Vote]) -> list[Agreement]:
    """All labellers together first, then, where there are three or more, each two of them; empty for fewer than two."""
    labellers = tuple(sorted({vote.labeller for vote in votes}))
    if len(labellers) < 2:
        return []
    twos = itertools.combinations(labellers, 2) if len(labellers) > 2 else ()
    return [between(votes, group) for group in (labellers, *twos)]


def in_words(agreement: Agreement) -> str:
    """An agreement as a sentence or two."""
    name = "Cohen’s" if len(agreement.labellers) == 2 else "Fleiss’"
    who = f"{', '.join(agreement.labellers[:-1])} and {agreement.labellers[-1]}"
    if not agreement.shared:
        return f"{who} have no pair in common yet."
    pairs = "1 shared pair" if agreement.shared == 1 else f"{agreement.shared} shared pairs"
    message = f"{who} agree on {agreement.agreeing:.0%} of {pairs}; {name} kappa is {kappa_in_words(agreement)}."
    return message if agreement.shared >= ENOUGH else f"{message} Fewer than {ENOUGH} shared pairs say little."


def kappa_in_words(agreement: Agreement) -> str:
    """Kappa with two digits, or that there is none."""
    return "not defined" if agreement.kappa is None else f"{agreement.kappa:.2f}".replace("-", "−")
