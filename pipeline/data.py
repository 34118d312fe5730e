"""Data sources read into rows, and rows cut into texts, prompts with replies, and preferences.

Splits are made by content, not by chance: a row belongs to the test split when
`int(sha256(key)[:8], 16) % 100` is below 5, to validation from 5 to 9, to training otherwise.
"""

import functools
import gzip
import hashlib
import itertools
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from pipeline import tasks
from pipeline.errors import UserError
from pipeline.formats import FORMATS, Message, Row, UnusableRowError, alternating
from pipeline.sources import is_local, is_package, is_task, local_files, package_file

BUCKETS = {"test": range(0, 5), "validation": range(5, 10), "train": range(10, 100)}
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Example:
    """A prompt and a reply to it that a person gave."""

    prompt: list[Message]
    reply: str


@dataclass
class Rows:
    """The usable rows of one split, and what was left out: reason → {"count", "first_line"}."""

    rows: list[Row]
    unusable: dict[str, dict[str, Any]] = field(default_factory=dict)


def load(source: DictConfig, split: str) -> Rows:
    """The rows of one split of a source. Raises `UserError` when too many rows are unusable, naming the first."""
    return _load(json.dumps(OmegaConf.to_container(source, resolve=True), sort_keys=True), split)


@functools.lru_cache(maxsize=8)
def _load(source_json: str, split: str) -> Rows:
    source = OmegaConf.create(json.loads(source_json))
    given = split in source.splits
    parsed = _parse(source_json, split if given else "train")
    taken_away = {name for name in BUCKETS if name != "train" and name not in source.splits}
    if given and split != "train":
        return parsed
    buckets = {
        b for name, r in BUCKETS.items() for b in r if name == split or (split == "train" and name not in taken_away)
    }
    return Rows([row for row in parsed.rows if _bucket(row["key"]) in buckets], parsed.unusable)


def _bucket(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100


@functools.lru_cache(maxsize=4)
def _parse(source_json: str, given_split: str) -> Rows:
    """All rows of what the source itself calls `given_split` (all of it where it has no splits)."""
    source = OmegaConf.create(json.loads(source_json))
    parse, rows = FORMATS[source.format], []
    unusable: dict[str, dict[str, Any]] = {}
    dropped: Counter = Counter()
    raws = _read(source, given_split)
    for where, line, raw in raws:
        renamed = raw | {ours: raw[theirs] for ours, theirs in source.columns.items() if theirs in raw}
        try:
            rows += parse(renamed, dropped)
        except UnusableRowError as reason:
            unusable.setdefault(str(reason), {"count": 0, "first_line": line, "file": where})["count"] += 1
    _refuse_bad_source(source, len(raws), unusable)
    return Rows(rows, unusable | {f"message dropped: {why}": {"count": n} for why, n in sorted(dropped.items())})


def _refuse_bad_source(source: DictConfig, total: int, unusable: dict[str, dict[str, Any]]) -> None:
    if not total:
        raise UserError(f"{source.path}: no rows")
    bad = sum(entry["count"] for entry in unusable.values())
    if bad > source.max_unusable_share * total:
        reason, worst = max(unusable.items(), key=lambda item: item[1]["count"])
        raise UserError(
            f"{source.path}: {bad} of {total} rows cannot be used as format={source.format}, most often because "
            f"{reason} (first in {worst['file']}, line {worst['first_line']}); "
            f"mend them, or set max_unusable_share > {bad / total:.3f}"
        )


def _read(source: DictConfig, split: str) -> list[tuple[str, int, Row]]:
    """Raw rows with the name of their file and their line in it (for the hub and conversations: their number)."""
    if source.format == "chitchat":
        return _read_chitchat(package_file(source.path) if is_package(source.path) else local_files(source.path)[0])
    if is_task(source.path):
        return [(source.path, number, row) for number, row in enumerate(tasks.generator(source.path)(), start=1)]
    if is_package(source.path) or is_local(source.path):
        files = (
            [package_file(source.path)]
            if is_package(source.path)
            else local_files(source.path, source.splits.get(split))
        )
        return [row for file in files for row in _read_file(file)]
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


def _read_file(file: Path) -> list[tuple[str, int, Row]]:
    from datasets import load_dataset

    suffix = Path(file.name.removesuffix(".gz")).suffix
    try:
        rows = load_dataset(BUILDERS[suffix], data_files=str(file), split="train").to_list()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: {_defect(file) or reason}") from error
    if suffix == ".txt":
        return [(file.name, line, {"text": text}) for line, text in _paragraphs([row["text"] for row in rows])]
    return [(file.name, line, row) for line, row in zip(_line_numbers(file, suffix, len(rows)), rows, strict=True)]


def _paragraphs(lines: list[str]) -> Iterable[tuple[int, str]]:
    """Texts between blank lines, each with the number of its first line."""
    for blank, group in itertools.groupby(enumerate(lines, start=1), key=lambda numbered: not numbered[1].strip()):
        if not blank:
            numbers, said = zip(*group, strict=True)
            yield numbers[0], "\n".join(said)


def _line_numbers(file: Path, suffix: str, rows: int) -> Iterable[int]:
    """The line of each row: blank lines of JSON lines hold none, nor does the header of CSV."""
    if suffix == ".jsonl":
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return [number for number, line in enumerate(stream, start=1) if line.strip()]
    return range(2, rows + 2) if suffix == ".csv" else range(1, rows + 1)


def _defect(file: Path) -> str | None:
    """Where a JSON-lines file is broken, with the line's number; None when the lines themselves are well-formed."""
    if file.suffix == ".gz" and not _whole_gzip(file):
        return "is not a whole gzip file; copy it again"
    if not file.stat().st_size:
        return "is empty"
    if ".jsonl" not in file.name:
        return None
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                if not isinstance(json.loads(line.decode("utf-8")), dict):
                    return f"line {number} is not a JSON object; every line must be one"
            except UnicodeDecodeError:
                return f"line {number} is not UTF-8; save the file in that encoding"
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg} at column {error.colno}); mend or remove the line"
    return None


