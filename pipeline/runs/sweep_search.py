"""A search by Optuna, asked for trials and told their results; its journal lets a killed search continue.

The course of a search depends on the results and the seed alone: what is drawn next follows from the place in the
search, not from when the command was started. A trial that was killed or failed is made again with the same values.

Ending trials that do badly: the step logs of running stages are read, reported to Optuna, and stages asked to stop.

A stage is asked by a file beside its work folder (`Artifact.ask_to_stop`), so it may run on any machine that sees the
artifacts; one that another run makes, or wants as well, is left alone. It ends at the next step that it logs, and what
it has done so far is kept.
"""

import contextlib
import json
import os
import threading
import warnings
from dataclasses import dataclass, field
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
from threefold.artifacts.artifact import Artifact, fingerprint_of
from threefold.chain.plans import Member
from threefold.errors import UserError, nearest
from threefold.runs import trials
from threefold.runs.sweep_space import Dimension, direction, kl_metric, objective, target_fingerprint
from threefold.runs.sweep_table import setting
from threefold.slurm import job_records

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


PAUSE = 1.0  # seconds between two looks at the logs


@dataclass
class Watched:
    """A trial, and the artifacts of the stage whose log is read, one for each of its runs."""

    trial: Trial
    artifacts: list[Artifact]
    reported: set[int] = field(default_factory=set)  # steps


def watched(trial: Trial, config: DictConfig, members: list[Member]) -> Watched:
    """What is watched of a trial that has the runs `members`; nothing without `sweep.prune`."""
    if config.prune is None:
        return Watched(trial, [])
    stage = config.prune.partition(".")[0]
    return Watched(trial, [member.planned[stage].artifact for member in members])


class Watch:
    """Reads the logs of `trials` in a thread while a `with` block lasts; `pruned` has the reason by trial number."""

    def __init__(self, run: str, config: DictConfig, study: optuna.Study, trials: list[Watched]):
        self.run, self.trials, self.pruned, self.error = run, trials, {}, None
        self.key = (config.prune or "").partition(".")[2]
        # the study's pruner knows one direction, that of the metric which the search is for
        given = direction(config.prune or "", config.prune_direction)
        self.sign = 1 if given == study.direction.name.lower() else -1
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Report what was logged last; raises here what the thread met."""
        self.over.set()
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def _watch(self) -> None:
        try:
            while not self.over.wait(PAUSE):
                for trial in self.trials:
                    self._look(trial)
            for trial in self.trials:
                self._look_back(trial)
        except Exception as error:
            self.error = error

    def _look(self, watched: Watched) -> None:
        """Report new steps of a trial, and end it where the pruner says so."""
        for step, value in self._new(watched):
            if watched.trial.number in self.pruned:
                return
            self._report(watched, step, value)
            if watched.trial.should_prune():
                reason = f"pruned at step {step}, {self.key} {value:.4g}"
                self.pruned[watched.trial.number] = reason
                for artifact in watched.artifacts:
                    if not job_records.wanted_outside(artifact, self.run):
                        artifact.ask_to_stop(self.run, reason)

    def _look_back(self, watched: Watched) -> None:
        """Report what remains of a trial that has run to its end, so that later ones are compared with all of it."""
        if all(artifact.finished for artifact in watched.artifacts):
            for step, value in self._new(watched):
                self._report(watched, step, value)

    def _report(self, watched: Watched, step: int, value: float) -> None:
        watched.trial.report(self.sign * value, step)
        watched.reported.add(step)

    def _new(self, watched: Watched) -> list[tuple[int, float]]:
        """Steps that all runs of a trial have logged and that were not reported, with their mean."""
        logs = [steps(artifact, self.key) for artifact in watched.artifacts]
        common = set.intersection(*map(set, logs)) - watched.reported
        return [(step, sum(log[step] for log in logs) / len(logs)) for step in sorted(common)]


def steps(artifact: Artifact, key: str) -> dict[int, float]:
    """Metric `key` by step in the log of an artifact, finished or not; raises `UserError` where no step has it."""
    rows = [json.loads(line) for line in _whole_lines(artifact)]
    values = {int(row["step"]): row[key] for row in rows if key in row}
    if rows and artifact.finished and not values:
        logged = [name for row in rows for name in row if name != "step"]
        raise UserError(f"sweep.prune: {artifact.stage} logs no {key}{nearest(key, logged)}")
    return values


def _whole_lines(artifact: Artifact) -> list[str]:
    """Lines of the step log that are written to their end; the log moves when the artifact is finished."""
    for folder in (artifact.out, artifact.folder):
        with contextlib.suppress(FileNotFoundError):
            text = (folder / "log.jsonl").read_text()
            return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []
