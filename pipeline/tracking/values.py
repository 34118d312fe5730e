"""What trackers are given: numbers, tables, histograms and figures, and what they are told of an execution."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from threefold.display.parts import markdown_lines

AXES = {"pretrain": "tokens", "ppo": "rollout"}  # what the charts of a stage run over; of the others OPTIMISER_STEP
OPTIMISER_STEP = "optimiser_step"
BINS = 50


@dataclass(frozen=True)
class Table:
    """Rows under named columns; cells are text or numbers."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def markdown(self) -> str:
        """The table in Markdown, floating-point numbers in four digits."""
        rows = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]
        return "\n".join(markdown_lines([self.columns, *rows], ["---"] * len(self.columns), "<br>"))


@dataclass(frozen=True)
class Histogram:
    """Counts of values [BINS] between edges [BINS + 1]."""

    counts: np.ndarray
    edges: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Histogram":
        """The histogram of those of `values` that are finite; ratios that are all but 1 need double precision."""
        return cls(*np.histogram(values[np.isfinite(values)].astype(np.float64), bins=BINS))


@dataclass(frozen=True)
class About:
    """What a tracker is told of an execution of a stage."""

    stage: str
    run: str  # of Threefold: its stages are one group, and so are its variants
    fingerprint: str
    parents: dict[str, str]  # stage → fingerprint
    config: dict[str, Any]  # all that the stage may see
    store: Path  # runs/artifacts
    checkpoints: Path  # survives a kill

    @property
    def name(self) -> str:
        """The name of the tracked run."""
        return f"{self.run}/{self.stage}"

    @property
    def group(self) -> str:
        """The run, or what its variants, points or trials are of."""
        return self.run.partition("/")[0]

    @property
    def axis(self) -> str:
        """The metric that the stage's charts run over."""
        return f"{self.stage}/{AXES.get(self.stage, OPTIMISER_STEP)}"

    @property
    def described(self) -> dict[str, Any]:
        """The configuration with the lineage beside it."""
        return self.config | {"lineage": {"fingerprint": self.fingerprint, "parents": self.parents}}


def results(metrics: dict[str, Any], prefix: str = "") -> Table:
    """The single numbers and words among a stage's results, for trackers that have no place of their own for them."""
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += results(value, f"{prefix}{name}.").rows
        elif isinstance(value, int | float | str):
            rows.append((f"{prefix}{name}", value))
    return Table(("result", "value"), rows)
