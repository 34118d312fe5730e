"""What a Slurm job does: it makes the artifact of one stage, and goes on from the last checkpoint when queued again.

submitit (pipeline/slurm/client.py) keeps a `StageJob` in a file and calls it in the job, in the folder that the job was
sent from. When Slurm signals that the job will end, submitit calls `checkpoint`, queues the job again and ends the
process wherever it is; the next call goes on from the stage's last checkpoint.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.artifacts.artifact import Artifact
from threefold.errors import UserError, first_line
from threefold.execution.surroundings import leave_launchers
from threefold.slurm import job_records
from threefold.stages import STAGES, needed_by

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
        with job_records.lock(runs):
            record = job_records.read(artifact)
            for run in record.runs if record else ():
                artifact.link_into(runs / run)
            job_records.file_of(artifact).unlink(missing_ok=True)


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
