"""TensorBoard: the same metrics as event files."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.utils.tensorboard import SummaryWriter

from threefold.tracking.values import About, Histogram, Table, results


class TensorboardRun:
    """The event files of one stage (the protocol of pipeline/tracking/trackers.py)."""

    def __init__(self, tracker: DictConfig, about: About):
        place = about.store / "tensorboard" / about.run / f"{about.stage}-{about.fingerprint}"
        self.about, self.step = about, 0
        self.writer = SummaryWriter(str(place))
        tags = ", ".join([*tracker.tags, about.stage])
        lineage = Table(("stage", "fingerprint"), [(about.stage, about.fingerprint), *about.parents.items()])
        self.writer.add_text(f"{about.stage}/lineage", f"{tags}\n\n{lineage.markdown()}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values at the stage's own `step`. Figures are left out: their tables say the same."""
        self.step = step
        for name, value in values.items():
            if isinstance(value, Table):
                self.writer.add_text(name, value.markdown(), step)
            elif isinstance(value, Histogram):
                self._histogram(name, value, step)
            elif isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def _histogram(self, name: str, value: Histogram, step: int) -> None:
        middles = (value.edges[:-1] + value.edges[1:]) / 2
        self.writer.add_histogram_raw(
            name,
            min=value.edges[0],
            max=value.edges[-1],
            num=int(value.counts.sum()),
            sum=float(value.counts @ middles),
            sum_squares=float(value.counts @ middles**2),
            bucket_limits=value.edges[1:].tolist(),
            bucket_counts=value.counts.tolist(),
            global_step=step,
        )

    def alert(self, title: str, text: str) -> None:
        """A text beside the others."""
        self.writer.add_text(f"{self.about.stage}/alerts", f"**{title}** {text}", self.step)

    def finish(self, metrics: dict[str, Any], out: Path) -> None:
        """The results as a table."""
        self.log(self.step, {f"{self.about.stage}/results": results(metrics)})

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
