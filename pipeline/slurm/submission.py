"""Runs sent to Slurm: one job for every artifact that is not made, whichever runs want it, after those it needs."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from threefold import chain
from threefold.artifacts.artifact import Artifact
from threefold.chain import Planned
from threefold.chain.member import Member
from threefold.errors import UserError, public
from threefold.slurm import client, job_records
from threefold.slurm.job_records import Record
from threefold.slurm.stage_job import StageJob
from threefold.stages import parents
from threefold.tracking import backends


@dataclass
class Wanted:
    """An artifact that is not made, as the first run that wants it would make it."""

    planned: Planned
    config: DictConfig
    overrides: list[str]
    needs: list[str]  # artifacts that are not made either
    runs: list[str] = field(default_factory=list)  # all that want it
    record: Record | None = None  # its job
    sent_before: bool = False

    @property
    def artifact(self) -> Artifact:
        """Where it will be."""
        return self.planned.artifact


def unmade(members: Sequence[Member]) -> dict[str, Wanted]:
    """Every artifact that `members` lack, once and parents first, by its folder's name."""
    found: dict[str, Wanted] = {}
    for member in members:
        config, missing = member.config, {k: v for k, v in member.planned.items() if not v.artifact.finished}
        for stage, entry in missing.items():
            needs = [missing[parent].artifact.folder.name for parent in parents(stage, config) if parent in missing]
            wanted = Wanted(entry, config, member.overrides, needs)
            found.setdefault(entry.artifact.folder.name, wanted).runs.append(config.run)
    return found


def submit(members: Sequence[Member]) -> dict[str, Wanted]:
    """Send a job for every artifact that `members` lack and that has none; returns all of these, parents first.

    Raises `UserError` for what can be known to fail before a job starts; then nothing is sent.
    """
    with job_records.lock(Path(members[0].config.runs)):
        wanted = unmade(members)
        for member in members:
            member.link()
        if wanted:
            client.require()
            check(members, wanted)
            adopt(wanted)
            send_all([each for each in wanted.values() if each.record is None], wanted)
    return wanted


def check(members: Sequence[Member], wanted: dict[str, Wanted]) -> None:
    """Read data and rewards, and hold resources to processes, before anything is sent; raises `UserError`."""
    for member in members:
        if literal := next((text for text in member.overrides if public(text) != text), None):
            key = literal.partition("=")[0]
            raise UserError(f"{key}: files of jobs would hold its password; give it as {key}=${{oc.env:NAME}}")
        backends.require(member.config.tracker)
        chain.check_sources(member.config, member.planned)
        chain.check_rewards(member.config, member.planned)
    for each in wanted.values():
        client.check(each.config, each.planned.stage)


def adopt(wanted: dict[str, Wanted]) -> None:
    """Take jobs that were sent before and have not ended, and have them link into these runs as well."""
    records = {name: record for name, each in wanted.items() if (record := job_records.read(each.artifact))}
    states = job_records.ask(records)
    for name, record in records.items():
        each, found = wanted[name], job_records.outcome(wanted[name].artifact, record, states)
        if found and found[0] in client.LIVE:
            record.runs += [run for run in each.runs if run not in record.runs]
            job_records.write(each.artifact, record)
            each.record, each.sent_before = record, True


def send_all(new: list[Wanted], wanted: dict[str, Wanted]) -> None:
    """Send all jobs of `new`, or none where one is refused."""
    try:
        for each in new:
            send(each, wanted)
    except BaseException:
        sent = [each for each in new if each.record]
        with contextlib.suppress(UserError):  # what stays queued keeps its record; the first error counts
            client.cancel([each.record.job for each in sent])
            for each in sent:
                job_records.file_of(each.artifact).unlink(missing_ok=True)
        raise


def send(each: Wanted, wanted: dict[str, Wanted]) -> None:
    """Send one job, after those of the artifacts that it needs, and keep its record."""
    entry, config, folder = each.planned, each.config, job_records.logs(Path(each.config.runs))
    after = {name: wanted[name].record.job for name in each.needs}
    name = job_records.name_of(each.artifact.folder.name)
    work = StageJob(
        entry.stage, entry.fingerprint, config.runs, arguments(each), entry.parts, each.needs, config.launcher.requeue
    )
    each.artifact.forget_failure()
    options = client.parameters(config, entry.stage, name, after.values())
    job = client.send(work, folder, config.launcher.max_timeouts, options)
    each.record = Record(job, each.runs, after)
    job_records.write(each.artifact, each.record)


def arguments(each: Wanted) -> list[str]:
    """The overrides that a job is composed from: those of the run, for one stage, with as many threads as cores."""
    own = [f"target={each.planned.stage}", "dependents=false", "seeds=null"]
    if each.config.runtime.threads is None:
        own.append(f"runtime.threads={client.resources(each.config, each.planned.stage)['cpus']}")
    return [*each.overrides, *own]


def rows(wanted: dict[str, Wanted]) -> list[tuple[str, ...]]:
    """Jobs for a table: stage, id, the jobs that each waits for, what it asks for, and the runs that want it."""
    found = []
    for each in wanted.values():
        needs, record = client.resources(each.config, each.planned.stage), each.record
        after = ", ".join(f"{job} ({name.rpartition('-')[0]})" for name, job in record.after.items())
        asked = f"{needs['nodes']} × {needs['cpus']} CPUs, {needs['gpus']} GPUs, {needs['minutes']} min"
        job = f"{record.job} (sent before)" if each.sent_before else record.job
        found.append((each.planned.stage, job, after, asked, ", ".join(each.runs)))
    return found
