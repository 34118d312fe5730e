"""Several processes for one stage: `accelerate launch` starts pipeline/worker.py in each, on this machine.

In the work folder of the artifact:
job.json      what the processes are to do
result.json   what the main process says of the execution, for the manifest
error.json    the first error of any process
launch.txt    what the launcher wrote, and processes other than the main one
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import read_json, write_json
from pipeline.errors import UserError

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # before a stage in this process narrows it to one GPU (device.set_up)
PATIENCE = 20  # seconds in which the launcher ends by itself once its processes have


@dataclass(frozen=True)
class Task:
    """What the processes of one stage are told; folders as they are seen from the driver's working directory."""

    stage: str
    config: dict[str, Any]  # all that the stage may see
    inputs: dict[str, str]  # artifact folder of each parent
    out: str
    checkpoints: str
    fingerprint: str
    processes: int


def run(task: Task, work: Path) -> dict[str, Any]:
    """Run `task` in its processes and wait; returns what the manifest says of the execution.

    Raises the `UserError` of the process that failed first, and `RuntimeError` with its traceback for other errors. The
    processes end with this one, however it ends.
    """
    for name in ("result.json", "error.json"):
        (work / name).unlink(missing_ok=True)
    write_json(work / "job.json", asdict(task))
    status = _wait(_command(task.processes, work / "job.json"), work / "launch.txt")
    if (work / "error.json").exists():
        error = read_json(work / "error.json")
        raise UserError(error["message"]) if error["user"] else RuntimeError("{message}\n{traceback}".format(**error))
    if status != 0 or not (work / "result.json").exists():
        raise UserError(f"{task.stage}: one of its processes was ended from outside, see {work / 'launch.txt'}")
    return read_json(work / "result.json")


def read(file: Path) -> Task:
    """The task in a job file."""
    return Task(**read_json(file))


def report(error: Exception, work: Path) -> None:
    """Leave `error` for the driver, unless another process failed before; called where `error` is handled."""
    message = str(error) or type(error).__name__
    said = {"message": message, "user": isinstance(error, UserError), "traceback": traceback.format_exc()}
    with contextlib.suppress(FileExistsError), (work / "error.json").open("x") as stream:
        json.dump(said, stream)


def _command(processes: int, file: Path) -> list[str]:
    # everything that accelerate would otherwise take from a configuration file of the user's or guess; port 0 is any
    # free one; --multi_gpu starts processes on CPUs as well, where --cpu would silently start one
    options = {"num_processes": processes, "num_machines": 1, "main_process_port": 0, "gpu_ids": "all"}
    options |= {"mixed_precision": "no", "dynamo_backend": "no"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *given]
    return [*launcher, "-m", "pipeline.worker", str(file)]


def _wait(command: list[str], log: Path) -> int:
    """The launcher's exit status. Its processes read our end of its standard input, and end when that is closed."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"CUDA_VISIBLE_DEVICES": GPUS} if GPUS is not None else {}
    sys.stdout.flush()
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stream, env=environment)
        try:
            return launcher.wait()
        finally:
            launcher.stdin.close()
            try:
                launcher.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
