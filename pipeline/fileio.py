"""JSON and text in files that are never seen half-written; damaged ones are refused in one line."""

import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from threefold.errors import UserError, first_line


def write_json(file: Path, content: Any) -> None:
    """Write `content` as JSON so that `file` is never seen half-written; `UserError` where a number is not finite."""
    write_text(file, _as_json(file, content, indent=2) + "\n")


def _as_json(file: Path, content: Any, **options: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
    except ValueError:  # JSON has no numbers that are not finite
        for place, number in _numbers(content):
            if not math.isfinite(number):
                raise UserError(
                    f"{file.name}: {place} is {number}, no finite number; look for a reward function or judge that "
                    "gives one, or for a training that diverged"
                ) from None
        raise


def _numbers(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every floating-point number within `content`, with its place, as models.ppo.gold_mean."""
    if isinstance(content, float):
        yield place, content
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield from _numbers(value, f"{place}.{key}" if place else str(key))


def flat(content: dict[str, Any], skip: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Every value below `content` by its dotted name, but for what stands below a key in `skip`; lists stay whole."""
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in skip:
            values |= flat(value, skip, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def numbers(content: dict[str, Any], skip: Collection[str] = ()) -> dict[str, float]:
    """The numbers among `flat(content, skip)`: no truth values, texts or lists."""
    return {
        name: float(value)
        for name, value in flat(content, skip).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def write_text(file: Path, text: str) -> None:
    """Write `text` so that `file` is never seen half-written."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(file)


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `UserError` for a damaged one, naming what to remove."""
    try:
        content = json.loads(file.read_text())
        if file.name in ("manifest.json", "metrics.json") and not isinstance(content, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is damaged ({first_line(error)}); {_remedy(file)}") from error
    return content


def read_lines(file: Path) -> list[Any]:
    """The rows of a JSON-lines file; empty when there is none. Raises `UserError` naming the line of a damaged one."""
    if not file.is_file():
        return []
    rows: list[Any] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: line {number} is damaged ({first_line(error)}); {_remedy(file)}") from error
    return rows


def _remedy(file: Path) -> str:
    """What to do where `file` is damaged; an artifact is to be removed as a whole."""
    folder = file.parent.resolve()
    if folder.parent.name == "artifacts":
        return f"remove the folder {folder}, the same command makes it again"
    return "remove the file, or mend it"


def write_lines(file: Path, rows: list[Any]) -> None:
    """Write `rows` as JSON lines so that `file` is never seen half-written; `UserError` as for `write_json`."""
    write_text(file, "".join(_as_json(file, row) + "\n" for row in rows))
