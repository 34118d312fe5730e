"""What of a run is with Slurm, for `threefold status`, and ending that, for `threefold cancel`."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from threefold.artifacts.artifact import Artifact
from threefold.errors import UserError
from threefold.slurm import client, job_records
from threefold.slurm.job_records import Record

Row = dict[str, str]


def tell(config: DictConfig, rows: list[Row]) -> list[Row]:
    """The rows of `chain.status` with what Slurm says of their jobs, and a row for every other job of the run."""
    listed = {f"{row['stage']}-{row['fingerprint']}": row for row in rows}
    shown = {
        name: (artifact, record)
        for name, (artifact, record) in job_records.all_of(Path(config.runs)).items()
        if name in listed or _wanted_by(record, config.run)
    }
    try:
        states = job_records.ask({name: record for name, (_, record) in shown.items()})
    except UserError as error:
        print(f"{error}; jobs are not shown", file=sys.stderr)
        return rows
    for name, (artifact, record) in shown.items():
        word, reason = job_records.outcome(artifact, record, states) or ("done", "")
        if word == "done":
            continue
        if name not in listed:
            rows.append(_row(artifact) | {"state": word, "reason": f"{reason}, for {', '.join(record.runs)}"})
        elif listed[name]["state"] not in ("fresh", "running"):
            listed[name] |= {"state": word, "reason": reason}
    return rows


def cancel(config: DictConfig) -> list[Row]:
    """End the jobs of a run and of its variants; a row for each, saying what became of it."""
    runs = Path(config.runs)
    if not runs.is_dir():
        return []
    with job_records.lock(runs):
        records = {
            name: (artifact, record)
            for name, (artifact, record) in job_records.all_of(runs).items()
            if _wanted_by(record, config.run)
        }
        states = job_records.ask({name: record for name, (_, record) in records.items()})
        rows = [
            _row(artifact) | {"job": record.job, "state": _leave(artifact, record, config.run)}
            for artifact, record in records.values()
            if record.job in states and states[record.job].live
        ]
        client.cancel([row["job"] for row in rows if row["state"] == "cancelled"])
    return rows


def _leave(artifact: Artifact, record: Record, run: str) -> str:
    """Take `run` and its variants out of a record, unless no other run wants its job."""
    others = [other for other in record.runs if not job_records.belongs(other, run)]
    if not others:
        return "cancelled"
    record.runs = others
    job_records.write(artifact, record)
    return f"goes on for {', '.join(others)}"


def _wanted_by(record: Record, run: str) -> bool:
    return any(job_records.belongs(other, run) for other in record.runs)


def _row(artifact: Artifact) -> Row:
    return {"stage": artifact.stage, "fingerprint": artifact.fingerprint, "made": "", "metric": ""}
