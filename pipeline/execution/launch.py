"""Several processes for one stage: `accelerate launch` starts pipeline/execution/worker.py in each, on every machine.

In the work folder of the artifact:
job.json        what the processes are to do
result.json     what the main process says of the execution, for the manifest
error.json      the first error of any process
launch-0.txt    what the launcher of machine 0 wrote, and processes other than the main one; of others launch-1.txt, ...

Variables by which launchers tell a process that it is one of several; Threefold starts its processes itself.

Libraries read them as well and would wait for processes that do not exist, so they are taken out of the environment
where they say nothing, and refused where they say that this command was started several times.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from omegaconf import DictConfig

from threefold.errors import UserError, public, public_traceback
from threefold.execution.nodes import Nodes, address
from threefold.fileio import read_json, write_json
from threefold.schema.config import SHARDED

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # before a stage in this process narrows it to one GPU (device.set_up)
PATIENCE = 20  # seconds in which the launcher ends by itself once its processes have
WORKER = "threefold.execution.worker"


@dataclass(frozen=True)
class Task:
    """What the processes of one stage are told; folders as they are seen from the driver's working directory."""

    stage: str
    config: dict[str, Any]  # all that the stage may see
    inputs: dict[str, str]  # artifact folder of each parent
    out: str
    checkpoints: str
    fingerprint: str
    processes: int  # on all machines together
    mode: str = "ddp"  # launch.mode
    nodes: int = 1
    address: str = "127.0.0.1"  # of machine 0
    port: int = 0  # where the processes meet there; 0 is any that is free


def place(launch: DictConfig) -> dict[str, Any]:
    """What the section `launch` of a configuration adds to a task."""
    counts = {"processes": launch.processes * launch.nodes, "mode": launch.mode, "nodes": launch.nodes}
    several = {"address": address(launch), "port": launch.main_port + 1} if launch.nodes > 1 else {}
    return counts | several


def check(config: DictConfig) -> None:
    """Raise `UserError` where this machine has not what `launch` asks for: DeepSpeed, or GPUs."""
    launch = config.launch
    if launch.processes * launch.nodes == 1:
        return
    if launch.mode == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UserError('launch.mode=deepspeed_zero3: DeepSpeed is missing; pip install -e ".[deepspeed]"')
    from threefold.execution import device

    kind = device.choose(config.runtime, launch.processes)
    if launch.mode in SHARDED and kind == "cpu":
        raise UserError(f"launch.mode={launch.mode}: needs GPUs, and there is none to be used here; use launch=ddp")


def run(task: Task, work: Path, others: Nodes | None = None) -> dict[str, Any]:
    """Run `task` in its processes, on machine 0 and `others`; returns what the manifest says of the execution.

    Raises the `UserError` of the process that failed first, and `RuntimeError` with its traceback for other errors. The
    processes end with this one, however it ends.
    """
    for name in ("result.json", "error.json"):
        (work / name).unlink(missing_ok=True)
    write_json(work / "job.json", asdict(task))
    if others:
        others.start(work / "job.json")
    status = take_part(work / "job.json", 0, others.trouble if others else lambda: None)
    trouble = (others.finished() if status == 0 else others.trouble()) if others else None
    if (work / "error.json").exists():
        error = read_json(work / "error.json")
        raise UserError(error["message"]) if error["user"] else RuntimeError("{message}\n{traceback}".format(**error))
    if trouble:
        raise UserError(f"{task.stage}: {trouble}")
    if status != 0 or not (work / "result.json").exists():
        raise UserError(f"{task.stage}: one of its processes was ended from outside, see {work / log_name(0)}")
    return read_json(work / "result.json")


def read(file: Path) -> Task:
    """The task in a job file."""
    return Task(**read_json(file))


def report(error: Exception, work: Path) -> None:
    """Leave `error` for the driver, unless another process failed before; called where `error` is handled."""
    message = public(str(error)) or type(error).__name__
    described = {"message": message, "user": isinstance(error, UserError), "traceback": public_traceback(error)}
    with contextlib.suppress(FileExistsError), (work / "error.json").open("x") as stream:
        json.dump(described, stream)


def take_part(file: Path, rank: int, trouble: Callable[[], str | None]) -> int:
    """Run the processes of machine `rank` for a job file; the launcher's status, or -1 where `trouble` ended them."""
    return _wait(_command(read(file), rank, file), file.with_name(log_name(rank)), trouble)


def log_name(rank: int) -> str:
    """The file that what the launcher of machine `rank` wrote is in."""
    return f"launch-{rank}.txt"


def _command(task: Task, rank: int, file: Path) -> list[str]:
    # everything that accelerate would otherwise take from a configuration file of the user's or guess; port 0 is any
    # free one; --multi_gpu starts processes on CPUs as well, where --cpu would silently start one; what a process holds
    # of the model is said to the trainer (training.arguments)
    options = {"num_processes": task.processes, "num_machines": task.nodes, "machine_rank": rank, "gpu_ids": "all"}
    options |= {"main_process_ip": task.address, "main_process_port": task.port, "rdzv_backend": "static"}
    options |= {"mixed_precision": "no", "dynamo_backend": "no"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--same_network", *given]
    return [*launcher, "-m", WORKER, str(file)]


def _wait(command: list[str], log: Path, trouble: Callable[[], str | None]) -> int:
    """The launcher's exit status. Its processes read our end of its standard input, and end when that is closed."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"CUDA_VISIBLE_DEVICES": GPUS} if GPUS is not None else {}
    sys.stdout.flush()
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stream, env=environment)
        try:
            while trouble() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return launcher.wait(1)
            return -1
        finally:
            cast(BinaryIO, launcher.stdin).close()
            try:
                launcher.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()


SIZES = (
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS",
)  # fmt: skip
RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
)  # fmt: skip
OF_ACCELERATE = ("ACCELERATE_", "FORK_LAUNCHED")  # what its launcher and notebooks say; our workers are told by ours
OF_SRUN = ("PMI_SIZE", "PMI_RANK")  # which a step of Slurm sets for each of its tasks, one for each machine of ours


def leave_launchers() -> None:
    """Drop the variables of launchers. Raises `UserError` where one says that there are several processes."""
    in_slurm = "SLURM_STEP_ID" in os.environ
    for name in SIZES:
        value = os.environ.get(name, "").strip()
        if value in ("", "0", "1") or (in_slurm and name in OF_SRUN):
            continue
        raise UserError(
            f"{name}={value}: says that a launcher started this command, and Threefold starts its processes itself; "
            f"give the command alone, with launch=ddp launch.processes=N for several, or unset {name}"
        )
    for name in list(os.environ):
        if name in SIZES + RANKS or name.startswith(OF_ACCELERATE):
            del os.environ[name]
