"""The sweep: a run with several values of some keys, all combinations of them or as a search by Optuna chooses.

runs/<run>/variants/<key=value,…>   the run of each setting and seed
runs/<run>/sweep.json               settings with their spread, the best, importance, failed runs
runs/<run>/sweep.csv                a line for each number of each run
runs/<run>/sweep.md, sweep.tex      the table, for a page and for a paper
runs/<run>/sweep.journal            Optuna's trials, where it is a search
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from threefold import chain
from threefold.errors import UserError
from threefold.runs import sweep_table, trials
from threefold.runs.sweep_space import Dimension
from threefold.stages import needed_by
from threefold.tracking.trackers import installed


def run(config: DictConfig, overrides: list[str], space: list[Dimension]) -> dict[str, Any]:
    """Make a sweep over `space`, print its table and write its files; returns what sweep.json holds.

    Runs that fail are in `failed`. What is there is not made again, so the same command continues an interrupted sweep
    and makes failed runs alone. Raises `UserError` for bad input.
    """
    with alone(config):
        chain.keep_choices(config, overrides, needed_by(config.target, config))
        if config.sweep.trials:
            installed("optuna", "sweep.trials")
            from threefold.runs import sweep_search

            results = sweep_search.run(config, overrides, space)
        else:
            runs = trials.make(config, overrides, trials.of_grid(space, config.target))
            results = trials.write(config, space, runs, sweep_table.variance_shares(runs), "main effects")
    sweep_table.print_result(results, Path(config.runs) / config.run)
    return results


@contextlib.contextmanager
def alone(config: DictConfig) -> Generator[None]:
    """Hold the run's sweep; raises `UserError` while another process does."""
    folder = Path(config.runs) / config.run
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "sweep.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"run={config.run}: another sweep of it is going on; wait, or choose another run") from None
    try:
        yield
    finally:
        lock.release()
