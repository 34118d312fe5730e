"""Several machines for one run: machine 0 makes it, and tells the others by TCP which stage to take part in.

The machines share the folder that the command is given in, and in its artifact store a secret that each proves to the
other (pipeline/execution/peer.py). A helper says {"node_rank", "nodes", "processes"} once, and {"status"} after each
job, null or what went wrong. Machine 0: {"welcome": true}, {"job": name of the work folder in the store}, and at the
end {"end": line, "failed": whether}. A connection that closes ends what both sides are doing.
"""

import contextlib
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold.errors import UserError, first_line
from threefold.execution.peer import HELPER, MACHINE_0, SECRET, Peer, made_secret, read_secret

HELLO = ("node_rank", "nodes", "processes")  # what a helper says first, keys of `launch`
MEETING = 1800  # seconds that machines wait for each other at the start
ENDING = 60  # seconds in which the processes of all machines end once those of machine 0 have
VISIBLE = 60  # seconds after which a file that machine 0 wrote is seen everywhere
STRANGERS = 32  # connections that may wait to prove that they are helpers, and for how many seconds
PATIENCE = 10
WORK = re.compile(r"[a-z_]+-[0-9a-f]+\.work")  # the folder in the store where an artifact is being made


class Nodes:
    """The other machines, as machine 0 sees them."""

    def __init__(self, launch: DictConfig, store: Path):
        self.peers: dict[int, Peer] = {}
        self.statuses: dict[int, str | None] = {}
        self.launch, self.missing = launch, set(range(1, launch.nodes))
        secret = made_secret(store)
        with _listening(launch.main_port) as door:
            print(f"waits for {len(self.missing)} more machines at {address(launch)}:{launch.main_port}", flush=True)
            self._meet(door, secret)

    def _meet(self, door: socket.socket, secret: bytes) -> None:
        """Wait until all machines are here; whoever does not prove to be one is left waiting, and then sent away."""
        deadline, strangers = time.monotonic() + MEETING, dict[Peer, float]()
        while self.missing:
            if time.monotonic() > deadline:
                raise UserError(f"launch.nodes={self.launch.nodes}: machines {sorted(self.missing)} did not come")
            sockets = [door, *(peer.connection for peer in strangers)]
            if door in select.select(sockets, [], [], min(1, MEETING))[0]:
                with contextlib.suppress(OSError):
                    strangers[Peer(door.accept()[0], secret, MACHINE_0)] = time.monotonic() + PATIENCE
            for peer, until in list(strangers.items()):
                if hello := peer.heard():
                    self._admit(peer, hello)
                elif not peer.closed and time.monotonic() < until and len(strangers) <= STRANGERS:
                    continue
                else:
                    peer.close()
                del strangers[peer]
        for peer in strangers:
            peer.close()

    def _admit(self, peer: Peer, hello: dict[str, Any]) -> None:
        rank, *shape = (hello.get(name) for name in HELLO)
        same = shape == [self.launch.nodes, self.launch.processes] and type(rank) is int
        if same and (rank in self.missing or (rank in self.peers and self.peers[rank].gone())):
            self.missing.discard(rank)
            self.peers[rank] = peer
            peer.say(welcome=True)
            return
        reason = "that machine is here already" if same else "machine 0 has other values"
        given = " ".join(f"launch.{name}={value}" for name, value in zip(HELLO, (rank, *shape), strict=True))
        peer.say(end=f"{given}: {reason}", failed=True)
        peer.close()

    def start(self, file: Path) -> None:
        """Have all take part in the job of `file`, which is in a work folder of the store."""
        self.statuses = {}
        for peer in self.peers.values():
            peer.say(job=file.parent.name)

    def trouble(self, seconds: float = 0.0) -> str | None:
        """What keeps a machine from taking part in the job, or None; waits so long for each that has not ended."""
        for rank, peer in self.peers.items():
            if rank not in self.statuses and (message := peer.heard(seconds)):
                self.statuses[rank] = _one_line(message.get("status", "says no status"))
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
            peer.close()


def _one_line(status: Any) -> str | None:
    """What a helper says of its part, as it can be shown; None where that ended well."""
    return (
        None if status is None else " ".join("".join(c if c.isprintable() else " " for c in str(status)).split())[:500]
    )