def _whole_gzip(file: Path) -> bool:
    try:
        with gzip.open(file) as stream:
            while stream.read(2**20):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def _read_hub(source: DictConfig, split: str) -> list[Row]:
    from datasets import load_dataset

    name = source.splits.get(split, split)
    try:
        return load_dataset(source.path, source.config_name, revision=source.revision, split=name).to_list()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{source.path}: neither a file or folder here nor loadable from the hub ({reason})") from error


def texts(rows: list[Row]) -> list[str]:
    """One text per row: dialogues and preferences as their turns on lines of their own, without system messages."""
    return [_text(row) for row in rows]


def _text(row: Row) -> str:
    if "text" in row:
        return row["text"]
    return "\n".join(turn["content"] for turn in _turns(row) if turn["role"] != "system")


def examples(source: DictConfig, split: str, dialogue: DictConfig) -> list[Example]:
    """Every reply of a split within the limits of `dialogue`, with the turns before it."""
    limits = tuple(sorted(OmegaConf.to_container(dialogue).items()))
    return _examples(json.dumps(OmegaConf.to_container(source, resolve=True), sort_keys=True), split, limits)


@functools.lru_cache(maxsize=8)
def _examples(source_json: str, split: str, limits: tuple[tuple[str, int], ...]) -> list[Example]:
    limit, found = dict(limits), []
    for row in _load(source_json, split).rows:
        turns = _turns(row)
        system = [m for m in turns if m["role"] == "system"]
        spoken = [m for m in turns if m["role"] != "system"]
        for i in range(1, len(spoken)):
            reply = spoken[i]["content"]
            if spoken[i]["role"] != "assistant" and not row.get("symmetric"):
                continue
            if not limit["reply_min_chars"] <= len(reply) <= limit["reply_max_chars"]:
                continue
            prompt = system + _context(spoken, i, row, limit["context_turns"])
            if sum(len(m["content"]) for m in prompt) <= limit["prompt_max_chars"]:
                found.append(Example(prompt, reply))
    return found


def _turns(row: Row) -> list[Message]:
    if "text" in row:
        raise UserError("data.replies needs rows with prompts and replies; its format gives plain text")
    return row.get("messages") or [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]


def _context(spoken: list[Message], i: int, row: Row, most: int) -> list[Message]:
    """The turns before `spoken[i]`: the last `most`, in a symmetric dialogue one to `most` by a hash of the place."""
    if not row.get("symmetric"):
        return spoken[max(0, i - most) : i]
    count = 1 + _bucket(f"{row['key']} {i}") % most
    context = [m["content"] for m in spoken[max(0, i - count) : i]]
    return alternating([*context, ""])[:-1]


def prompts(source: DictConfig, split: str, dialogue: DictConfig) -> list[Example]:
    """Distinct prompts of a split, each with the first person's reply to it, in order of appearance.

    A prompt of the training split that occurs in a held-out split as well is left out, so that prompts are disjoint.
    """
    seen: set[str] = set()
    if split == "train":
        for other in ("validation", "test"):
            seen |= {prompt_key(e.prompt) for e in examples(source, other, dialogue)}
    elif split == "validation":
        seen = {prompt_key(e.prompt) for e in examples(source, "test", dialogue)}
    found = []
    for example in examples(source, split, dialogue):
        if (key := prompt_key(example.prompt)) not in seen:
            seen.add(key)
            found.append(example)
    if not found:
        raise UserError(
            f"{source.path}: no prompt in its {split} split; give more rows, or set splits and data.dialogue"
        )
    return found


def training_examples(source: DictConfig, dialogue: DictConfig) -> list[Example]:
    """Every example of the training split whose prompt occurs in no held-out split."""
    held_out = {prompt_key(e.prompt) for split in ("validation", "test") for e in examples(source, split, dialogue)}
    return [e for e in examples(source, "train", dialogue) if prompt_key(e.prompt) not in held_out]


def replies_by_prompt(found: list[Example]) -> dict[str, list[Example]]:
    """Examples grouped by prompt, only prompts that people answered in at least two different ways."""
    groups = defaultdict(dict)
    for example in found:
        groups[prompt_key(example.prompt)].setdefault(example.reply, example)
    return {key: list(group.values()) for key, group in groups.items() if len(group) > 1}


def prompt_key(prompt: list[Message]) -> str:
    """A string that two prompts share exactly when they are equal."""
    return json.dumps([[m["role"], m["content"]] for m in prompt], ensure_ascii=False)


def draw(items: list[Any], count: int, seed: int) -> list[Any]:
    """`count` items without repetition, in an order that `seed` decides; all of them when there are fewer."""
    order = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in order]
