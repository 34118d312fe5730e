"""Slurm as a run uses it: what the job of a stage asks for, sending it, asking what became of it, and ending it."""

import contextlib
import importlib.util
import io
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from threefold.config.checks import check_shares
from threefold.errors import UserError
from threefold.schema.config import SHARDED
from threefold.stages import STAGES

# Slurm's words for a job (squeue(1), JOB STATE CODES) in ours; any other says that it has failed
WORDS = {
    "queued": ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
    "running": ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING"),
    "done": ("COMPLETED",),
    "cancelled": ("CANCELLED",),
}
FIELDS = {"squeue": "%i|%T|%r|%N|%j", "sacct": "JobIDRaw,State,Reason,NodeList,JobName"}
LIVE = ("queued", "running")


@dataclass(frozen=True)
class State:
    """What Slurm says of a job: in our words and in its own."""

    word: str  # queued, running, done, cancelled or failed
    slurm: str  # for example OUT_OF_MEMORY
    reason: str  # why it is not running
    nodes: str

    @property
    def live(self) -> bool:
        """Whether the job is still to end."""
        return self.word in LIVE


def require() -> None:
    """Raise `UserError` where jobs cannot be sent from this machine."""
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("Slurm: sbatch is not on this machine; give the command on one that sends jobs to the cluster")
    if importlib.util.find_spec("submitit") is None:
        raise UserError('Slurm: submitit is missing; pip install -e ".[slurm]"')


def resources(config: DictConfig, stage: str) -> dict[str, Any]:
    """What the job of `stage` asks for: nodes, gpus and cpus on each, memory_gb, minutes."""
    of_stage, common = config.resources.stages[stage], config.resources
    needs = {key: common[key] if of_stage[key] is None else of_stage[key] for key in of_stage}
    if not STAGES[stage].several_processes:
        needs |= {"nodes": 1, "gpus": min(1, needs["gpus"])}
    return needs


def check(config: DictConfig, stage: str) -> None:
    """Hold what `stage` asks of Slurm to the processes that it is made by; raises `UserError`."""
    needs, launch = resources(config, stage), config.launch
    if not STAGES[stage].several_processes:
        return
    if needs["nodes"] > 1 and launch.mode == "single":
        raise UserError(
            f"resources.nodes={needs['nodes']} for {stage}: launch.mode=single is one process; use launch=ddp"
        )
    if launch.nodes not in (1, needs["nodes"]):
        raise UserError(f"launch.nodes={launch.nodes}: resources.nodes={needs['nodes']} for {stage}; set both alike")
    if needs["gpus"] and needs["gpus"] != launch.processes:
        raise UserError(
            f"resources.gpus={needs['gpus']} for {stage}: launch.processes={launch.processes} use as many GPUs of a "
            f"node; set both alike, for example launch=ddp launch.processes={needs['gpus']}"
        )
    if launch.mode in SHARDED and not needs["gpus"]:
        raise UserError(f"resources.gpus=0 for {stage}: launch.mode={launch.mode} needs GPUs; use launch=ddp")
    in_job = OmegaConf.masked_copy(config, list(config))
    OmegaConf.update(in_job, "launch.nodes", needs["nodes"])
    check_shares(in_job, [stage])


def parameters(config: DictConfig, stage: str, name: str, after: Iterable[str]) -> dict[str, Any]:
    """submitit's parameters for a job called `name` that makes `stage` once the jobs `after` have ended well."""
    needs, cluster, launcher = resources(config, stage), config.cluster, config.launcher
    more = cast(dict[str, Any], OmegaConf.to_container(cluster.parameters, resolve=True))
    more |= {"requeue": True} if launcher.requeue else {"no-requeue": True}
    options = {
        "job_name": name, "time": needs["minutes"], "nodes": needs["nodes"], "ntasks_per_node": 1,
        "cpus_per_task": needs["cpus"], "gpus_per_node": needs["gpus"] or None,
        "mem": f"{int(needs['memory_gb'] * 1024)}M" if needs["memory_gb"] else None,
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "setup": list(cluster.setup), "signal_delay_s": launcher.signal_seconds,
        "stderr_to_stdout": True,
        # srun takes over neither the cores of the job (since Slurm 22.05) nor the end of a task that failed; without
        # an MPI plugin no library takes the job for one of MPI
        "srun_args": [f"--cpus-per-task={needs['cpus']}", "--kill-on-bad-exit=1", "--mpi=none"],
    }  # fmt: skip
    if after := list(after):
        options["dependency"] = f"afterok:{':'.join(after)}"
        more["kill-on-invalid-dep"] = "yes"
    return {key: value for key, value in options.items() if value is not None} | {"additional_parameters": more}


def send(work: Callable[[], None], folder: Path, timeouts: int, options: dict[str, Any]) -> str:
    """Send `work` as a job whose script and log go into `folder`; returns its id. Raises `UserError` if refused."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    folder.mkdir(parents=True, exist_ok=True)
    executor = SlurmExecutor(folder, max_num_timeout=timeouts)
    executor.update_parameters(**options)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what the exception says as well
            return executor.submit(work).job_id
    except FailedJobError as error:
        reason = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise UserError(f"{options['job_name']}: Slurm refuses it: {reason}") from error


def log(folder: Path, job: str) -> Path:
    """The file that the first task of a job writes into."""
    return folder / f"{job}_0_log.out"


def states(jobs: dict[str, str]) -> dict[str, State]:
    """What Slurm says of the jobs id → name, by one call of squeue, and one of sacct for those that it has forgotten.

    Jobs that neither knows are left out, and so are ids that now belong to a job of another name. Raises `UserError`
    where Slurm does not answer.
    """
    if not jobs:
        return {}
    answers = _asked("squeue", ["--states=all", f"--format={FIELDS['squeue']}", f"--jobs={','.join(jobs)}"], jobs)
    if forgotten := [job for job in jobs if job not in answers]:
        options = ["-X", "--parsable2", f"--format={FIELDS['sacct']}", f"--jobs={','.join(forgotten)}"]
        answers |= _asked("sacct", options, jobs)
    return answers


def cancel(jobs: list[str]) -> None:
    """End jobs, or take them out of the queue. Raises `UserError` where Slurm does not end all of them."""
    if jobs:
        ended = subprocess.run(["scancel", *jobs], stderr=subprocess.PIPE, text=True)
        if ended.returncode != 0:
            raise UserError(f"Slurm: scancel says {' '.join(ended.stderr.split())}")


def _asked(command: str, options: list[str], jobs: dict[str, str]) -> dict[str, State]:
    try:
        answer = subprocess.run([command, "--noheader", *options], capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise UserError(f"Slurm: {command} is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"Slurm: {command} does not answer") from error
    # it fails as well where it knows none of the jobs, and where the cluster keeps no accounts
    no_answer = "Invalid job id" in answer.stderr or "accounting storage is disabled" in answer.stderr
    if answer.returncode != 0 and not no_answer:
        raise UserError(f"Slurm: {command} says {' '.join(answer.stderr.split())}")
    rows = [line.split("|") for line in answer.stdout.splitlines()]
    return {job: state(slurm, reason, nodes) for job, slurm, reason, nodes, name in rows if jobs.get(job) == name}


def state(slurm: str, reason: str = "None", nodes: str = "") -> State:
    """The state for Slurm's word, which may carry more, as in "CANCELLED by 0"."""
    first = slurm.split()[0].rstrip("+")
    word = next((word for word, names in WORDS.items() if first in names), "failed")
    return State(word, first, "" if reason == "None" else reason, nodes)
