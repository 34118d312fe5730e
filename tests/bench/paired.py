"""Several ways of doing the same work in turn, and how many times as fast as a baseline each is.

Time is the process's CPU time, so that other work on the machine counts little, and on a GPU that of the clock. A ratio
is of two rounds that followed each other.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from threefold.execution import device

Round = Callable[[], float]  # does the work of a round; how many units it was


@dataclass(frozen=True)
class Contestant:
    """What one way of doing the work reached: medians over the rounds, with the least and the most of the ratio."""

    name: str
    per_second: float  # units
    ratio: tuple[float, float, float]  # to the baseline: median, least, most
    peak_share: float | None  # of the floating-point operations that the machine was seen to do
    memory_mib: float  # most that a round took beyond what the process held before it


def contest(ways: dict[str, Callable[[], Round]], rounds: int, baseline: str, flops: float | None = None) -> list[Any]:
    """Let each of `ways` prepare a round and do it, all in turn; `flops` are those of one unit of the work."""
    memory = {name: memory_of(prepare) for name, prepare in ways.items()}  # before a round leaves freed memory behind
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, prepare in ways.items():
            work = prepare()
            started = clock()
            units = work()
            if number:  # the first round warms up
                seconds[name].append((clock() - started) / units)
    peak, entries = peak_flops(), []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds[baseline], taken, strict=True)]
        speed = 1 / float(np.median(taken))
        share = None if flops is None else flops * speed / peak
        spread = float(np.median(ratios)), min(ratios), max(ratios)
        entries.append(Contestant(name, speed, spread, share, memory[name]))
    return entries


def memory_of(prepare: Callable[[], Round]) -> float:
    """Most MiB that a round takes beyond what is held before it: of the GPU, or in a process of its own of the CPU."""
    if torch.cuda.is_available():
        return _memory(prepare)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # those of the parent are not in this process
        try:
            os.write(writer, str(_memory(prepare)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return float(told) if told else float("nan")


def _memory(prepare: Callable[[], Round]) -> float:
    work = prepare()
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    device.reset_peak_memory()
    work()
    return (device.peak_memory_bytes() - held) / 2**20


def clock() -> float:
    """Seconds: of the CPU, or on a machine with a GPU of the clock, once it has done what it was given."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(side: int = 1024) -> float:
    """Floating-point operations per second of a product of square matrices: the most of ten, fp32, or bf16 on a GPU."""
    kind, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    side *= 8 if kind == "cuda" else 1
    a = torch.ones(side, side, dtype=dtype, device=kind)
    least = float("inf")
    for _ in range(10):
        started = clock()
        a @ a
        least = min(least, clock() - started)
    return 2 * side**3 / least


def show(title: str, unit: str, baseline: str, entries: list[Contestant]) -> None:
    """The table of a contest."""
    table = Table("", f"{unit}/s", f"times {baseline}", "share of peak", "memory, MiB", title=title)
    for entry in entries:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*entry.ratio)
        share = "" if entry.peak_share is None else f"{entry.peak_share:.0%}"
        table.add_row(entry.name, f"{entry.per_second:,.1f}", ratio, share, f"{entry.memory_mib:,.0f}")
    Console(width=120).print(table)


def write(file: Path, contests: dict[str, list[Contestant]], about: dict[str, Any]) -> None:
    """Every contest as JSON, with what it ran on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "peak_gflops": peak_flops() / 1e9}
    machine |= {"cpu": torch.backends.cpu.get_cpu_capability()}
    machine |= {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    told = {name: [asdict(entry) for entry in entries] for name, entries in contests.items()}
    file.write_text(json.dumps({"machine": machine | about, "contests": told}, indent=1) + "\n")
    print(f"numbers: {file}")
