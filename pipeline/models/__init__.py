"""Models: made, loaded, adapted and saved, and what they say of tokens. This file imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

from threefold.errors import UserError

# A model of transformers, or `lora.Adapted` in its place. torch types each attribute of a module as Tensor | Module, so
# that config, base_model and score would be either; `Any` lets them be what they are.
Model = Any


ADAPTER = "adapter_config.json"


def adapter_base(folder: Path) -> str | None:
    """The model, a folder or a name on the hub, that the adapter in `folder` belongs to; None where it holds none."""
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: names no base_model_name_or_path; save the adapter again with peft") from error


def adapter_revision(folder: Path) -> str:
    """The commit, branch or tag of its base model that the adapter in `folder` belongs to."""
    return json.loads((folder / ADAPTER).read_text()).get("revision") or "main"
