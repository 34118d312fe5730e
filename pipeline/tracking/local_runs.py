"""Trackers that keep their runs on this machine: trackio and TensorBoard."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold.tracking.dashboard import trackio_folder
from threefold.tracking.trackers import About, Histogram, Table, results


class TrackioRun:
    """One trackio run of a stage (the protocol of pipeline/tracking/trackers.py)."""

    def __init__(self, tracker: DictConfig, about: About):
        trackio = load_trackio(about.store)
        self.trackio, self.about, begun = trackio, about, about.checkpoints / "trackio.txt"
        self.run = trackio.init(
            project=tracker.project,
            name=about.name,
            group=about.group,
            config={"job_type": about.stage, "tags": [*tracker.tags, about.stage], **about.described},
            resume="allow" if begun.exists() else "never",  # by name, and runs of other configurations share it
            embed=False,
        )
        begun.touch()
        self.step = 0

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values at the stage's own `step`."""
        self.step = step
        self.run.log({name: self._converted(value) for name, value in values.items()}, step=step)

    def alert(self, title: str, text: str) -> None:
        """An alert on the page."""
        self.run.alert(title, text, level=self.trackio.AlertLevel.ERROR)

    def finish(self, metrics: dict[str, Any], out: Path) -> None:
        """The results as a table."""
        self.log(self.step, {f"{self.about.stage}/results": results(metrics)})

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()

    def _converted(self, value: Any) -> Any:
        if isinstance(value, Table):
            return self.trackio.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        if isinstance(value, Histogram):
            return self.trackio.Histogram(np_histogram=(value.counts, value.edges))
        return value  # figures of plotly are shown as they are


def load_trackio(store: Path) -> Any:
    """The package, keeping its data in `trackio_folder`. Raises `RuntimeError` where it already keeps it elsewhere."""
    place = trackio_folder(store)
    os.environ["TRACKIO_DIR"] = str(place)  # it is read at the import
    import trackio
    from trackio import run, utils

    for module in (trackio, run, utils):
        vars(module)["print"] = lambda *_, **__: None  # a dozen lines per stage; it has no setting for this
    if place != utils.TRACKIO_DIR:
        raise RuntimeError(f"this process keeps its data in {utils.TRACKIO_DIR}, not in {place}")
    return trackio


class TensorboardRun:
    """The event files of one stage (the protocol of pipeline/tracking/trackers.py)."""

    def __init__(self, tracker: DictConfig, about: About):
        from torch.utils.tensorboard import SummaryWriter  # an extra, which trackio does without

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
