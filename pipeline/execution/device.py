"""The device, threads and precision that a stage runs with, its memory, and how fast it is."""

import contextlib
import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig

from threefold.errors import UserError
from threefold.execution.precision import of_device
from threefold.schema.config import SHARDED

# parameters of glibc's mallopt(3), from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


@dataclass(frozen=True)
class Group:
    """The processes that execute a stage together, and this one's rank among them."""

    rank: int = 0
    processes: int = 1
    on_this_machine: int = 1
    mode: str = "single"  # launch.mode


ALONE = Group()


@dataclass(frozen=True)
class Device:
    """Where tensors live and the precision of training arithmetic."""

    type: str  # cpu or cuda
    bf16: bool
    threads: int  # of this process
    processes: int = 1  # that share the work
    mode: str = "single"  # what each of them holds of the model: launch.mode

    def __str__(self) -> str:
        place = f"{self.threads} CPU threads" if self.type == "cpu" else torch.cuda.get_device_name()
        several = f"{self.processes} × " if self.processes > 1 else ""
        return f"{several}{place}, {'bf16' if self.bf16 else 'fp32'}"

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.mode in SHARDED


def set_up(runtime: DictConfig, precision: str, group: Group = ALONE) -> Device:
    """Choose the device, set torch's threads (a share of them for each process of the machine); what was chosen.

    Raises `UserError` for a missing GPU.
    """
    if group.processes == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several would silently share a Trainer's batch
    kind = choose(runtime, group.on_this_machine)
    threads = runtime.threads or min(psutil.cpu_count(logical=False) or 1, usable_cpus())
    threads = max(1, threads // group.on_this_machine)
    torch.set_num_threads(threads)
    _manage_freed_memory(runtime.keep_freed_memory)
    bf16 = precision == "bf16" or (precision == "auto" and of_device(kind) == "bf16")
    return Device(kind, bf16, threads, group.processes, group.mode)


def choose(runtime: DictConfig, processes: int) -> str:
    """cuda or cpu. Raises `UserError` where not every one of `processes` would have a GPU of its own."""
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: torch sees no GPU here; use runtime.device=auto or cpu")
    kind = "cuda" if runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda" and torch.cuda.device_count() < processes:
        seen = torch.cuda.device_count()
        raise UserError(f"launch.processes={processes}: each needs a GPU of its own, and torch sees {seen} here")
    return kind


def _manage_freed_memory(keep: bool) -> None:
    """Have glibc keep freed blocks of up to 32 MiB for what comes next, or return those of 128 KiB and more at once.

    Training asks for them again at once: where they are returned, a fifth of a small model's training time on CPU goes
    into page faults; where they are kept, gaps between them cost memory (docs/log.md). Other C libraries have no
    `mallopt`, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not mallopt:
        return
    kept = ((M_MMAP_THRESHOLD, 32 * 2**20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20))
    for parameter, size in kept if keep else ((M_MMAP_THRESHOLD, 128 * 2**10),):
        mallopt(parameter, size)


def usable_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Work:
    """What a stage has a model do, in tokens: trained on, passed forward, and sampled, each after the one before it."""

    trained: float = 0.0
    scored: float = 0.0
    sampled: float = 0.0
    shape: tuple[int, int] = (8, 64)  # of a batch that is trained on or scored: rows and tokens of each
    together: int = 64  # replies that are sampled together


MEASURED_SECONDS, MEASURED_TOKENS = 0.1, 1024  # of one measurement, about, and the most tokens of its batch


def estimated_seconds(model: Any, work: Work, bf16: bool = False) -> float:
    """The seconds that `work` takes on this CPU: each kind of it is done with `model` for a moment, and measured."""
    rows, length = max(1, work.shape[0]), max(2, min(work.shape[1], MEASURED_TOKENS))
    passes = (min(rows, max(1, MEASURED_TOKENS // length)), length)
    kinds = ((work.trained, passes, True), (work.scored, passes, False), (work.sampled, (work.together, 1), False))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return sum(tokens * seconds_per_token(model, shape, trained) for tokens, shape, trained in kinds if tokens)


def seconds_per_token(model: Any, shape: tuple[int, int], trained: bool) -> float:
    """Seconds that a forward pass (`trained`: and the backward one) of tokens [B, T] takes for each of them.

    Weights, gradients and the random state stay as they were.
    """
    ids, parameters = torch.ones(shape, dtype=torch.long), [p for p in model.parameters() if p.requires_grad]

    def once() -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(trained):
            logits = model(input_ids=ids, use_cache=False).logits
            if trained:
                torch.autograd.grad(logits.float().logsumexp(-1).mean(), parameters, allow_unused=True)
        return time.perf_counter() - started

    first = once()  # allocates, and is left out where there is time for another
    if first > 10 * MEASURED_SECONDS:
        return first / ids.numel()
    took = [once()]
    while sum(took) < MEASURED_SECONDS:
        took.append(once())
    return sum(took) / len(took) / ids.numel()


def reset_peak_memory() -> None:
    """Start measuring peak memory anew; on systems other than Linux the peak is that of the whole process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # forbidden in some containers: the peak is the whole process's then, too
            Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Give GPU memory that torch keeps for later back to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Peak memory since `reset_peak_memory`: GPU memory where a GPU is used, otherwise the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
