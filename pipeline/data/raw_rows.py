"""The raw rows of a source: of files, of a task that is generated, or of the hub."""

import json
from pathlib import Path
from types import SimpleNamespace

from threefold.columns import Row
from threefold.data import files, tasks
from threefold.data.folders import ALL, is_task, local_files
from threefold.errors import UserError


def read(source: SimpleNamespace, split: str) -> list[tuple[str, int, Row]]:
    """Raw rows, each with its file's name and its line there (for the hub and for conversations: its number)."""
    of_split = getattr(source, "files", {})
    local = [Path(file) for file in of_split.get(split) or of_split.get(ALL, ())]
    if source.format == "chitchat":
        return [row for file in local or local_files(source.path) for row in _read_chitchat(file)]
    if is_task(source.path):
        return [(source.path, number, row) for number, row in enumerate(tasks.generator(source.path)(), start=1)]
    if local:
        return [row for file in local for row in files.read(file)]
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
