"""Several machines for one run: machine 0 makes it, and tells the others by TCP which stage to take part in.

The machines share the folder that the command is given in, and in its artifact store a secret that each proves to the
other (`Peer`). A helper says {"node_rank", "nodes", "processes"} once, and {"status"} after each
job, null or what went wrong. Machine 0: {"welcome": true}, {"job": name of the work folder in the store}, and at the
end {"end": line, "failed": whether}. A connection that closes ends what both sides are doing.

One connection between machines that share a secret file: JSON lines that only its readers can write.

Each side first says a random number, and from then on `MAC JSON` a line: the MAC covers both numbers, who speaks and
how many lines were before, so that no line can be made up, changed, left out or said again. What does not carry the
right MAC is not parsed: the connection is closed. The secret itself is never sent.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import select
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold.errors import UserError, first_line

SECRET = ".machines.secret"  # in runs/artifacts, for its owner alone
ELSEWHERE = ", which several machines need for their secret; set runs to a folder of another one"
LONGEST = 65536  # bytes that may wait to be read as lines; more closes the connection
MACHINE_0, HELPER = "machine 0", "helper"  # who speaks


def made_secret(store: Path) -> bytes:
    """The secret of the artifact store, made where there is none yet; only the owner of the file may read it.

    Raises `UserError` where the store is in a file system that keeps no secrets, for want of links or permissions.
    """
    store.mkdir(parents=True, exist_ok=True)
    file = store / SECRET
    fresh = store / f"{SECRET}.{secrets.token_hex(4)}"
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    try:
        if _open_to_others(fresh):
            raise UserError(f"{store}: its file system keeps no permissions{ELSEWHERE}")
        os.link(fresh, file)  # does nothing to a secret that is there, and is never seen half-written
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"{store}: its file system has no hard links ({error.strerror}){ELSEWHERE}") from error
    finally:
        fresh.unlink()
    return read_secret(store)


def read_secret(store: Path) -> bytes:
    """The secret of the artifact store. Raises `UserError` where others may read it, or where it is no secret."""
    file = store / SECRET
    if _open_to_others(file):
        raise UserError(f"{file}: can be read by others; remove it, machine 0 makes a new one")
    secret = file.read_bytes()
    if len(secret) < 64:
        raise UserError(f"{file}: is damaged; remove it, machine 0 makes a new one")
    return secret


def _open_to_others(file: Path) -> bool:
    return bool(stat.S_IMODE(file.stat().st_mode) & 0o077)


class Peer:
    """One connection, read line by line without ever waiting for a line that is not there."""

    def __init__(self, connection: socket.socket, secret: bytes, speaks_as: str):
        self.connection, self.buffer, self.closed = connection, b"", False
        self.secret, self.speaks_as, self.hears = secret, speaks_as, HELPER if speaks_as == MACHINE_0 else MACHINE_0
        self.nonce, self.their_nonce, self.counts = secrets.token_hex(16), "", {MACHINE_0: 0, HELPER: 0}
        connection.settimeout(10)  # for sending; what is read is there
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # a machine that lost its power is noticed within about two minutes
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._send(self.nonce.encode())

    @property
    def trusted(self) -> bool:
        """Whether the other side has proved that it knows the secret."""
        return self.counts[self.hears] > 0

    def say(self, **message: Any) -> None:
        """Send a message to a side whose number is known; a closed connection shows at the next `heard`."""
        content = json.dumps(message).encode()
        self._send(self._mac(self.speaks_as, content) + b" " + content)
        self.counts[self.speaks_as] += 1

    def heard(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """The next message, or None when none came in so many seconds or the connection is `closed`."""
        deadline = time.monotonic() + seconds
        if not self.greeted(seconds):
            return None
        line = self._line(deadline)
        return None if line is None else self._opened(line)

    def greeted(self, seconds: float = 0.0) -> bool:
        """Whether the other side has said its number, without which nothing can be said to it."""
        if not self.their_nonce and (line := self._line(time.monotonic() + seconds)) is not None:
            if len(line) == 32 and line.isalnum():
                self.their_nonce = line.decode("ascii")
            else:
                self.close()
        return bool(self.their_nonce)

    def gone(self) -> bool:
        """Whether the other side has closed the connection; what it said before is kept for `heard`."""
        while not self.closed and select.select([self.connection], [], [], 0)[0]:
            self._receive()
        return self.closed

    def close(self) -> None:
        """End the connection; nothing of it is heard any more."""
        self.closed, self.buffer = True, b""
        self.connection.close()

    def _opened(self, line: bytes) -> dict[str, Any] | None:
        """The message in a line; one that is none of the other side's closes the connection."""
        mac, _, content = line.partition(b" ")
        message = None
        if hmac.compare_digest(mac, self._mac(self.hears, content)):
            self.counts[self.hears] += 1
            message = json.loads(content)
        if not isinstance(message, dict):
            self.close()
            return None
        return message

    def _mac(self, speaker: str, content: bytes) -> bytes:
        """The MAC of the next line of `speaker`, in hexadecimal."""
        nonces = [self.nonce, self.their_nonce] if self.speaks_as == MACHINE_0 else [self.their_nonce, self.nonce]
        head = " ".join([*nonces, speaker, str(self.counts[speaker]), ""]).encode()
        return hmac.new(self.secret, head + content, hashlib.sha256).hexdigest().encode()

    def _send(self, line: bytes) -> None:
        try:
            self.connection.sendall(line + b"\n")
        except OSError:
            self.closed = True

    def _line(self, deadline: float) -> bytes | None:
        while b"\n" not in self.buffer and not self.closed:
            if not select.select([self.connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            self._receive()
        line, end, rest = self.buffer.partition(b"\n")
        if not end:
            return None
        self.buffer = rest
        return line

    def _receive(self) -> None:
        try:
            received = self.connection.recv(4096)
        except OSError:
            received = b""
        self.closed, self.buffer = not received, self.buffer + received
        if len(self.buffer) > LONGEST:
            self.close()


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
