"""Runs sent to Slurm, one job for every artifact that is not made, after those it needs; and waiting for them."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from threefold import chain
from threefold.artifacts.artifact import Artifact
from threefold.chain import Planned
from threefold.chain.plans import Member
from threefold.errors import UserError, public
from threefold.slurm import client, job_records
from threefold.slurm.job_records import VISIBLE, Record, StageJob
from threefold.stages import parents
from threefold.tracking import trackers


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

    @property
    def sent(self) -> Record:
        """The record of its job, once that is sent."""
        assert self.record is not None, f"{self.artifact.folder.name} is not sent"
        return self.record


def unmade(members: Sequence[Member]) -> dict[str, Wanted]:
    """Every artifact that `members` lack, once and parents first, by its folder's name."""
    artifacts: dict[str, Wanted] = {}
    for member in members:
        config, missing = member.config, {k: v for k, v in member.planned.items() if not v.artifact.finished}
        for stage, entry in missing.items():
            needs = [missing[parent].artifact.folder.name for parent in parents(stage, config) if parent in missing]
            wanted = Wanted(entry, config, member.overrides, needs)
            artifacts.setdefault(entry.artifact.folder.name, wanted).runs.append(config.run)
    return artifacts


def submit(members: Sequence[Member]) -> dict[str, Wanted]:
    """Send a job for every artifact that `members` lack and that has none; returns all of these, parents first.

    Raises `UserError` for what can be known to fail before a job starts; then nothing is sent.
    """
    with job_records.lock(Path(members[0].config.runs)):
        wanted = unmade(members)
        if wanted:
            client.require()
            check(members, wanted)
        for member in members:
            member.keep()
            member.link()
        if wanted:
            adopt(wanted)
            send_all([entry for entry in wanted.values() if entry.record is None], wanted)
    return wanted


def check(members: Sequence[Member], wanted: dict[str, Wanted]) -> None:
    """Read data and rewards, and hold resources to processes, before anything is sent; raises `UserError`."""
    for member in members:
        if literal := next((text for text in member.overrides if public(text) != text), None):
            key = literal.partition("=")[0]
            raise UserError(f"{key}: files of jobs would hold its password; give it as {key}=${{oc.env:NAME}}")
        trackers.require(member.config.tracker)
        chain.check_sources(member.config, member.planned)
        chain.check_rewards(member.config, member.planned)
    for entry in wanted.values():
        client.check(entry.config, entry.planned.stage)


def adopt(wanted: dict[str, Wanted]) -> None:
    """Take jobs that were sent before and have not ended, and have them link into these runs as well."""
    records = {name: record for name, entry in wanted.items() if (record := job_records.read(entry.artifact))}
    states = job_records.ask(records)
    for name, record in records.items():
        entry, outcome = wanted[name], job_records.outcome(wanted[name].artifact, record, states)
        if outcome and outcome[0] in client.LIVE:
            record.runs += [run for run in entry.runs if run not in record.runs]
            job_records.write(entry.artifact, record)
            entry.record, entry.sent_before = record, True


def send_all(new: list[Wanted], wanted: dict[str, Wanted]) -> None:
    """Send all jobs of `new`, or none where one is refused."""
    try:
        for entry in new:
            send(entry, wanted)
    except BaseException:
        sent = [entry for entry in new if entry.record]
        with contextlib.suppress(UserError):  # what stays queued keeps its record; the first error counts
            client.cancel([entry.sent.job for entry in sent])
            for entry in sent:
                job_records.file_of(entry.artifact).unlink(missing_ok=True)
        raise


def send(entry: Wanted, wanted: dict[str, Wanted]) -> None:
    """Send one job, after those of the artifacts that it needs, and keep its record."""
    planned, config, needs = entry.planned, entry.config, entry.needs
    after = {name: wanted[name].sent.job for name in needs}
    overrides, launcher = arguments(entry), config.launcher
    work = StageJob(planned.stage, planned.fingerprint, config.runs, overrides, planned.parts, needs, launcher.requeue)
    entry.artifact.forget_failure()
    options = client.parameters(config, planned.stage, job_records.name_of(entry.artifact.folder.name), after.values())
    job = client.send(work, job_records.logs(Path(config.runs)), launcher.max_timeouts, options)
    entry.record = Record(job, entry.runs, after)
    job_records.write(entry.artifact, entry.record)


def arguments(entry: Wanted) -> list[str]:
    """The overrides that a job is composed from: those of the run, for one stage, with as many threads as cores."""
    config, stage = entry.config, entry.planned.stage
    of_job = [f"target={stage}", "dependents=false", "seeds=null"]
    if config.runtime.threads is None:
        of_job.append(f"runtime.threads={client.resources(config, stage)['cpus']}")
    return [*entry.overrides, *of_job]


