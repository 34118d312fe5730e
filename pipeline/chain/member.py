"""One run among those that a command makes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from threefold import chain
from threefold.chain import Planned


@dataclass
class Member:
    """A run, composed from `overrides`."""

    config: DictConfig
    overrides: list[str]

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """Its stages, parents first."""
        return chain.plan(self.config, chain.wanted(self.config))

    def link(self) -> None:
        """Link what is made into the run."""
        for entry in self.planned.values():
            if entry.artifact.finished:
                entry.artifact.link_into(Path(self.config.runs) / self.config.run)