@contextlib.contextmanager
def gathered(launch: DictConfig, store: Path) -> Generator[Nodes | None]:
    """The other machines once all are here, or None where there are none; at the end they are told how it went."""
    if launch.nodes == 1:
        yield None
        return
    others = Nodes(launch, store)
    try:
        yield others
    except BaseException as error:
        others.end(first_line(error), True)
        raise
    others.end("the run is made", False)


Part = Callable[[Path, int, Callable[[], str | None]], int]


def help_out(launch: DictConfig, store: Path, take_part: Part) -> None:
    """Take part, as machine `launch.node_rank`, in all that machine 0 says; returns when that is at its end.

    `take_part` runs this machine's processes for a job file in `store` and returns their status. Raises `UserError`
    where machine 0 is not found, does not know the secret of the store, goes, or fails.
    """
    peer = _introduced(launch, store)
    while (message := peer.heard(3600 if peer.trusted else PATIENCE)) or (peer.trusted and not peer.closed):
        if message and "end" in message:
            if message["failed"]:
                raise UserError(f"machine 0 ended: {message['end']}")
            return
        if message and "job" in message:
            peer.say(status=_taken_part(message["job"], store, launch.node_rank, peer, take_part))
    if not peer.trusted:
        raise UserError(
            f"launch.main_address={address(launch)} launch.main_port={launch.main_port}: who answers there does not "
            f"share {store / SECRET}; give the command in the folder that all machines share"
        )
    raise UserError("machine 0 is gone; the same command on every machine continues from the last checkpoint")


def _introduced(launch: DictConfig, store: Path) -> Peer:
    """The connection to machine 0, to which this machine has said who it is."""
    connection = _met(address(launch), launch.main_port)
    if not (store / SECRET).is_file():  # machine 0 writes it before it listens, and sends away who is not at once one
        connection.close()
        _wait_for_secret(store)
        connection = _met(address(launch), launch.main_port)
    peer = Peer(connection, read_secret(store), HELPER)
    if peer.greeted(PATIENCE):
        peer.say(**{name: launch[name] for name in HELLO})
    else:
        peer.close()
    return peer


def _wait_for_secret(store: Path) -> None:
    deadline = time.monotonic() + VISIBLE
    while not (store / SECRET).is_file():
        if time.monotonic() > deadline:
            raise UserError(f"sees no {store / SECRET}; give the command in the folder that all machines share")
        time.sleep(0.2)


def _taken_part(work: Any, store: Path, rank: int, peer: Peer, take_part: Part) -> str | None:
    """None, or what went wrong with this machine's part of the job in the folder `work` of the store."""
    if not isinstance(work, str) or not WORK.fullmatch(work):
        return "takes jobs from the work folders of its artifact store alone"
    file, deadline = store / work / "job.json", time.monotonic() + VISIBLE
    while not file.exists():
        if time.monotonic() > deadline:
            return f"sees no {file.absolute()}; give the command in the folder that all machines share"
        time.sleep(0.2)
    if file.resolve() != store.resolve() / work / "job.json":
        return f"{file} is a link to elsewhere; jobs are taken from the artifact store alone"
    print(f"{file.parent.stem}: takes part as machine {rank}", flush=True)
    status = take_part(file, rank, lambda: "machine 0 is gone" if peer.gone() else None)
    return None if status == 0 else f"its processes ended with status {status}, see launch-{rank}.txt in {file.parent}"


def address(launch: DictConfig) -> str:
    """Where the others find machine 0: as configured, or Slurm's first node. Raises `UserError` without either."""
    host = launch.main_address or slurm_address()
    if not host:
        raise UserError("launch.main_address has no value: set it to the address of machine 0 as the others see it")
    return host


def slurm_address() -> str | None:
    """The address of the first node of this Slurm job, whose name may not resolve; None outside of Slurm."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        return None
    names = _scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    node_address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", names[0]))
    return node_address[1] if node_address else names[0]


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


def _met(host: str, port: int) -> socket.socket:
    deadline = time.monotonic() + MEETING
    while True:
        try:
            return socket.create_connection((host, port), timeout=10)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"launch.main_address={host} launch.main_port={port}: nobody there ({error})"
                ) from error
            time.sleep(0.5)
