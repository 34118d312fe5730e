"""Where a stage's metrics go while it runs: a step log in its folder, and trackers that can neither block nor fail it.

A tracker (pipeline/tracking/wandb_run.py and its neighbours) works in a thread of its own. A call hands over what is to
be tracked and returns at once. A slow start, a lost network or a full disk stops that thread alone, and is told in one
printed line.

Which trackers there are, and whether they can be used here. Imports none of them.

What trackers are given: numbers, tables, histograms and figures, and what they are told of an execution.
"""

import contextlib
import importlib
import importlib.util
import json
import netrc
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

import numpy as np
from omegaconf import DictConfig

from threefold.display.parts import markdown_lines
from threefold.errors import UserError, first_line
from threefold.fileio import flat

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


def results(metrics: dict[str, Any]) -> Table:
    """The single numbers and words among a stage's results, for trackers that have no place of their own for them."""
    rows = [(name, value) for name, value in flat(metrics).items() if isinstance(value, int | float | str)]
    return Table(("result", "value"), rows)


# kind → name for people, module and class, package that it needs
KINDS = {
    "wandb": ("W&B", "threefold.tracking.wandb_run", "WandbRun", "wandb"),
    "trackio": ("trackio", "threefold.tracking.local_runs", "TrackioRun", "trackio"),
    "tensorboard": ("TensorBoard", "threefold.tracking.local_runs", "TensorboardRun", "tensorboard"),
}
NO_KEY = "no W&B key; run `wandb login` or set WANDB_API_KEY"


def require(config: DictConfig) -> None:
    """Raise `UserError` where a tracker of `config.kinds` is not installed, or is to be online without a key."""
    for kind in config.kinds:
        installed(KINDS[kind][-1], "tracker.kinds")
    if "wandb" in config.kinds and config.mode == "online" and not has_key():
        raise UserError(f"tracker.mode=online: {NO_KEY}, or use tracker.mode=auto")


def installed(package: str, key: str) -> None:
    """Raise `UserError` naming `key` where a package of the extras is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key}: {package} is not installed; install it (pip install {package.replace('_', '-')})")


def mode(asked: str) -> str:
    """`asked`, with auto resolved: online only with a key and a host that answers within two seconds."""
    if asked != "auto":
        return asked
    return "online" if has_key() and reachable() else "offline"


def has_key() -> bool:
    """Whether W&B would find a key, without asking the network or the person."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc.netrc(file).authenticators(server().netloc) is not None
    except netrc.NetrcParseError:
        return False


def server() -> SplitResult:
    """The address of W&B, or of one's own server."""
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def reachable() -> bool:
    """Whether the host of W&B takes a connection within two seconds."""
    address = server()
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=2).close()
    except OSError:
        return False
    return True


MOST_WAITING = 10_000  # calls that a tracker may be behind
FINISH_SECONDS = 45  # that a stage waits for a tracker at its end
LEAST_ROOM = 2**18  # bytes


class StepLog:
    """Metrics by step as JSON lines, {"step": 10, "loss": 3.2}; a resumed stage drops what follows its checkpoint."""

    def __init__(self, file: Path):
        self.file = file

    def last(self) -> int:
        """The last step in the log; -1 where there is none."""
        return max((json.loads(line)["step"] for line in self._whole_lines()), default=-1)

    def rewind(self, step: int) -> None:
        """Forget lines after `step`, and a line cut short by a kill."""
        if self.file.exists():
            kept = [line for line in self._whole_lines() if json.loads(line)["step"] <= step]
            self.file.write_text("".join(kept))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line and hand it to the system at once."""
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def _whole_lines(self) -> list[str]:
        if not self.file.is_file():
            return []
        return [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Tracker(Protocol):
    """What a tracker does; it is started by its constructor, with `config.tracker` and an `About`."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values of one step by name: numbers, a `Table`, a `Histogram` or a figure of plotly."""

    def alert(self, title: str, text: str) -> None:
        """Tell people at once, where the tracker can."""

    def finish(self, metrics: dict[str, Any], out: Path) -> None:
        """The stage's results, and the folder that becomes its artifact."""

    def close(self) -> None:
        """The end, after success and failure alike."""


