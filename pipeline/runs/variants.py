"""Variants of a run: the same command with other values, each in a run folder of its own.

They are made on this machine, several at a time (`local`), or with launcher=slurm every artifact is a job of its own
(`slurm.waiting`). Both take the composed runs, and return why those that failed are not made.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from threefold.chain.member import Member
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.runs import local
from threefold.slurm import waiting


class Failed(UserError):
    """Variants that could not be made; `reasons` has the first line of each one's error by its name."""

    def __init__(self, message: str, reasons: dict[str, str]):
        super().__init__(message)
        self.reasons = reasons


@dataclass(frozen=True)
class Variant:
    """A run below the run that it varies, runs/<run>/<name>, with the overrides that make it."""

    name: str  # variants/<what it varies>
    overrides: tuple[str, ...]
    target: str | None  # the stage that is wanted; None is the whole chain

    def arguments(self, config: DictConfig, overrides: list[str]) -> list[str]:
        """All overrides of this variant, after those of the command."""
        place = [f"run={config.run}/{self.name}", f"target={self.target or 'null'}", "dependents=false", "seeds=null"]
        return [*overrides, *self.overrides, *place]

    def member(self, config: DictConfig, overrides: list[str]) -> Member:
        """The composed run."""
        arguments = self.arguments(config, overrides)
        return Member(compose(arguments), arguments)


def make(config: DictConfig, overrides: list[str], variants: list[Variant]) -> list[Member]:
    """Bring all variants of `config`, composed from `overrides`, up to date; returns their runs.

    Raises `Failed` where any failed, after all others are done; the first lines of their errors are printed.
    """
    if config.launch.nodes > 1:
        raise UserError(
            f"launch.nodes={config.launch.nodes}: several runs at once need one machine each; use launch.nodes=1"
        )
    members = [variant.member(config, overrides) for variant in variants]
    failures = (waiting if config.launcher.kind == "slurm" else local).make(members)
    reasons = {run.removeprefix(f"{config.run}/"): reason for run, reason in failures.items()}
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise Failed(f"{len(reasons)} of {len(variants)} variants failed; {name}: {reason}", reasons)
    return members
