"""Texts in the files of `conf/`: YAML reads `run: 2026_11_28` as a number, which would be written back otherwise."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import threefold.conf
from threefold.config.overrides import kind_of
from threefold.errors import UserError

PACKAGE = re.compile(r"^# @package (\S+)$", re.MULTILINE)  # Hydra's: the section that a file fills


def check(choices: Mapping[str, Any]) -> None:
    """Hold the texts in the files that are chosen, by group, to be no numbers for YAML; raises `UserError`."""
    for group, names in choices.items():
        if group.startswith(("hydra/", "section", "stage")):
            continue
        folder, _, section = group.partition("@")
        for name in [names] if isinstance(names, str) else names or ():
            file = Path(threefold.conf.__file__).parent / folder / f"{name}.yaml"
            if file.is_file():
                _check_file(file, section or folder)


def _check_file(file: Path, section: str) -> None:
    content = file.read_text()
    header = PACKAGE.search(content)
    package = header[1].replace("_global_", "") if header else section
    for key, value in _leaves(OmegaConf.to_container(OmegaConf.create(content)), package):
        if isinstance(value, int | float) and kind_of(key) is str:
            raise UserError(f"{file}: {key} is a text, and YAML reads it as the number {value}; put it in quotes")


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value below `node` with its dotted key."""
    if not isinstance(node, dict | list):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{key}.{name}".lstrip("."))
