"""Which Slurm job makes which artifact, for which runs: runs/artifacts/<stage>-<fingerprint>.job, beside the artifact.

A record is written when the job is sent, and removed when the job has made the artifact. The record of a job that
ended otherwise stays until the stage is sent again, so that `threefold status` can say how it ended.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock

from threefold.artifacts.artifact import Artifact, belongs
from threefold.fileio import read_json, write_json
from threefold.slurm import client
from threefold.slurm.client import State


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
