"""Several machines: meeting, taking part and parting over TCP; two of them on this host train as one process does."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from threefold import cli
from threefold.errors import UserError
from threefold.execution import nodes
from threefold.fileio import read_lines


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def machine(rank: int, port: int, of: int = 2, processes: int = 2):
    found = {"mode": "ddp", "processes": processes, "nodes": of, "node_rank": rank}
    return OmegaConf.create(found | {"main_address": "127.0.0.1", "main_port": port})


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "runs/artifacts"


@pytest.fixture
def job(store) -> Path:
    file = store / "sft-abc123.work/job.json"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


class Helper(threading.Thread):
    """A machine other than 0, in a thread; `error` is the line that it ended with."""

    def __init__(self, launch, store, take_part=lambda file, rank, trouble: 0):
        super().__init__(daemon=True)
        self.launch, self.store, self.take_part, self.error = launch, store, take_part, None
        self.start()

    def run(self):
        try:
            nodes.help_out(self.launch, self.store, self.take_part)
        except UserError as error:
            self.error = str(error)

    def ended(self) -> str | None:
        self.join(20)
        assert not self.is_alive()
        return self.error


def test_all_machines_take_part_in_every_job_and_go_home(port, store, job, capsys):
    seen = []
    helpers = [
        Helper(machine(rank, port, of=3), store, lambda file, rank, trouble: seen.append((rank, file)) or 0)
        for rank in (2, 1)
    ]
    with nodes.gathered(machine(0, port, of=3), store) as others:
        for _ in range(2):
            others.start(job)
            assert others.finished() is None
    assert [helper.ended() for helper in helpers] == [None, None]
    assert sorted(seen) == [(1, job), (1, job), (2, job), (2, job)]
    assert f"waits for 2 more machines at 127.0.0.1:{port}" in capsys.readouterr().out


def test_one_machine_waits_for_nobody(store):
    with nodes.gathered(machine(0, 1, of=1), store) as others:
        assert others is None


def test_a_part_that_fails_is_trouble_and_the_error_reaches_all(port, store, job):
    helper = Helper(machine(1, port), store, lambda *_: 3)
    with pytest.raises(UserError, match="sft: no"), nodes.gathered(machine(0, port), store) as others:
        others.start(job)
        said = others.finished()
        assert said == f"machine 1: its processes ended with status 3, see launch-1.txt in {job.parent}"
        raise UserError("sft: no")
    assert helper.ended() == "machine 0 ended: sft: no"


def test_a_machine_in_another_folder_says_so(port, store, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "VISIBLE", 0.1)
    helper = Helper(machine(1, port), store)
    with nodes.gathered(machine(0, port), store) as others:
        others.start(store / "sft-abc123.work/job.json")
        assert "give the command in the folder that all machines share" in others.finished()
    assert helper.ended() is None


def test_a_machine_with_other_values_or_twice_the_same_is_sent_home(port, store):
    wrong, *both = (
        Helper(machine(1, port, processes=4), store),
        *(Helper(machine(1, port, of=3), store) for _ in range(2)),
    )
    threading.Timer(2, lambda: Helper(machine(2, port, of=3), store)).start()
    with nodes.gathered(machine(0, port, of=3), store):
        pass
    assert wrong.ended().endswith("launch.node_rank=1 launch.nodes=2 launch.processes=4: machine 0 has other values")
    lines = [helper.ended() for helper in both]
    assert None in lines and any(line and line.endswith("that machine is here already") for line in lines)


NONCE = b"0" * 32 + b"\n"
HELLO = b'{"node_rank": 1, "nodes": 2, "processes": 2}\n'
RUBBISH = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "no line": b"",
    "not text": b"\x00\xff garbage\n",
    "a rank that is no number": b'{"node_rank": {}, "nodes": 2, "processes": 2}\n',
    "a hello without a proof": NONCE + HELLO,
    "a hello with a false proof": NONCE + b"0" * 64 + b" " + HELLO,
    "deep nesting": NONCE + b"[" * 50000 + b"\n",
    "no end of the line": b"a" * 2_000_000,
}


@pytest.mark.parametrize("line", RUBBISH.values(), ids=RUBBISH.keys())
def test_whoever_else_connects_is_turned_away(line, port, store):
    def knock():
        stranger = nodes._met("127.0.0.1", port)
        with contextlib.suppress(OSError):  # turned away while it still speaks
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
        Helper(machine(1, port), store)

    threading.Timer(0.2, knock).start()
    with nodes.gathered(machine(0, port), store) as others:
        assert set(others.peers) == {1}


def test_strangers_who_say_nothing_keep_no_helper_waiting_and_no_room(port, store, monkeypatch):
    monkeypatch.setattr(nodes, "STRANGERS", 3)
    silent = []

    def knock():
        silent.extend(nodes._met("127.0.0.1", port) for _ in range(6))
        Helper(machine(1, port), store)

    threading.Timer(0.2, knock).start()
    started = time.monotonic()
    with nodes.gathered(machine(0, port), store) as others:
        assert set(others.peers) == {1} and time.monotonic() - started < nodes.PATIENCE / 2
    for stranger in silent:  # each was given a number, and then the end
        stranger.settimeout(5)
        assert len(stranger.recv(100)) == 33 and stranger.recv(100) == b""


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (None, None),
        ("\x1b[31mfake\nsecond line", "machine 1: [31mfake second line"),
        ([1], "machine 1: [1]"),
        ("x" * 9000, f"machine 1: {'x' * 500}"),
    ],
)
def test_what_a_machine_says_of_its_part_is_shown_on_one_line(status, shown, port, store, job):
    def joined():
        known = nodes._introduced(machine(1, port), store)
        assert known.heard(5) == {"welcome": True} and known.heard(5) == {"job": job.parent.name}
        known.say(status=status)

    threading.Timer(0.2, joined).start()
    others = nodes.Nodes(machine(0, port), store)
    others.start(job)
    assert others.finished() == shown


@pytest.mark.parametrize("line", [b"rubbish\n", b"[1]\n", b"{}\n", b"a" * 2_000_000])
def test_a_machine_that_goes_on_with_rubbish_is_gone(line, port, store, job):
    def joined():
        known = nodes._introduced(machine(1, port), store)
        with contextlib.suppress(OSError):
            known.connection.sendall(line)

    threading.Timer(0.2, joined).start()
    others = nodes.Nodes(machine(0, port), store)
    others.start(job)
    assert others.finished() == "machine 1 is gone" and len(others.peers[1].buffer) <= nodes.LONGEST


def pretended(port, secret, work):
    """A machine 0 in a thread that knows `secret`, and has the first helper take part in the job of `work`."""

    def serve():
        with socket.create_server(("127.0.0.1", port)) as door:
            helper = nodes.Peer(door.accept()[0], secret, nodes.MACHINE_0)
            helper.heard(5)
            helper.say(welcome=True)
            helper.say(job=work)
            answers.append(helper.heard(5))
            helper.close()

    answers = []
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return answers, thread


def test_a_machine_0_without_the_secret_has_nothing_run(port, store, job):
    ran = []
    nodes.made_secret(store)
    answers, thread = pretended(port, b"x" * 64, job.parent.name)
    helper = Helper(machine(1, port), store, lambda *_: ran.append(1) or 0)
    assert "does not share" in helper.ended() and "the folder that all machines share" in helper.error
    thread.join(10)
    assert ran == [] and answers == [None]


@pytest.mark.parametrize(
    "work", ["../evil.work", "/tmp/evil.work", "evil", "sft-abc123.work/out", 3, None, "sft-bad.work"]
)
def test_a_helper_takes_jobs_from_its_own_store_alone(work, port, store, job, tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/job.json").touch()
    (store / "sft-bad.work").symlink_to(tmp_path / "evil")
    ran = []
    answers, thread = pretended(port, nodes.made_secret(store), work)
    helper = Helper(machine(1, port), store, lambda *_: ran.append(1) or 0)
    helper.ended()
    thread.join(10)
    assert ran == [] and "artifact store alone" in answers[0]["status"]


def test_the_secret_is_made_once_for_its_owner_alone_and_never_sent(port, store, monkeypatch):
    first = nodes.made_secret(store)
    assert nodes.made_secret(store) == first and len(first) == 64
    assert [file.name for file in store.iterdir()] == [nodes.SECRET]
    assert (store / nodes.SECRET).stat().st_mode & 0o777 == 0o600
    sent, send = [], nodes.Peer._send
    monkeypatch.setattr(nodes.Peer, "_send", lambda self, line: sent.append(line) or send(self, line))
    helper = Helper(machine(1, port), store)
    with nodes.gathered(machine(0, port), store):
        pass
    assert helper.ended() is None and len(sent) == 5 and not any(first in line for line in sent)
    (store / nodes.SECRET).chmod(0o644)
    with pytest.raises(UserError, match=r"machines\.secret: can be read by others; remove it"):
        nodes.made_secret(store)


def test_a_helper_that_sees_the_secret_late_is_no_stranger(port, store, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "PATIENCE", 1)
    monkeypatch.setattr(nodes, "MEETING", 8)
    late = tmp_path / "late"
    threading.Timer(3, lambda: late.symlink_to(store)).start()
    helper = Helper(machine(1, port), late)
    with nodes.gathered(machine(0, port), store) as others:
        assert set(others.peers) == {1}
    assert helper.ended() is None


def test_a_file_system_that_keeps_no_secret_is_named_in_one_line(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as without_links:
        without_links.setattr(os, "link", refuse)
        with pytest.raises(UserError, match=r"artifacts: its file system has no hard links .*; set runs to a folder"):
            nodes.made_secret(store)
    with monkeypatch.context() as without_modes:
        without_modes.setattr(nodes.stat, "S_IMODE", lambda mode: 0o777)
        with pytest.raises(
            UserError, match=r"artifacts: its file system keeps no permissions, .*; set runs to a folder"
        ):
            nodes.made_secret(store)
    assert list(store.iterdir()) == []


def test_a_line_that_is_said_again_is_not_heard_twice(port, store):
    with socket.create_server(("127.0.0.1", port)) as door:
        theirs = nodes._met("127.0.0.1", port)
        ours = door.accept()[0]
    secret = nodes.made_secret(store)
    machine_0, helper = nodes.Peer(ours, secret, nodes.MACHINE_0), nodes.Peer(theirs, secret, nodes.HELPER)
    assert machine_0.greeted(1) and helper.greeted(1)
    content = b'{"job": "a"}'
    line = machine_0._mac(nodes.MACHINE_0, content) + b" " + content + b"\n"
    ours.sendall(line + line)
    assert helper.heard(1) == {"job": "a"} and helper.heard(1) is None and helper.closed


def test_when_machine_0_goes_the_others_end_their_processes(port, store, job):
    said = []

    def part(file, rank, trouble):
        while not (line := trouble()):
            time.sleep(0.05)
        said.append(line)
        return -1

    helper = Helper(machine(1, port), store, part)
    others = nodes.Nodes(machine(0, port), store)
    others.start(job)
    time.sleep(0.3)
    assert others.trouble() is None
    others.peers[1].connection.close()
    assert helper.ended().startswith("machine 0 is gone; the same command on every machine continues")
    assert said == ["machine 0 is gone"]


def test_a_machine_that_goes_is_trouble(port, store, job):
    threading.Timer(0.5, lambda: nodes._introduced(machine(1, port), store)).start()
    others = nodes.Nodes(machine(0, port), store)
    others.start(job)
    assert others.finished() == "machine 1 is gone"


def test_machines_that_do_not_come_and_a_port_in_use_are_one_line(port, store, monkeypatch):
    monkeypatch.setattr(nodes, "MEETING", 0.3)
    with pytest.raises(UserError, match=r"^launch\.nodes=3: machines \[1, 2\] did not come$"):
        nodes.Nodes(machine(0, port, of=3), store)
    with pytest.raises(UserError, match=rf"^launch\.main_address=127\.0\.0\.1 launch\.main_port={port}: nobody there"):
        nodes.help_out(machine(1, port), store, None)
    with socket.create_server(("", port)), pytest.raises(UserError, match=rf"main_port={port}: Address already in use"):
        nodes.Nodes(machine(0, port), store)


SCONTROL = """#!/bin/sh
[ "$2" = hostnames ] && printf 'n1\\nn2\\n' || echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3"
"""


def test_machine_0_of_a_slurm_job_is_found_by_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"launch\.main_address: scontrol does not say it here; set it"):
        nodes.slurm_address()
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    assert nodes.slurm_address() == "10.0.0.7"


def test_a_machine_whose_part_does_not_end_is_trouble(port, store, job, monkeypatch):
    monkeypatch.setattr(nodes, "ENDING", 0.2)
    over = threading.Event()
    helper = Helper(machine(1, port), store, lambda *_: over.wait(20) and 0)
    with nodes.gathered(machine(0, port), store) as others:
        others.start(job)
        assert others.finished() == "machine 1 does not end"
    over.set()
    assert helper.ended() is None


@pytest.mark.slow
def test_two_machines_make_a_stage_as_one_process_does(smoke, tmp_path, port, capfd):
    shutil.copytree(smoke / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns("wandb", "dpo-*"))
    options = ["experiment=smoke", "tracker=none", "target=dpo", "dependents=false", "runtime.device=cpu"]
    options += ["launch=multi_node", "launch.processes=1", "launch.main_address=127.0.0.1", f"launch.main_port={port}"]
    command = [sys.executable, "-m", "threefold", "run", *options, f"runs={tmp_path}", "launch.node_rank=1"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    cli.main(["run", *options, f"runs={tmp_path}"])
    assert other.wait(60) == 0 and "takes part as machine 1" in other.stdout.read()
    assert "dpo          2 × 1 CPU threads, fp32 · ddp · " in capfd.readouterr().out
    logs = [read_lines(Path(runs) / "smoke/dpo/log.jsonl") for runs in (smoke, tmp_path)]
    ours, theirs = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert theirs == pytest.approx(ours, rel=1e-4)
    assert not list(tmp_path.glob("artifacts/*.work"))
