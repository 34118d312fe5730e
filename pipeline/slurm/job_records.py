"""Which Slurm job makes which artifact, for which runs: runs/artifacts/<stage>-<fingerprint>.job, beside the artifact.

A record is written when the job is sent, and removed when the job has made the artifact. The record of a job that
ended otherwise stays until the stage is sent again, so that `threefold status` can say how it ended.

What a Slurm job does: it makes the artifact of one stage, and goes on from the last checkpoint when queued again.

submitit (pipeline/slurm/client.py) keeps a `StageJob` in a file and calls it in the job, in the folder that the job was
sent from. When Slurm signals that the job will end, submitit calls `checkpoint`, queues the job again and ends the
process wherever it is; the next call goes on from the stage's last checkpoint.

What of a run is with Slurm, for `threefold status`, and ending that, for `threefold cancel`.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from threefold.artifacts.artifact import Artifact, belongs
from threefold.errors import UserError, first_line
from threefold.execution.launch import leave_launchers
from threefold.fileio import read_json, write_json
from threefold.slurm import client
from threefold.slurm.client import State
from threefold.stages import STAGES, needed_by


@dataclass
class Record:
    """The job that makes an artifact."""

    job: str
    runs: list[str]  # the runs that want it
    after: dict[str, str]  # artifact → the job that it waits for


States = dict[str, State]


def file_of(artifact: Artifact) -> Path:
    """Where the record of an artifact is."""
    return artifact.folder.with_name(f"{artifact.folder.name}.job")


def read(artifact: Artifact) -> Record | None:
    """The record of an artifact, if there is one."""
    file = file_of(artifact)
    if not file.is_file():
        return None
    content = read_json(file)
    return Record(**{column.name: content[column.name] for column in fields(Record)})


def write(artifact: Artifact, record: Record) -> None:
    """Keep `record` beside its artifact."""
    write_json(file_of(artifact), asdict(record))


def lock(runs: Path) -> FileLock:
    """Held while records are read and written; they do not change then."""
    (runs / "artifacts").mkdir(parents=True, exist_ok=True)
    return FileLock(runs / "artifacts" / "jobs.lock")


def all_of(runs: Path) -> dict[str, tuple[Artifact, Record]]:
    """Every record in a folder of runs, by the name of its artifact."""
    records = {}
    for file in sorted((runs / "artifacts").glob("*.job")):
        stage, _, fingerprint = file.stem.rpartition("-")
        artifact = Artifact(runs, stage, fingerprint)
        if record := read(artifact):
            records[file.stem] = artifact, record
    return records


def wanted_outside(artifact: Artifact, run: str) -> bool:
    """Whether a job makes the artifact for runs other than `run` and its variants as well."""
    record = read(artifact)
    return record is not None and not all(belongs(wanted_by, run) for wanted_by in record.runs)


def name_of(artifact: str) -> str:
    """The name of the job that makes an artifact."""
    return f"threefold-{artifact}"


def ask(records: dict[str, Record]) -> States:
    """What Slurm says of the jobs of `records` (artifact → record), and of those that they wait for."""
    jobs = {job: name_of(parent) for record in records.values() for parent, job in record.after.items()}
    return client.states(jobs | {record.job: name_of(name) for name, record in records.items()})


def logs(runs: Path) -> Path:
    """The folder of the jobs' scripts and logs."""
    return runs / "artifacts" / "slurm"


def outcome(artifact: Artifact, record: Record, states: States) -> tuple[str, str] | None:
    """What became of the job: queued, running, done, failed, cancelled or not started, and why; None: Slurm forgot."""
    state, job = states.get(record.job), f"job {record.job}"
    if state is None:
        return None
    others = {name.rpartition("-")[0]: states[job] for name, job in record.after.items() if job in states}
    broken = [stage for stage, other in others.items() if other.word in ("failed", "cancelled")]
    if broken and state.word in ("queued", "cancelled"):
        return "not started", f"needs {', '.join(broken)}, which was not made"
    if state.word == "queued":
        waits = [stage for stage, other in others.items() if other.live]
        return "queued", f"{job}, waits for {', '.join(waits)}" if waits else f"{job} ({state.reason})"
    if state.word == "failed":
        place = client.log(logs(artifact.folder.parent.parent), record.job)
        return "failed", f"{artifact.failure or state.slurm} ({job}, see {place})"
    return state.word, f"{job} on {state.nodes}" if state.word == "running" else job


Row = dict[str, str]


def with_jobs(config: DictConfig, rows: list[Row]) -> list[Row]:
    """The rows of `chain.status` with what Slurm says of their jobs, and a row for every other job of the run."""
    listed = {f"{row['stage']}-{row['fingerprint']}": row for row in rows}
    shown = {
        name: (artifact, record)
        for name, (artifact, record) in all_of(Path(config.runs)).items()
        if name in listed or _wanted_by(record, config.run)
    }
    try:
        states = ask({name: record for name, (_, record) in shown.items()})
    except UserError as error:
        print(f"{error}; jobs are not shown", file=sys.stderr)
        return rows
    for name, (artifact, record) in shown.items():
        word, reason = outcome(artifact, record, states) or ("done", "")
        if word == "done":
            continue
        if name not in listed:
            rows.append(_row(artifact) | {"state": word, "reason": f"{reason}, for {', '.join(record.runs)}"})
        elif listed[name]["state"] not in ("fresh", "running"):
            listed[name] |= {"state": word, "reason": reason}
    return rows


