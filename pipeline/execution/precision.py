"""What `precision=auto` is on a machine, found without torch: bf16 on GPUs that compute in it, fp32 everywhere else.

NVIDIA GPUs do from compute capability 8.0 on (Ampere); older ones only emulate it. NVML answers in milliseconds, opens
no GPU in this process, and comes with the driver.
"""

import ctypes
import functools
import importlib.util
import os
import re
from pathlib import Path

from omegaconf import DictConfig

BF16_CAPABILITY = 8  # major compute capability


def resolved(config: DictConfig, stage: str) -> str:
    """The precision that `stage` is made with, fp32 or bf16.

    Where jobs of Slurm ask for GPUs it is bf16, for this machine may have none; their resources decide with
    launcher=slurm, and wherever they name GPUs.
    """
    if config.precision != "auto":
        return config.precision
    stage_gpus = config.resources.stages[stage].gpus
    gpus = config.resources.gpus if stage_gpus is None else stage_gpus
    if config.launcher.kind == "slurm" or gpus:
        return "bf16" if gpus and config.runtime.device != "cpu" else "fp32"
    return of_device(config.runtime.device)


def of_device(device: str) -> str:
    """What auto is on this machine with `runtime.device`."""
    return "bf16" if device != "cpu" and computes_in_bf16() else "fp32"


@functools.cache
def computes_in_bf16() -> bool:
    """Whether torch was built for GPUs, and the first GPU that it may use computes in bf16."""
    built_for = torch_platforms()
    if "hip" in built_for:
        return Path("/dev/kfd").exists()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "cuda" not in built_for or visible in ("", "-1"):
        return False
    return capability(visible or "0") >= BF16_CAPABILITY


def torch_platforms() -> set[str]:
    """cuda or hip, as the installed torch was built for; read from its version file, which imports nothing."""
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    file = Path(folders[0]) / "version.py" if folders else None
    if file is None or not file.is_file():
        return set()
    return set(re.findall(r"^(cuda|hip)\b[^=\n]*= *['\"]", file.read_text(), re.MULTILINE))


def capability(visible: str) -> int:
    """Major compute capability of the first GPU in a CUDA_VISIBLE_DEVICES; 0 where the driver has none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    first = visible.split(",")[0].strip()
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        if first.startswith(("GPU-", "MIG-")):
            missing = nvml.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))
        elif first.isdigit():
            missing = nvml.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(handle))
        else:  # NoDevFiles of older Slurms, -1 and the like: CUDA then shows no GPU
            return 0
        unread = missing or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        return 0 if unread else major.value
    finally:
        nvml.nvmlShutdown()
