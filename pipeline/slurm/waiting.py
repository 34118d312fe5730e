"""Waiting for what was sent to Slurm, and saying how it ends."""

import sys
import time
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig

from threefold.chain.member import Member
from threefold.errors import UserError
from threefold.slurm import client, job_records, submission
from threefold.slurm.stage_job import VISIBLE
from threefold.slurm.submission import Wanted


def run(config: DictConfig, overrides: list[str]) -> None:
    """Have Slurm make one run, and wait for it; raises `UserError` where a stage was not made."""
    if failed := make([Member(config, overrides)]):
        raise UserError(failed[config.run])


def make(members: Sequence[Member]) -> dict[str, str]:
    """Have Slurm make what `members` lack and wait for it; run → why it is not complete, for those that are not.

    An interrupt ends the waiting, and the command with status 130; the jobs go on.
    """
    wanted, config = submission.submit(members), members[0].config
    try:
        failed = wait(wanted, config.launcher.poll_seconds) if wanted else {}
    except KeyboardInterrupt:
        run = f"run={config.run.partition('/variants/')[0]}" + f" runs={config.runs}" * (config.runs != "runs")
        print(f"the jobs go on: `threefold status {run}`, and to end them `threefold cancel {run}`", file=sys.stderr)
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
