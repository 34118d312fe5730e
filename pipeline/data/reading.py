"""Data sources read into rows, and rows cut into texts, prompts with replies, and preferences.

Splits are made by content, not by chance: a row belongs to the test split when
`int(sha256(key)[:8], 16) % 100` is below 5, to validation from 5 to 9, to training otherwise. A row may name its split
itself, and a source may have files of its own for splits.
"""

import contextlib
import functools
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from threefold.columns import Message, Row, UnusableRowError
from threefold.data import files
from threefold.data.files import ALL, is_local, is_package, is_task, package_file, split_files
from threefold.data.formats import FORMATS, alternating
from threefold.data.preferences import PREFERENCE_FORMATS
from threefold.errors import UserError

BUCKETS = {"test": range(0, 5), "validation": range(5, 10), "train": range(10, 100)}


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


def load(source: Any, split: str) -> Rows:
    """The rows of one split of a source, or `all` of one without splits of its own.

    Raises `UserError` when too many rows are unusable, naming the first.
    """
    given = _as_json(source)
    if split == "all" and (named := json.loads(given)["splits"]):
        raise UserError(f"{source.path}: has files for {', '.join(named)}, which are kept apart; set split=test")
    return _parse(given, "train") if split == "all" else _load(given, split)


def read_all(source: Any) -> None:
    """Read all of a source, so that a bad one is refused before any work; what was read is kept for `load`."""
    given = json.loads(_as_json(source))
    for split in given["splits"] or ("train",):
        _parse(_as_json(source), split)
    if given["splits"].keys() - source.splits:
        counts = ", ".join(f"{split} {len(files)}" for split, files in given["files"].items())
        print(f"{source.path}: splits by the names of its files ({counts})", flush=True)


def check(source: Any) -> None:
    """Read all of a source as `read_all`. Raises `UserError` as `load` does, and where its splits cannot be used.

    They cannot where no preference is for training or none is held out, and where the hash leaves less than half of the
    rows for training because many begin alike.
    """
    read_all(source)
    rows, train = _parse(_as_json(source), "train").rows, load(source, "train").rows
    by_hash = not any("split" in row for row in rows)
    if by_hash and len(rows) >= 20 and len(train) < len(rows) / 2:
        raise UserError(f"{source.path}: {len(train)} rows in its train split{_how_split(source)}")
    for split in ("train", "test") if source.format in PREFERENCE_FORMATS else ():
        rows = load(source, split).rows
        if rows and len({row.get("label") for row in rows}) == 1 and "label" in rows[0]:
            raise UserError(f"{source.path}: all labels of its {split} split are the same; give good and bad replies")
        if not rows:
            raise UserError(f"{source.path}: none of its pairs falls into the {split} split{_how_split(source)}")


def check_replies(source: Any, dialogue: Any, splits: set[str]) -> None:
    """Raise `UserError` where one of `splits` holds no prompt with a reply within the limits of `dialogue`."""
    for split in sorted(splits):
        if not examples(source, split, dialogue):
            raise _without_prompt(source, split, dialogue)


def _without_prompt(source: Any, split: str, dialogue: Any) -> UserError:
    """The error where no prompt of a split is left: it names the limit that leaves out most, or how rows were split."""
    dropped = _unused(source, split, dialogue, once=False)
    if not dropped:
        return UserError(f"{source.path}: no prompt in its {split} split{_how_split(source)}")
    worst = max(dropped, key=lambda why: dropped[why])
    return UserError(
        f"{source.path}: no prompt in its {split} split is left, most often because {worst} ({dropped[worst]:,}); "
        "give more rows, or set data.dialogue"
    )


def _how_split(source: Any) -> str:
    """Why rows fall into few splits, where they begin alike, and what to do."""
    rows = _parse(_as_json(source), "train").rows
    openings = len({row["key"] for row in rows})
    alike = (
        f"; its {len(rows):,} rows begin with {openings:,} different messages, and rows that begin alike stay together"
    )
    remedy = "; give more rows, set splits, or name the split of each row in a column split"
    return (alike if openings < len(rows) else "") + remedy


