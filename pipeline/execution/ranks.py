"""Work shared by the processes of one stage: each takes a share of the rows, sums and rows are brought together.

Every process runs the same collective calls in the same order whatever its share is, empty ones included.
"""

import contextlib
import math
from collections.abc import Generator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from threefold.execution.job import Job


def meet(job: Job) -> None:
    """Wait until all processes of the stage have come here."""
    if job.device.processes > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def main_first(job: Job) -> Generator[None]:
    """The main process does what is inside before the others, who then find what it wrote."""
    if not job.main:
        meet(job)
    yield
    if job.main:
        meet(job)


def share(rows: Any, accelerator: Accelerator) -> Any:
    """This process's part of a sequence: every n-th element, n processes in all."""
    return rows[accelerator.process_index :: accelerator.num_processes]


def in_order(parts: list[list[Any]]) -> list[Any]:
    """The sequence of which `parts` are the shares of all processes."""
    rows: list[Any] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


def gathered(rows: list[Any], accelerator: Accelerator) -> list[Any]:
    """The whole sequence of which `rows` is this process's share."""
    return in_order(gather_object([rows])) if accelerator.num_processes > 1 else rows


def evened(rows: list[Any], batch_size: int, processes: int, without_labels: Any) -> list[Any]:
    """`rows` with each batch filled up so that all processes take as many: with rows that no loss counts."""
    full = math.ceil(batch_size / processes) * processes
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [row for batch in batches for row in [*batch, *[without_labels] * (full - len(batch))]]


def sum_gradients(parameters: list[Tensor], accelerator: Accelerator) -> None:
    """Replace every gradient by its sum over the processes; a missing one counts as 0."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    summed = accelerator.reduce(flat, "sum").split([p.numel() for p in parameters])
    for p, gradient in zip(parameters, summed, strict=True):
        p.grad = gradient.view_as(p)


def summed(metrics: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Every metric summed over the processes; names may be missing on some."""
    if accelerator.num_processes == 1:
        return metrics
    total: dict[str, float] = {}
    for part in gather_object([metrics]):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def highest(value: float, accelerator: Accelerator) -> float:
    """The highest of the values of all processes."""
    return max(gather_object([value])) if accelerator.num_processes > 1 else value


def decided(value: Any, accelerator: Accelerator) -> Any:
    """What the main process says, for all: processes that round differently must still take the same way."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value
