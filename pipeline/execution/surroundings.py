"""Variables by which launchers tell a process that it is one of several; Threefold starts its processes itself.

Libraries read them as well and would wait for processes that do not exist, so they are taken out of the environment
where they say nothing, and refused where they say that this command was started several times.
"""

import os

from threefold.errors import UserError

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
