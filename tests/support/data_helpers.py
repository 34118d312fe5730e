"""Sources, rows and conversations that several tests of data share, and where local copies of real data are."""

import hashlib
import json
import os
from pathlib import Path

from omegaconf import OmegaConf

from threefold.data import reading
from threefold.schema.stages import SourceConfig

DATA = Path(os.environ.get("THREEFOLD_DATA", Path(__file__).parents[3] / "shared/data"))


def source(path, kind="text", **options):
    return OmegaConf.merge(OmegaConf.structured(SourceConfig), {"path": str(path), "format": kind, **options})


def lines(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bucket(key):
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100


def everything(found):
    """All rows of a source without splits of its own."""
    return [row for split in ("train", "validation", "test") for row in reading.load(found, split).rows]


def said(role, content):
    return {"role": role, "content": content}


Q, A = said("user", "q"), said("assistant", "a")


def conversations(tmp_path, turns, count=1, topic=None):
    """A source of `count` equal conversations; `turns`: (sender, message, ...)."""
    messages = [[{"sender": sender, "text": text} for text in texts] for sender, *texts in turns]
    content = {f"id {i}": {"prompt": topic, "messages": messages} for i in range(count)}
    (tmp_path / "conversations.json").write_text(json.dumps(content))
    return source(tmp_path / "conversations.json", "chitchat")


def spoken(row):
    return [m["content"] for m in row["messages"] if m["role"] != "system"]
