"""A search by Optuna, asked for trials and told their results; its journal lets a killed search continue.

The course of a search depends on the results and the seed alone: what is drawn next follows from the place in the
search, not from when the command was started. A trial that was killed or failed is made again with the same values.
"""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import optuna
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from threefold import chain
from threefold.artifacts.artifact import fingerprint_of
from threefold.errors import UserError
from threefold.runs import trials
from threefold.runs.sweep_space import Dimension, direction, kl_metric, objective, target_fingerprint
from threefold.runs.sweep_table import setting
from threefold.runs.trials import Watch, watched

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def run(config: DictConfig, overrides: list[str], space: list[Dimension]) -> dict[str, Any]:
    """Bring the search to `sweep.trials` trials and write its files; returns what sweep.json holds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = opened(config, space)
    retry_unfinished(study)
    while (left := config.sweep.trials - len(ended(study))) > 0:
        study.sampler = sampler(config.sweep, len(ended(study)))
        asked = {dimension.key: distribution(dimension) for dimension in space if not dimension.repeats}
        batch = [study.ask(asked) for _ in range(min(left, config.sweep.batch))]
        make(config, overrides, space, study, batch)
        written(config, space, study, {})
    return written(config, space, study, importance(study))


def opened(config: DictConfig, space: list[Dimension]) -> optuna.Study:
    """The study of this search in the run's journal, which keeps those of other searches apart by their names."""
    file = Path(config.runs) / config.run / "sweep.journal"
    mend(file)
    # a file of lines that are only ever added to: safe on network file systems, which SQLite's locks are not
    storage = JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file))))
    return optuna.create_study(
        study_name=identity(config, space),
        storage=storage,
        direction=direction(objective(config), config.sweep.direction),
        pruner=optuna.pruners.MedianPruner(config.sweep.prune_after_trials, config.sweep.prune_after_steps),
        load_if_exists=True,
    )


def mend(file: Path) -> None:
    """Drop what a kill may leave: a line cut short, and the lock of a process that is gone (the run's own is held)."""
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def identity(config: DictConfig, space: list[Dimension]) -> str:
    """A name that changes with all that trials are compared by, and with what their results and values follow from.

    How many are made at a time, and how many at random first, may change in the middle of a search.
    """
    return fingerprint_of({
        "space": [vars(dimension) for dimension in space],
        "target": target_fingerprint(config),
        "metric": objective(config),
        "direction": direction(objective(config), config.sweep.direction),
        "kl": kl_metric(config),
        "seed": config.sweep.seed,
        "prune": [config.sweep.prune, config.sweep.prune_direction],
    })  # fmt: skip


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's form of the values of a key."""
    values = dimension.values
    if values and dimension.step is None:
        return CategoricalDistribution(values)
    low, high = (min(values), max(values)) if values else (dimension.low, dimension.high)
    step: Any = abs(dimension.step) if dimension.step is not None else None
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=dimension.log, step=step or 1)
    return FloatDistribution(low, high, log=dimension.log, step=step)


def sampler(config: DictConfig, place: int) -> optuna.samplers.TPESampler:
    """The sampler for trials from `place` on; begun again with one seed, a search would repeat its first draws."""
    seed = int(fingerprint_of({"seed": config.seed, "place": place})[:8], 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar, in Optuna 4
        return optuna.samplers.TPESampler(n_startup_trials=config.random_trials, seed=seed, constant_liar=True)


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have their result, in order, without those that another has taken the place of."""
    trials = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get("instead_of") for trial in trials}
    return [trial for trial in trials if trial.state in ENDED and trial.number not in replaced]


def retry_unfinished(study: optuna.Study) -> None:
    """Have trials that were killed or failed made again, with the values that they had."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    for trial in ended(study):
        if trial.state == TrialState.FAIL:
            study.enqueue_trial(trial.params, user_attrs={"instead_of": trial.number})


def make(
    config: DictConfig, overrides: list[str], space: list[Dimension], study: optuna.Study, batch: list[Trial]
) -> None:
    """Make the runs of all trials of `batch`, and tell the study what came of them, in order."""
    variants = {trial.number: trials.variants_of(space, [trial.params], config.target) for trial in batch}
    wrong, wanted, followed = {}, {}, []
    for trial in batch:
        try:
            members = [variant.member(config, overrides) for variant in variants[trial.number]]
            for member in members:
                chain.check_processes(member.config, member.planned)
        except UserError as error:  # values may be right only beside others
            wrong[trial.number] = str(error)
            continue
        wanted |= variants[trial.number]
        followed.append(watched(trial, config.sweep, members))
    watch = Watch(config.run, config.sweep, study, followed)
    with watch if config.sweep.prune else contextlib.nullcontext():
        runs = {run["run"]: run for run in (trials.make(config, overrides, wanted) if wanted else [])}
    for trial in batch:
        trial_runs = [
            runs.get(f"{config.run}/{variant.name}") or trials.result(config, variant, values, wrong[trial.number])
            for variant, values in variants[trial.number].items()
        ]
        tell(study, trial, trial_runs, watch.pruned.get(trial.number))


def tell(study: optuna.Study, trial: Trial, runs: list[dict[str, Any]], pruned: str | None) -> None:
    """Tell the study the trial's mean over its runs, or that it was ended early or failed; says so in one line."""
    failed = [run for run in runs if run["state"] == "failed"]
    ended_early = pruned is not None and any(pruned in run["reason"] for run in failed)
    state = TrialState.COMPLETE if not failed else TrialState.PRUNED if ended_early else TrialState.FAIL
    if state == TrialState.PRUNED:
        runs = [run | {"state": "pruned", "reason": pruned} if run in failed else run for run in runs]
    trial.set_user_attr("runs", runs)
    value = sum(run["value"] for run in runs) / len(runs) if state == TrialState.COMPLETE else None
    study.tell(trial, value, state=state)
    message = f"{value:.4g}" if value is not None else pruned if state == TrialState.PRUNED else failed[0]["reason"]
    print(f"trial {len(ended(study))}: {setting(trial.params)}: {message}", flush=True)


def written(
    config: DictConfig, space: list[Dimension], study: optuna.Study, shares: dict[str, float]
) -> dict[str, Any]:
    """Write the sweep's files from the trials so far; returns what sweep.json holds."""
    runs = [
        {"trial": place} | run
        for place, trial in enumerate(ended(study), start=1)
        for run in trial.user_attrs.get("runs", [])
    ]
    return trials.write(config, space, runs, shares, "fANOVA")


def importance(study: optuna.Study) -> dict[str, float]:
    """Share of the metric's variance by key, largest first, by fANOVA (Hutter et al. 2014) over complete trials.

    Empty with one key, with fewer than four trials, or where all results are equal.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < 4 or len(trials[0].params) < 2 or len({trial.value for trial in trials}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