def _as_json(source: Any) -> str:
    """A source as JSON: with the `files` of each split where it is local, and in `splits` those that its files name."""
    given = cast(dict[str, Any], OmegaConf.to_container(source, resolve=True))
    if is_package(source.path):
        given["files"] = {ALL: [str(package_file(source.path))]}
    elif not is_task(source.path) and is_local(source.path):
        by_split = split_files(source.path, given["splits"])
        given["files"] = {split: [str(file) for file in files] for split, files in by_split.items()}
        given["splits"] = {split: given["splits"].get(split, split) for split in by_split if split != ALL}
    return json.dumps(given, sort_keys=True)


@functools.lru_cache(maxsize=32)  # three sources of three splits, and the tasks of the evaluation
def _load(source_json: str, split: str) -> Rows:
    given = json.loads(source_json)["splits"]
    parsed = _parse(source_json, split if split in given else "train")
    if split in given and split != "train":
        return parsed
    # a split with files of its own takes no rows from those of training
    wanted = {split} | (set(given) if split == "train" else set())
    return Rows([row for row in parsed.rows if _split_of(row) in wanted], parsed.unusable)


def _split_of(row: Row) -> str:
    """The split that a row names, or else the one that the hash of its key decides."""
    return row.get("split") or next(name for name, buckets in BUCKETS.items() if _bucket(row["key"]) in buckets)


