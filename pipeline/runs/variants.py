"""Variants of a run: the same command with other values, each in a run folder of its own.

They are made on this machine, several at a time, each in a process of its own (`make_here`), or with launcher=slurm
every artifact is a job (`slurm.submission.make_jobs`). Both take composed runs and return why some were not made.

What all of them share is made once before, with all threads. What only some share is made by the first of them, while
the others wait for its lock.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from threefold import chain
from threefold.chain.plans import Member
from threefold.config.compose import compose
from threefold.errors import UserError, first_line, public_traceback
from threefold.execution import launch
from threefold.slurm import submission

Work = dict[str, tuple[list[str], Path]]  # variant → its overrides and its log
OUTSIDE = "its process was ended from outside, perhaps for want of memory; launcher.jobs=1 takes less"


def make_here(members: Sequence[Member]) -> dict[str, str]:
    """Make what `members`, variants of one run, lack; run → first error line and its log, for those that failed."""
    for member in members:
        chain.check(member.config, member.planned)
    for member in members:
        member.keep()
    config = members[0].config
    run = config.run.rpartition("/variants/")[0]
    try:
        _make_shared(members, Path(config.runs) / run)
    except UserError as error:
        return {member.config.run: first_line(error) for member in members}
    jobs = min(len(members), _jobs(config))
    threads = config.runtime.threads or max(1, _cores() // jobs)
    work: Work = {}
    for member in members:
        folder = Path(config.runs) / member.config.run
        folder.mkdir(parents=True, exist_ok=True)
        member.link()
        if not all(entry.artifact.finished for entry in member.planned.values()):
            name = member.config.run.removeprefix(f"{run}/")
            work[name] = [*member.overrides, f"runtime.threads={threads}"], folder / "log.txt"
    return {f"{run}/{name}": f"{reason} (see {work[name][1]})" for name, reason in _run(work, jobs).items()}


def _make_shared(members: Sequence[Member], run: Path) -> None:
    """Make the stages that every member needs in the same form, and link them into `run`; one alone shares none."""
    if len(members) == 1:
        return
    first, *others = members
    for name, entry in first.planned.items():
        if all(name in other.planned and other.planned[name].fingerprint == entry.fingerprint for other in others):
            if not entry.artifact.finished:
                chain.make(first.config, entry, first.planned)
            entry.artifact.link_into(run)


def _run(work: Work, jobs: int) -> dict[str, str]:
    """Make variants (name → overrides, log) in `jobs` processes; name → first error line of those that failed.

    Where a process is ended from outside, which ends all others with it, the rest is made one at a time.
    """
    failed: dict[str, str] = {}
    left, started, jobs = dict(work), time.monotonic(), min(jobs, len(work))
    if left:
        print(f"{len(work)} variants, {jobs} at a time; each has a log in its folder", flush=True)
    while left:
        try:
            for name, reason in _finished(left, jobs):
                _note(failed, name, reason, len(work) - len(left) + 1, len(work), time.monotonic() - started)
                del left[name]
        except BrokenProcessPool:
            if jobs == 1:
                name = next(iter(left))
                _note(failed, name, OUTSIDE, len(work) - len(left) + 1, len(work), time.monotonic() - started)
                del left[name]
            jobs = 1
    return failed


def _note(failed: dict[str, str], name: str, reason: str | None, done: int, count: int, seconds: float) -> None:
    if reason:
        failed[name] = reason
    print(f"{done} of {count}  {name}: {f'failed: {reason}' if reason else 'done'}  ({seconds:.0f} s)", flush=True)


def _finished(work: Work, jobs: int) -> Iterator[tuple[str, str | None]]:
    """Names as they are done, with the first line of their error; an interrupt ends what is running."""
    # on GPUs each variant has a fresh process: its memory, and the GPU that a stage binds it to, are free when it ends
    kept = {"max_tasks_per_child": 1} if _on_gpus() else {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (launch.GPUS,), **kept) as pool:
        names: dict[Future[str | None], str] = {pool.submit(_make_one, *task): name for name, task in work.items()}
        try:
            for future in as_completed(names):
                yield names[future], future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _make_one(overrides: list[str], log: Path) -> str | None:
    """Make one variant in this process, which writes into `log`; the first line of its error, if it fails."""
    with _output_into(log) as written:
        try:
            chain.bring_up_to_date(compose(overrides))
        except Exception as error:
            if not isinstance(error, UserError):
                print(public_traceback(error), file=written, end="")
            return first_line(error)
    return None


@contextlib.contextmanager
def _output_into(log: Path) -> Generator[TextIO]:
    """What this process writes goes to the end of `log`, which is given open."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, former in zip((1, 2), kept, strict=True):
                os.dup2(former, descriptor)
                os.close(former)


def _begin(gpus: str | None) -> None:
    """Give this process the GPUs that the driver was given, and end it when the driver is gone, however that ended."""
    launch.GPUS = gpus
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # to which a stage in the driver may have narrowed itself
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    if driver := multiprocessing.parent_process():
        threading.Thread(target=lambda: (driver.join(), os._exit(1)), daemon=True).start()


def _jobs(config: DictConfig) -> int:
    """How many variants are made at a time."""
    if config.launcher.jobs is not None:
        return config.launcher.jobs
    on_gpu = config.runtime.device != "cpu" and _on_gpus()
    return 1 if on_gpu else max(1, _cores() // ((config.runtime.threads or 1) * config.launch.processes))


def _on_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def _cores() -> int:
    from threefold.execution.device import usable_cpus  # imports torch, which the report does without

    return usable_cpus()


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
    make_members = submission.make_jobs if config.launcher.kind == "slurm" else make_here
    failures = make_members(members)
    reasons = {run.removeprefix(f"{config.run}/"): reason for run, reason in failures.items()}
    if reasons:
        name, reason = next(iter(reasons.items()))
        raise Failed(f"{len(reasons)} of {len(variants)} variants failed; {name}: {reason}", reasons)
    return members