class Background:
    """A tracker in a thread of its own. Its first error ends it, with one printed line."""

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name, self.over, self.lock = name, False, threading.Lock()
        self.calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self._work, args=(start,), daemon=True, name=f"tracker {name}")
        self.thread.start()

    def call(self, method: str, *arguments: Any) -> None:
        """Have the tracker do `method` after all that it was asked before; returns at once."""
        if self.over:
            return
        try:
            self.calls.put_nowait((method, arguments))
        except queue.Full:
            self.give_up(f"is {MOST_WAITING:,} calls behind")

    def close(self, limit: float) -> None:
        """Have it finish, and wait for that, `limit` seconds at most."""
        self.call("close")
        if not self.over:
            self.thread.join(limit)
        if not self.over and self.thread.is_alive():
            self.give_up(f"did not finish within {limit:g} s")

    def give_up(self, reason: str) -> None:
        """Stop using the tracker, and print why, once."""
        with self.lock:
            if not self.over:
                print(f"{self.name} is off for the rest of this stage: {reason}", flush=True)
            self.over = True

    def _work(self, start: Callable[[], Tracker]) -> None:
        tracker, method = None, ""
        try:
            tracker = start()
            while method != "close" and not self.over:
                method, arguments = self.calls.get()
                getattr(tracker, method)(*arguments)
        except Exception as error:
            self.give_up(first_line(error))
        if tracker is not None and method != "close":
            with contextlib.suppress(Exception):
                tracker.close()


class Trackers:
    """The trackers of one execution of a stage. Metrics are told apart by stage: `ppo/kl`."""

    def __init__(self, config: Any, about: About, last_tracked: int = -1):
        """Start the trackers of `config.kinds`; what was tracked before a kill is left out."""
        self.about, self.last_tracked, self.step, self.axes = about, last_tracked, 0, {}
        self.running = [tracker for kind in config.kinds if (tracker := _start(kind, config, about))]

    def log(self, step: int, metrics: dict[str, Any], axes: dict[str, int]) -> None:
        """Metrics of one step, with how far the stage is by other measures, such as tokens."""
        self.axes = axes
        self.show(metrics, step)

    def show(self, values: dict[str, Any], step: int | None = None) -> None:
        """Values at `step`, or at the last one."""
        self.step = self.step if step is None else step
        if step is None or step > self.last_tracked:
            named = {f"{self.about.stage}/{name}": value for name, value in (self.axes | values).items()}
            self._all("log", self.step, named)

    def alert(self, title: str, text: str) -> None:
        """Tell people at once."""
        self._all("alert", title, text)

    def finish(self, metrics: dict[str, Any], out: Path) -> None:
        """The stage's results."""
        self._all("finish", metrics, out)

    def close(self) -> None:
        """End all of them."""
        for tracker in self.running:
            tracker.close(FINISH_SECONDS)

    def _all(self, method: str, *arguments: Any) -> None:
        for tracker in self.running:
            tracker.call(method, *arguments)


def _start(kind: str, config: Any, about: About) -> Background | None:
    name, module, made, _ = KINDS[kind]
    try:
        # here and not in its thread: the stage's own imports come next, and two threads importing can meet half-made
        # modules
        make = getattr(importlib.import_module(module), made)
    except Exception as error:
        print(f"{name} is off for this stage: {first_line(error)}", flush=True)
        return None

    def start() -> Tracker:
        require_room(about.store / kind)
        return make(config, about)

    return Background(name, start)


def require_room(folder: Path) -> None:
    """Raise `OSError` where a folder cannot be written to; the trackers themselves would say so at length."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * LEAST_ROOM)
