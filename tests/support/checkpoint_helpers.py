"""What tests of checkpoints share: the configuration that names one, taking it, and how it is refused."""

import json

import pytest
from helpers import composed

from threefold.errors import UserError
from threefold.models import loading
from threefold.stages import tokenizer as tokenizer_stage

DATE = "2026-01-01"  # what templates write for today


def settings(folder, *more):
    return hf(folder, *more).model


def hf(folder, *more):
    """The configuration of model=hf, as far as the two first stages read it."""
    return composed("tracker=none", f"model.checkpoint={folder}", *more)


def take(folder, *more):
    """Both calls that take a checkpoint, as the two first stages make them."""
    model = settings(folder, *more)
    return loading.from_checkpoint(model, tokenizer_stage.from_checkpoint(model, DATE))


def refused(line, call, *arguments, **options) -> str:
    """What the call is refused with: one line that `line` matches."""
    with pytest.raises(UserError, match=line) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