def cancel_jobs(config: DictConfig) -> list[Row]:
    """End the jobs of a run and of its variants; a row for each, saying what became of it."""
    runs = Path(config.runs)
    if not runs.is_dir():
        return []
    with lock(runs):
        records = {
            name: (artifact, record)
            for name, (artifact, record) in all_of(runs).items()
            if _wanted_by(record, config.run)
        }
        states = ask({name: record for name, (_, record) in records.items()})
        rows = [
            _row(artifact) | {"job": record.job, "state": _leave(artifact, record, config.run)}
            for artifact, record in records.values()
            if record.job in states and states[record.job].live
        ]
        client.cancel([row["job"] for row in rows if row["state"] == "cancelled"])
    return rows


def let_go(config: DictConfig) -> None:
    """Have jobs that were sent for a run link what they make into it no more: another takes over its name."""
    runs = Path(config.runs)
    with lock(runs):
        for artifact, record in all_of(runs).values():
            if _wanted_by(record, config.run):
                record.runs = [run for run in record.runs if not belongs(run, config.run)]
                write(artifact, record)


def _leave(artifact: Artifact, record: Record, run: str) -> str:
    """Take `run` and its variants out of a record, unless no other run wants its job."""
    others = [other for other in record.runs if not belongs(other, run)]
    if not others:
        return "cancelled"
    record.runs = others
    write(artifact, record)
    return f"goes on for {', '.join(others)}"


def _wanted_by(record: Record, run: str) -> bool:
    return any(belongs(other, run) for other in record.runs)


def _row(artifact: Artifact) -> Row:
    return {"stage": artifact.stage, "fingerprint": artifact.fingerprint, "made": "", "metric": ""}


VISIBLE = 60  # seconds after which what one node wrote is seen on all


@dataclass
class StageJob:
    """Makes the artifact of `stage`; `parts` is what its fingerprint covered when the job was sent."""

    stage: str
    fingerprint: str
    runs: str
    overrides: list[str]
    parts: dict[str, Any]
    parents: list[str]  # the artifacts that other jobs make before this one starts
    requeue: bool

    def __call__(self) -> None:
        """Make the artifact, link it into the runs that want it, and drop the record of this job."""
        from submitit.core.utils import UncompletedJobError

        artifact, first = Artifact(Path(self.runs), self.stage, self.fingerprint), os.environ["SLURM_PROCID"] == "0"
        try:
            self._make(artifact)
        except Exception as error:
            timeouts = "came to its time limit too often; raise resources.minutes or launcher.max_timeouts"
            if first:
                artifact.note_failure(timeouts if isinstance(error, UncompletedJobError) else first_line(error))
            raise
        if first:
            self._sign_off(artifact)

    def checkpoint(self) -> Any:
        """What goes on when the job has been queued again: the same, from the stage's last checkpoint."""
        from submitit.helpers import DelayedSubmission

        if not self.requeue:
            raise UserError("ended by Slurm before it was done (launcher.requeue=false); the same command continues it")
        return DelayedSubmission(self)

    def _make(self, artifact: Artifact) -> None:
        from threefold import chain
        from threefold.config.compose import compose
        from threefold.execution import launch, nodes

        sys.path.insert(0, "")  # reward functions by import path may lie beside the user
        leave_launchers()
        config = compose([*self.overrides, *place(self.stage)])
        if config.launch.node_rank > 0:
            return nodes.help_out(config.launch, artifact.folder.parent, launch.take_part)
        self._wait_for_parents(artifact.folder.parent)
        entry = chain.plan(config, needed_by(self.stage, config))[self.stage]
        if entry.fingerprint != self.fingerprint:
            changed = chain.stale_reason({"parts": self.parts}, entry)
            raise UserError(f"something has changed since the job was sent: {changed}; send it again")
        chain.bring_up_to_date(config)

    def _wait_for_parents(self, folder: Path) -> None:
        """Wait until this node sees what other jobs have made; it must not be made here again."""
        deadline = time.monotonic() + VISIBLE
        for name in self.parents:
            while not (folder / name / "manifest.json").is_file():
                if time.monotonic() > deadline:
                    raise UserError(f"sees no {(folder / name).absolute()}; use a folder that all nodes share for runs")
                time.sleep(1)

    def _sign_off(self, artifact: Artifact) -> None:
        runs = Path(self.runs)
        with lock(runs):
            record = read(artifact)
            for run in record.runs if record else ():
                artifact.link_into(runs / run)
            file_of(artifact).unlink(missing_ok=True)


def place(stage: str) -> list[str]:
    """Overrides for the machines of this job: how many, which one this is, and where they meet.

    A job has two ports, one for machines and the next for the processes of a stage (conf/launch); two jobs have the
    same ones only if 10,000 others lie between them.
    """
    if not STAGES[stage].several_processes:
        return ["launch.mode=single", "launch.processes=1", "launch.nodes=1", "launch.node_rank=0"]
    port = 20000 + 2 * (int(os.environ["SLURM_JOB_ID"]) % 10000)
    number = f"launch.nodes={os.environ['SLURM_JOB_NUM_NODES']}", f"launch.node_rank={os.environ['SLURM_NODEID']}"
    return [*number, "launch.main_address=null", f"launch.main_port={port}"]