def _bucket(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100


@functools.lru_cache(maxsize=32)
def _parse(source_json: str, given_split: str) -> Rows:
    """All rows of the split that the source itself calls `given_split`; of the whole source where it has no splits."""
    source, rows = SimpleNamespace(**json.loads(source_json)), []  # a DictConfig costs seconds in a loop over rows
    unusable: dict[str, dict[str, Any]] = {}
    dropped: Counter = Counter()
    raws = files.read_rows(source, given_split)
    for where, line, raw in raws:
        try:
            rows += _rows_of(raw, source, dropped)
        except UnusableRowError as reason:
            unusable.setdefault(str(reason), {"count": 0, "first_line": line, "file": where})["count"] += 1
    _refuse_bad_source(source, raws, unusable)
    left_out = unusable | {why: {"count": count} for why, count in sorted(dropped.items())}
    if not rows:
        counts = ", ".join(f"{why}: {entry['count']:,}" for why, entry in left_out.items())
        raise UserError(f"{source.path}: none of its {len(raws):,} rows is left ({counts}); give rows that can be used")
    return Rows(rows, left_out)


def _rows_of(raw: Row, source: SimpleNamespace, dropped: Counter) -> list[Row]:
    """The rows made of a raw row; where the source has no splits of its own, a column `split` names theirs."""
    renamed = raw | {ours: raw[theirs] for ours, theirs in source.columns.items() if theirs in raw}
    split = None if source.splits else renamed.get("split")
    if split and split not in tuple(BUCKETS):
        raise UnusableRowError(f"split is not {', '.join(BUCKETS)}")
    rows = FORMATS[source.format](renamed, dropped)
    return [row | {"split": split} for row in rows] if split else rows


def place_of(source: Any, prompt: list[Message], dialogue: Any) -> str:
    """File and line of the first row that has `prompt`, or a reply to it, for an error message."""
    given, most = SimpleNamespace(**json.loads(_as_json(source))), dialogue.context_turns
    for where, line, raw in files.read_rows(given, "train"):
        with contextlib.suppress(UnusableRowError):
            if any(prompt in _prompts(row, most) for row in _rows_of(raw, given, Counter())):
                return f"the row in {where}, line {line}"
    return f"a row of {source.path}"


def _prompts(row: Row, most: int | None) -> list[list[Message]]:
    turns = _turns(row)
    return [row.get("prompt", [])] + [_context(turns, i, row, most or len(turns)) for i in range(1, len(turns))]


def _refuse_bad_source(
    source: SimpleNamespace, raws: list[tuple[str, int, Row]], unusable: dict[str, dict[str, Any]]
) -> None:
    if not raws:
        raise UserError(f"{source.path}: no rows")
    bad = sum(entry["count"] for entry in unusable.values())
    if bad <= source.max_unusable_share * len(raws):
        return
    reason, worst = max(unusable.items(), key=lambda item: item[1]["count"])
    if reason.startswith("no column"):
        raw = next(raw for where, line, raw in raws if (where, line) == (worst["file"], worst["first_line"]))
        reason += f" beside {', '.join(str(name)[:30] for name in list(raw)[:8])}"
    by_number = worst["file"] == source.path or Path(worst["file"].removesuffix(".gz")).suffix in ("", ".parquet")
    unit = "row" if by_number else "line"
    remedy = f"max_unusable_share > {bad / len(raws):.3f}" if bad < len(raws) else "format or columns to what it holds"
    raise UserError(
        f"{source.path}: {bad} of {len(raws)} rows cannot be used as format={source.format}, most often because "
        f"{reason} (first in {worst['file']}, {unit} {worst['first_line']}); mend them, or set {remedy}"
    )


def texts(rows: list[Row]) -> list[str]:
    """One text per row: dialogues and preferences as their turns on lines of their own, without system messages.

    Of several pairs of one prompt the first alone gives a text.
    """
    return [_text(row) for row in _distinct(rows, "prompt")]


def _text(row: Row) -> str:
    if "text" in row:
        return row["text"]
    return "\n".join(turn["content"] for turn in _turns(row) if turn["role"] != "system")


def examples(source: Any, split: str, dialogue: Any) -> list[Example]:
    """Every reply of a split within the limits of `dialogue`, with the turns before it."""
    return _examples(_as_json(source), split, _limits(dialogue))[0]


def left_out(source: Any, split: str, dialogue: Any, once: bool = False) -> dict[str, dict[str, Any]]:
    """What a split has that is not used: reason → {"count"}, for unusable rows with the first line.

    With `once` the replies to a prompt after the first count as well: a stage that asks each prompt once does not use
    them.
    """
    unused = _unused(source, split, dialogue, once)
    return load(source, split).unusable | {why: {"count": count} for why, count in unused.items()}


def _unused(source: Any, split: str, dialogue: Any, once: bool) -> dict[str, int]:
    kept, counts = _examples(_as_json(source), split, _limits(dialogue))
    held_out = _held_out(source, split, dialogue)
    keys = [prompt_key(example.prompt) for example in kept]
    usable = [key for key in keys if key not in held_out]
    more = {"its prompt is in a held-out split": len(keys) - len(usable)}
    if once:
        more["another reply to a prompt"] = len(usable) - len(set(usable))
    return counts | {why: count for why, count in more.items() if count}


def _limits(dialogue: Any) -> tuple[tuple[str, int | None], ...]:
    return tuple(sorted(cast(dict[str, Any], OmegaConf.to_container(dialogue, resolve=True)).items()))


@functools.lru_cache(maxsize=8)
def _examples(
    source_json: str, split: str, limits: tuple[tuple[str, int | None], ...]
) -> tuple[list[Example], dict[str, int]]:
    """The examples of a split, and how many replies were left out, by reason."""
    limit, kept, dropped = dict(limits), [], Counter()
    rows = _load(source_json, split).rows
    distinct = _distinct(rows, "prompt", "chosen")
    dropped["same prompt and chosen reply as another pair"] = len(rows) - len(distinct)
    for row in distinct:
        turns = _turns(row)
        spoken = [i for i, m in enumerate(turns) if m["role"] != "system"]
        for i in spoken[1:]:
            reply = turns[i]["content"]
            if turns[i]["role"] != "assistant" and not row.get("symmetric"):
                continue
            prompt = _context(turns, i, row, limit["context_turns"] or len(turns))
            if reason := _beyond(limit, prompt, reply):
                dropped[reason] += 1
            else:
                kept.append(Example(prompt, reply))
    return kept, {why: count for why, count in sorted(dropped.items()) if count}


def _beyond(limit: dict[str, int | None], prompt: list[Message], reply: str) -> str | None:
    """The limit that a prompt or its reply breaks, if any."""
    asked = sum(len(m["content"]) for m in prompt)
    if limit["reply_min_chars"] is not None and len(reply) < limit["reply_min_chars"]:
        return f"reply shorter than data.dialogue.reply_min_chars={limit['reply_min_chars']}"
    if limit["reply_max_chars"] is not None and len(reply) > limit["reply_max_chars"]:
        return f"reply longer than data.dialogue.reply_max_chars={limit['reply_max_chars']}"
    if limit["prompt_max_chars"] is not None and asked > limit["prompt_max_chars"]:
        return f"prompt longer than data.dialogue.prompt_max_chars={limit['prompt_max_chars']}"
    return None


def _distinct(rows: list[Row], *columns: str) -> list[Row]:
    """The rows without those pairs that have the same `columns` as an earlier pair."""
    first: dict[str, Row] = {}
    for number, row in enumerate(rows):
        key = json.dumps([row[column] for column in columns]) if "chosen" in row else str(number)
        first.setdefault(key, row)
    return list(first.values())


def _turns(row: Row) -> list[Message]:
    if "text" in row:
        raise UserError("data.replies needs rows with prompts and replies; its format gives plain text")
    return row.get("messages") or [*row["prompt"], {"role": "assistant", "content": row["chosen"]}]


def _context(turns: list[Message], i: int, row: Row, most: int) -> list[Message]:
    """The last `most` turns before `turns[i]`; where earlier turns are cut off, they begin with the user's.

    Every system message before the reply is kept: one among these turns keeps its place, earlier ones come first, in
    their order. A symmetric dialogue has an odd number of turns, up to `most`, which a hash of the place decides.
    """
    spoken = [n for n in range(i) if turns[n]["role"] != "system"]
    if row.get("symmetric"):
        system = [m for m in turns[:i] if m["role"] == "system"]
        count = 1 + 2 * (_bucket(f"{row['key']} {len(spoken)}") % ((most + 1) // 2))
        count = min(count, len(spoken) - (len(spoken) + 1) % 2)
        context = [turns[n]["content"] for n in spoken[-count:]]
        return system + alternating([*context, ""])[:-1]
    if len(spoken) <= most:
        return turns[:i]
    kept = spoken[-most:]
    first = next((n for n in kept if turns[n]["role"] == "user"), kept[0])
    return [m for m in turns[:first] if m["role"] == "system"] + turns[first:i]


def prompts(source: Any, split: str, dialogue: Any) -> list[Example]:
    """Distinct prompts of a split, each with the first person's reply to it, in order of appearance.

    A prompt that also occurs in a split held out from this one is left out, so that splits have no prompt in common.
    """
    seen, distinct = _held_out(source, split, dialogue), []
    for example in examples(source, split, dialogue):
        if (key := prompt_key(example.prompt)) not in seen:
            seen.add(key)
            distinct.append(example)
    if not distinct:
        raise _without_prompt(source, split, dialogue)
    return distinct


def training_examples(source: Any, dialogue: Any) -> list[Example]:
    """Every example of the training split whose prompt occurs in no held-out split. Raises `UserError` for none."""
    held_out = _held_out(source, "train", dialogue)
    usable = [e for e in examples(source, "train", dialogue) if prompt_key(e.prompt) not in held_out]
    if not usable:
        raise _without_prompt(source, "train", dialogue)
    return usable


def _held_out(source: Any, split: str, dialogue: Any) -> set[str]:
    """The keys of the prompts that a split leaves to the splits held out from it."""
    others = {"train": ("validation", "test"), "validation": ("test",), "test": ()}[split]
    return {prompt_key(e.prompt) for other in others for e in examples(source, other, dialogue)}


def replies_by_prompt(all_examples: list[Example]) -> dict[str, list[Example]]:
    """Examples grouped by prompt; only prompts with at least two different replies."""
    groups = defaultdict(dict)
    for example in all_examples:
        groups[prompt_key(example.prompt)].setdefault(example.reply, example)
    return {key: list(group.values()) for key, group in groups.items() if len(group) > 1}


def prompt_key(prompt: list[Message]) -> str:
    """A string that two prompts share exactly when they are equal."""
    return json.dumps([[m["role"], m["content"]] for m in prompt], ensure_ascii=False)


def draw(items: list[Any], count: int, seed: int) -> list[Any]:
    """`count` items without repetition, in an order that `seed` decides; all of them when there are fewer."""
    order = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in order]
