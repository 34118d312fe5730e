"""Where a stage's metrics go while it runs: a step log in its folder, and trackers that can neither block nor fail it.

A tracker (pipeline/tracking/wandb_run.py and its neighbours) works in a thread of its own. A call hands over what is to
be tracked and returns at once. A slow start, a lost network or a full disk stops that thread alone, and is told in one
printed line.
"""

import contextlib
import importlib
import json
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from threefold.errors import first_line
from threefold.tracking.backends import KINDS
from threefold.tracking.values import About

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
