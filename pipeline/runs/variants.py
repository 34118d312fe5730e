"""Variants of a run: the same command with other values, each in a run folder of its own, several at a time.

On this machine, what all variants share is made once, with all threads, before they go their ways; what some share is
made by the first of them while the others wait for its lock. With launcher=slurm every artifact is a job of its own.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from threefold import chain
from threefold.chain.member import Member
from threefold.config.compose import compose
from threefold.errors import UserError, first_line, public_traceback
from threefold.execution import launch
from threefold.slurm import waiting
from threefold.stages import needed_by


class Failed(UserError):
    """Variants that could not be made; `reasons` has the first line of each one's error by its name."""

    def __init__(self, message: str, reasons: dict[str, str]):
        super().__init__(message)
        self.reasons = reasons


@dataclass(frozen=True)
class Variant:
    """A run below the run that it varies, runs/<run>/<name>, with the overrides that make it."""

    name: str
    overrides: tuple[str, ...]
    target: str | None  # the stage that is wanted; None is the whole chain

    def arguments(self, config: DictConfig, overrides: list[str]) -> list[str]:
        """All overrides of this variant, after those of the command."""
        own = [f"run={config.run}/{self.name}", f"target={self.target or 'null'}", "dependents=false", "seeds=null"]
        return [*overrides, *self.overrides, *own]

    def member(self, config: DictConfig, overrides: list[str]) -> Member:
        """The composed run."""
        arguments = self.arguments(config, overrides)
        return Member(compose(arguments), arguments)


def make(config: DictConfig, overrides: list[str], variants: list[Variant]) -> list[DictConfig]:
    """Bring all variants of `config`, composed from `overrides`, up to date; returns their configurations.

    Raises `Failed` where any failed, after all others are done; the first lines of their errors are printed.
    """
    if config.launch.nodes > 1:
        raise UserError(
            f"launch.nodes={config.launch.nodes}: several runs at once need one machine each; use launch.nodes=1"
        )
    members = [variant.member(config, overrides) for variant in variants]
    composed = [member.config for member in members]
    if config.launcher.kind == "slurm":
        failed = waiting.make(members)
        failed = {name.removeprefix(f"{config.run}/"): reason for name, reason in failed.items()}
    else:
        failed = _make_here(config, overrides, variants, composed)
    if failed:
        name, reason = next(iter(failed.items()))
        raise Failed(f"{len(failed)} of {len(variants)} variants failed; {name}: {reason}", failed)
    return composed


def _make_here(
    config: DictConfig, overrides: list[str], variants: list[Variant], composed: list[DictConfig]
) -> dict[str, str]:
    """Make variants on this machine; name → first error line, and where more is said, of those that failed."""
    plans = [chain.plan(each, needed_by(each.target, each)) for each in composed]
    for each, planned in zip(composed, plans, strict=True):
        chain.check(each, planned)
    try:
        _make_shared(composed[0], plans, Path(config.runs) / config.run)
    except UserError as error:
        return {variant.name: first_line(error) for variant in variants}
    jobs = min(len(variants), _jobs(config))
    threads = config.runtime.threads or max(1, _cores() // jobs)
    work = {
        variant.name: ([*variant.arguments(config, overrides), f"runtime.threads={threads}"], _log(each))
        for variant, each in zip(variants, composed, strict=True)
    }
    unfinished = {name: task for (name, task), each in zip(work.items(), composed, strict=True) if not _linked(each)}
    return {name: f"{reason} (see {work[name][1]})" for name, reason in _run(unfinished, jobs).items()}


def _make_shared(config: DictConfig, plans: list[dict[str, chain.Planned]], run: Path) -> None:
    """Make the stages that every variant needs in the same form, and link them into `run`; one alone shares none.

    `config` is that of the first variant.
    """
    planned = plans[0]
    shared = {
        name: entry
        for name, entry in planned.items()
        if len(plans) > 1 and all(name in plan and plan[name].fingerprint == entry.fingerprint for plan in plans)
    }
    for entry in shared.values():
        if not entry.artifact.finished:
            chain.make(config, entry, planned)
        entry.artifact.link_into(run)


def _linked(config: DictConfig) -> bool:
    """Link what is there into the variant's run; whether that is all of it."""
    planned = chain.plan(config, needed_by(config.target, config))
    there = [entry for entry in planned.values() if entry.artifact.finished]
    for entry in there:
        entry.artifact.link_into(Path(config.runs) / config.run)
    return len(there) == len(planned)


def _run(work: dict[str, tuple[list[str], Path]], jobs: int) -> dict[str, str]:
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


OUTSIDE = "its process was ended from outside, perhaps for want of memory; launcher.jobs=1 takes less"


def _note(failed: dict[str, str], name: str, reason: str | None, done: int, count: int, seconds: float) -> None:
    if reason:
        failed[name] = reason
    print(f"{done} of {count}  {name}: {f'failed: {reason}' if reason else 'done'}  ({seconds:.0f} s)", flush=True)


def _finished(work: dict[str, tuple[list[str], Path]], jobs: int) -> Iterator[tuple[str, str | None]]:
    """Names as they are done, with the first line of their error; an interrupt ends what is running."""
    # on GPUs each has a process of its own: with it goes the memory it took, and the one GPU to which a stage keeps
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
def _output_into(log: Path) -> Iterator[TextIO]:
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


def _log(config: DictConfig) -> Path:
    folder = Path(config.runs) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "log.txt"


def _begin(gpus: str | None) -> None:
    """Give this process the GPUs that the driver was given, and end it when the driver is gone, however that ended."""
    launch.GPUS = gpus
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # to which a stage in the driver may have narrowed itself
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    driver = multiprocessing.parent_process()
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