def rows(wanted: dict[str, Wanted]) -> list[tuple[str, ...]]:
    """Jobs for a table: stage, id, the jobs that each waits for, what it asks for, and the runs that want it."""
    table = []
    for entry in wanted.values():
        needs, record = client.resources(entry.config, entry.planned.stage), entry.sent
        after = ", ".join(f"{job} ({name.rpartition('-')[0]})" for name, job in record.after.items())
        asked = f"{needs['nodes']} × {needs['cpus']} CPUs, {needs['gpus']} GPUs, {needs['minutes']} min"
        job = f"{record.job} (sent before)" if entry.sent_before else record.job
        table.append((entry.planned.stage, job, after, asked, ", ".join(entry.runs)))
    return table


def run_in_slurm(config: DictConfig, overrides: list[str]) -> None:
    """Have Slurm make one run, and wait for it; raises `UserError` where a stage was not made."""
    if failed := make_jobs([Member(config, overrides)]):
        raise UserError(failed[config.run])


def make_jobs(members: Sequence[Member]) -> dict[str, str]:
    """Have Slurm make what `members` lack and wait for it; run → why it is not complete, for those that are not.

    An interrupt ends the waiting, and the command with status 130; the jobs go on.
    """
    wanted, config = submit(members), members[0].config
    try:
        failed = wait(wanted, config.launcher.poll_seconds) if wanted else {}
    except KeyboardInterrupt:
        run = f"run={config.run.partition('/variants/')[0]}" + f" runs={config.runs}" * (config.runs != "runs")
        print(
            f"the jobs go on: `threefold status {run}`, and to end them `threefold cancel {run}`",
            file=sys.stderr,
        )
        sys.exit(130)
    for member in members:
        member.link()
    failures: dict[str, str] = {}
    for name, reason in failed.items():
        for run in wanted[name].runs:
            failures.setdefault(run, f"{wanted[name].planned.stage} {reason}")
    return failures


def wait(wanted: dict[str, Wanted], seconds: float) -> dict[str, str]:
    """Wait for jobs and say on a line each how they end; artifact → why it was not made, the first to fail first."""
    started, failed, waiting = time.monotonic(), {}, dict(wanted)
    before = sum(entry.sent_before for entry in wanted.values())
    print(f"{len(wanted)} jobs in Slurm" + (f", {before} of them sent before" if before else ""), flush=True)
    for ended_now in looks(waiting, seconds):
        for name, (word, reason) in ended_now.items():
            runs, outcome = waiting.pop(name).runs, f"{word}: {reason}" if reason else word
            if word != "made":
                failed[name] = outcome
            whom = f"{len(runs)} runs" if len(runs) > 1 else runs[0]
            done = f"{len(wanted) - len(waiting)} of {len(wanted)}"
            print(f"{done}  {name} for {whom}: {outcome}  ({time.monotonic() - started:.0f} s)", flush=True)
    return failed


def looks(waiting: dict[str, Wanted], seconds: float) -> Iterator[dict[str, tuple[str, str]]]:
    """What has ended at every look, until nothing waits; a Slurm that does not answer is asked again."""
    unseen: dict[str, float] = {}
    answers = True
    while waiting:
        try:
            yield ended(waiting, unseen)
            answers = True
        except UserError as error:
            if answers:
                print(f"{error}; asks again", file=sys.stderr, flush=True)
            answers = False
        if waiting:
            time.sleep(seconds)


def ended(waiting: dict[str, Wanted], unseen: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Jobs that have ended: made, failed, cancelled or not started, and why.

    `unseen` holds when a job was first unknown to Slurm, or done without its artifact. Either may pass by itself, so
    the job has failed only if it lasts longer than `VISIBLE`.
    """
    states, outcomes = job_records.ask({name: entry.sent for name, entry in waiting.items()}), {}
    for name, entry in waiting.items():
        record, artifact = entry.sent, entry.artifact
        word, reason = job_records.outcome(artifact, record, states) or ("unknown to Slurm", record.job)
        if artifact.finished:
            outcomes[name] = "made", ""
        elif word in ("failed", "cancelled", "not started"):
            outcomes[name] = word, reason
        elif word in client.LIVE:
            unseen.pop(name, None)
        elif time.monotonic() - unseen.setdefault(name, time.monotonic()) > VISIBLE:
            outcomes[name] = "failed", f"job {record.job} is {word}, and {artifact.folder} is not there"
    return outcomes
