"""Stands in for pipeline/execution/worker.py: trains several stages in turn in the same processes: `JOBS_FILE`.

What stages measure besides training is left out. The jobs file holds a list of job files. For FSDP2, which accelerate
silently turns into DDP on a CPU, processes on CPUs are made to look like processes on GPUs.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from threefold.evaluation import baselines, held_out
from threefold.execution import launch, worker
from threefold.stages import dpo, reward, sft


def measure_nothing(put=setattr) -> None:
    """Replace what stages measure after training; `put` sets an attribute."""
    put(baselines, "text_baselines", lambda *_: {})
    put(held_out, "text_bits_per_byte", lambda *_: 0.0)
    put(held_out, "reply_bits_per_byte", lambda *_: 0.0)
    put(sft, "ended_share", lambda *_: 0.0)
    put(reward, "check_up", lambda *_: {})
    put(dpo, "metrics", lambda *_: {"chosen_falls": False})


def pretend_gpus() -> None:
    original = PartialState.__init__

    def init(self, *given, **options):
        original(self, *given, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    worker.MODES = {"cpu": ("MULTI_GPU", "gloo")}


def main(jobs: Path) -> None:
    worker.end_with_the_driver()
    measure_nothing()
    PartialState.destroy_process_group = lambda self: None  # the next job goes on with it
    for file in map(Path, json.loads(jobs.read_text())):
        task = launch.read(file)
        if task.mode == "fsdp2" and worker.MODES["cpu"][0] != "MULTI_GPU":
            pretend_gpus()
        AcceleratorState._reset_state(reset_partial_state=True)  # each job in a process as good as new
        try:
            worker.run(task, int(os.environ["RANK"]))
        except Exception as error:
            launch.report(error, jobs.parent)
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
