"""One of the processes that run a stage together: `python -m threefold.execution.worker JOB_FILE`.

pipeline/execution/launch.py starts it. Only the main process (rank 0) writes files, speaks and tracks.
"""

import datetime
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from threefold.errors import UserError
from threefold.execution import launch
from threefold.fileio import write_json

MODES = {"cpu": ("MULTI_CPU", "gloo"), "cuda": ("MULTI_GPU", "nccl")}  # device → accelerate's mode, torch's backend
# what accelerate reads of FSDP before the trainer's own arguments: whole states on rank 0 need gloo beside nccl
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
# processes wait for the main one while it samples and measures alone, however long that takes; one that fails or goes
# ends the others through the launcher, not through this
LONGEST_WAIT = datetime.timedelta(days=7)


def main(file: Path) -> None:
    """Do this process's part of the task in `file`; after an error, which it reports to the driver, exit status 1."""
    end_with_the_driver()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher passes Ctrl-C on: end without a traceback
    sys.path.insert(0, "")  # reward functions by import path may lie beside the user
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        os.dup2(1, 2)  # the launcher's stderr is a file: the progress bar goes to where the driver prints
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # not DDP's advice on training.arguments
    try:
        result = run(launch.read(file), rank)
    except Exception as error:
        launch.report(error, file.parent)
        sys.exit(1)
    if rank == 0:
        write_json(file.parent / "result.json", result)


def run(task: launch.Task, rank: int) -> dict[str, Any]:
    """Join the other processes and run the stage; returns what the manifest says of the execution."""
    os.environ |= FSDP if task.mode == "fsdp2" else {}
    from accelerate import PartialState
    from omegaconf import OmegaConf

    from threefold.execution import device, interpolations
    from threefold.execution.job import Job, execute

    config = OmegaConf.create(task.config)
    interpolations.note_secrets(config)
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kind = device.choose(config.runtime, on_this_machine)
    state = PartialState(cpu=kind == "cpu", timeout=LONGEST_WAIT)
    require_processes(state, kind, task)
    inputs = {stage: Path(folder) for stage, folder in task.inputs.items()}
    group = device.Group(rank, task.processes, on_this_machine, task.mode)
    job = Job(task.stage, config, inputs, Path(task.out), Path(task.checkpoints), group)
    os.environ["OMP_NUM_THREADS"] = str(job.device.threads)  # otherwise a trainer sets torch's threads anew
    result = execute(job, task.fingerprint)
    state.wait_for_everyone()
    state.destroy_process_group()
    return result


def require_processes(state: Any, kind: str, task: launch.Task) -> None:
    """Raise `UserError` where accelerate has silently set up anything but the processes of `task`, of equal rank.

    What they hold of the model is checked once there is one: pipeline/training/hf_trainer.py.
    """
    mode, backend = MODES[kind]
    if task.mode == "fsdp2" and kind == "cuda":
        backend = "cuda:nccl,cpu:gloo"
    set_up, wanted = (state.num_processes, state.distributed_type.name, state.backend), (task.processes, mode, backend)
    if set_up != wanted:
        raise UserError(
            f"launch.mode={task.mode}: accelerate set up {' '.join(map(str, set_up))} instead of "
            f"{' '.join(map(str, wanted))}; unset the ACCELERATE_ variables of the environment"
        )


def end_with_the_driver() -> None:
    """End this process at once when the driver is gone or wants it: then standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
