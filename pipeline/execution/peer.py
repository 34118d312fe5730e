"""One connection between machines that share a secret file: JSON lines that only its readers can write.

Each side first says a random number, and from then on `MAC JSON` a line: the MAC covers both numbers, who speaks and
how many lines were before, so that no line can be made up, changed, left out or said again. What does not carry the
right MAC is not parsed: the connection is closed. The secret itself is never sent.
"""

import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import stat
import time
from pathlib import Path
from typing import Any

from threefold.errors import UserError

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
