"""Several machines for one run: machine 0 makes it, and tells the others by TCP which stage to take part in.

The machines share the folder that the command is given in. All say a JSON object per line. A helper: {"node_rank",
"nodes", "processes"} once, and {"status"} after each job, null or what went wrong. Machine 0: {"job": file}, and at the
end {"end": line, "failed": whether}. A connection that closes ends what both sides are doing.
"""

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.errors import UserError, first_line

HELLO = ("node_rank", "nodes", "processes")  # what a helper says first, keys of `launch`
MEETING = 1800  # seconds that machines wait for each other at the start
ENDING = 60  # seconds in which the processes of all machines end once those of machine 0 have
VISIBLE = 60  # seconds after which a file that machine 0 wrote is seen everywhere


class Peer:
    """One connection, read line by line without ever waiting for a line that is not there."""

    def __init__(self, connection: socket.socket):
        self.connection, self.buffer, self.closed = connection, b"", False
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a machine that lost its power is noticed within about two minutes
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def say(self, **message: Any) -> None:
        """Send a message; a closed connection shows at the next `heard`."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def heard(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next message, or None when none came in so many seconds or the connection is `closed`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer and not self.closed:
            if not select.select([self.connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            self._receive()
        line, found, rest = self.buffer.partition(b"\n")
        if not found:
            return None
        self.buffer = rest
        return json.loads(line)

    def gone(self) -> bool:
        """Whether the other side has closed the connection; what it said before is kept for `heard`."""
        while not self.closed and select.select([self.connection], [], [], 0)[0]:
            self._receive()
        return self.closed

    def _receive(self) -> None:
        try:
            received = self.connection.recv(65536)
        except OSError:
            received = b""
        self.closed, self.buffer = not received, self.buffer + received


class Nodes:
    """The other machines, as machine 0 sees them."""

    def __init__(self, launch: DictConfig):
        self.peers: dict[int, Peer] = {}
        self.statuses: dict[int, str | None] = {}
        with _listening(launch.main_port) as door:
            missing = set(range(1, launch.nodes))
            print(f"waits for {len(missing)} more machines at {address(launch)}:{launch.main_port}", flush=True)
            deadline = time.monotonic() + MEETING
            while missing:
                if time.monotonic() > deadline:
                    raise UserError(f"launch.nodes={launch.nodes}: machines {sorted(missing)} did not come")
                door.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    self._admit(Peer(door.accept()[0]), launch, missing)
                except TimeoutError:
                    continue

    def _admit(self, peer: Peer, launch: DictConfig, missing: set[int]) -> None:
        try:
            said = peer.heard(10) or {}
        except ValueError:  # whoever this is, it is none of ours
            said = {}
        rank, *shape = (said.get(name) if isinstance(said, dict) else None for name in HELLO)
        same = shape == [launch.nodes, launch.processes]
        if same and (rank in missing or (rank in self.peers and self.peers[rank].gone())):
            missing.discard(rank)
            self.peers[rank] = peer
            return
        reason = "that machine is here already" if same else "machine 0 has other values"
        given = " ".join(f"launch.{name}={value}" for name, value in zip(HELLO, (rank, *shape), strict=True))
        peer.say(end=f"{given}: {reason}", failed=True)
        peer.connection.close()

    def start(self, file: Path) -> None:
        """Have all take part in the job of `file`."""
        self.statuses = {}
        for peer in self.peers.values():
            peer.say(job=str(file))

    def trouble(self, seconds: float = 0.0) -> str | None:
        """What keeps a machine from taking part in the job, or None; waits so long for each that has not ended."""
        for rank, peer in self.peers.items():
            if rank not in self.statuses and (said := peer.heard(seconds)):
                self.statuses[rank] = said["status"]
            if self.statuses.get(rank):
                return f"machine {rank}: {self.statuses[rank]}"
            if rank not in self.statuses and peer.closed:
                return f"machine {rank} is gone"
        return None

    def finished(self) -> str | None:
        """Wait for the other machines to end the job that ended well here; what went wrong, or None."""
        late = [rank for rank in self.peers if rank not in self.statuses]
        return self.trouble(ENDING) or next((f"machine {r} does not end" for r in late if r not in self.statuses), None)

    def end(self, line: str, failed: bool) -> None:
        """Send the others home."""
        for peer in self.peers.values():
            peer.say(end=line, failed=failed)
            peer.connection.close()


@contextlib.contextmanager
def gathered(launch: DictConfig) -> Iterator[Nodes | None]:
    """The other machines once all are here, or None where there are none; at the end they are told how it went."""
    if launch.nodes == 1:
        yield None
        return
    others = Nodes(launch)
    try:
        yield others
    except BaseException as error:
        others.end(first_line(error), True)
        raise
    others.end("the run is made", False)


Part = Callable[[Path, int, Callable[[], str | None]], int]


def help_out(launch: DictConfig, take_part: Part) -> None:
    """Take part, as machine `launch.node_rank`, in all that machine 0 says; returns when that is at its end.

    `take_part` runs this machine's processes for a job file and returns their status. Raises `UserError` where machine
    0 is not found, goes, or fails.
    """
    peer = _met(address(launch), launch.main_port)
    peer.say(**{name: launch[name] for name in HELLO})
    while (said := peer.heard(3600)) or not peer.closed:
        if said and "end" in said:
            if said["failed"]:
                raise UserError(f"machine 0 ended: {said['end']}")
            return
        if said:
            peer.say(status=_taken_part(Path(said["job"]), launch.node_rank, peer, take_part))
    raise UserError("machine 0 is gone; the same command on every machine continues from the last checkpoint")


def _taken_part(file: Path, rank: int, peer: Peer, take_part: Part) -> str | None:
    """None, or what went wrong with this machine's part of the job of `file`."""
    deadline = time.monotonic() + VISIBLE
    while not file.exists():
        if time.monotonic() > deadline:
            return f"sees no {file.absolute()}; give the command in the folder that all machines share"
        time.sleep(0.2)
    print(f"{file.parent.stem}: takes part as machine {rank}", flush=True)
    status = take_part(file, rank, lambda: "machine 0 is gone" if peer.gone() else None)
    return None if status == 0 else f"its processes ended with status {status}, see launch-{rank}.txt in {file.parent}"


def address(launch: DictConfig) -> str:
    """Where the others find machine 0: as configured, or Slurm's first node. Raises `UserError` without either."""
    found = launch.main_address or slurm_address()
    if not found:
        raise UserError("launch.main_address has no value: set it to the address of machine 0 as the others see it")
    return found


def slurm_address() -> str | None:
    """The address of the first node of this Slurm job, whose name may not resolve; None outside of Slurm."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        return None
    names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", names[0]))
    return found[1] if found else names[0]


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("launch.main_address: scontrol does not say it here; set it to machine 0's address") from error


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(f"launch.main_port={port}: {error.strerror}; choose another") from error


def _met(host: str, port: int) -> Peer:
    deadline = time.monotonic() + MEETING
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            connection.settimeout(None)
            return Peer(connection)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"launch.main_address={host} launch.main_port={port}: nobody there ({error})"
                ) from error
            time.sleep(0.5)
