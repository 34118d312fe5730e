"""Several machines: meeting, taking part and parting over TCP; two of them on this host train as one process does."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline import cli, nodes
from pipeline.artifact import read_lines
from pipeline.errors import UserError


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def machine(rank: int, port: int, of: int = 2, processes: int = 2):
    found = {"mode": "ddp", "processes": processes, "nodes": of, "node_rank": rank}
    return OmegaConf.create(found | {"main_address": "127.0.0.1", "main_port": port})


class Helper(threading.Thread):
    """A machine other than 0, in a thread; `error` is the line that it ended with."""

    def __init__(self, launch, take_part=lambda file, rank, trouble: 0):
        super().__init__(daemon=True)
        self.launch, self.take_part, self.error = launch, take_part, None
        self.start()

    def run(self):
        try:
            nodes.help_out(self.launch, self.take_part)
        except UserError as error:
            self.error = str(error)

    def ended(self) -> str | None:
        self.join(20)
        assert not self.is_alive()
        return self.error


def test_all_machines_take_part_in_every_job_and_go_home(port, tmp_path, capsys):
    job, seen = tmp_path / "job.json", []
    job.touch()
    helpers = [
        Helper(machine(rank, port, of=3), lambda file, rank, trouble: seen.append((rank, file)) or 0) for rank in (2, 1)
    ]
    with nodes.gathered(machine(0, port, of=3)) as others:
        for _ in range(2):
            others.start(job)
            assert others.finished() is None
    assert [helper.ended() for helper in helpers] == [None, None]
    assert sorted(seen) == [(1, job), (1, job), (2, job), (2, job)]
    assert f"waits for 2 more machines at 127.0.0.1:{port}" in capsys.readouterr().out


def test_one_machine_waits_for_nobody():
    with nodes.gathered(machine(0, 1, of=1)) as others:
        assert others is None


def test_a_part_that_fails_is_trouble_and_the_error_reaches_all(port, tmp_path):
    job = tmp_path / "job.json"
    job.touch()
    helper = Helper(machine(1, port), lambda *_: 3)
    with pytest.raises(UserError, match="sft: no"), nodes.gathered(machine(0, port)) as others:
        others.start(job)
        said = others.finished()
        assert said == f"machine 1: its processes ended with status 3, see launch-1.txt in {tmp_path}"
        raise UserError("sft: no")
    assert helper.ended() == "machine 0 ended: sft: no"


def test_a_machine_in_another_folder_says_so(port, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "VISIBLE", 0.1)
    helper = Helper(machine(1, port))
    with nodes.gathered(machine(0, port)) as others:
        others.start(tmp_path / "job.json")
        assert "give the command in the folder that all machines share" in others.finished()
    assert helper.ended() is None


def test_a_machine_with_other_values_or_twice_the_same_is_sent_home(port):
    wrong, *both = Helper(machine(1, port, processes=4)), *(Helper(machine(1, port, of=3)) for _ in range(2))
    threading.Timer(2, lambda: Helper(machine(2, port, of=3))).start()
    with nodes.gathered(machine(0, port, of=3)):
        pass
    assert wrong.ended().endswith("launch.node_rank=1 launch.nodes=2 launch.processes=4: machine 0 has other values")
    lines = [helper.ended() for helper in both]
    assert None in lines and any(line and line.endswith("that machine is here already") for line in lines)


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\r\n", b"[1]\n", b""])
def test_whoever_else_connects_is_turned_away(line, port):
    def knock():
        stranger = nodes._met("127.0.0.1", port).connection
        stranger.sendall(line)
        stranger.shutdown(socket.SHUT_WR)
        Helper(machine(1, port))

    threading.Timer(0.2, knock).start()
    with nodes.gathered(machine(0, port)) as others:
        assert set(others.peers) == {1}


def test_when_machine_0_goes_the_others_end_their_processes(port, tmp_path):
    job, said = tmp_path / "job.json", []
    job.touch()

    def part(file, rank, trouble):
        while not (line := trouble()):
            time.sleep(0.05)
        said.append(line)
        return -1

    helper = Helper(machine(1, port), part)
    others = nodes.Nodes(machine(0, port))
    others.start(job)
    time.sleep(0.3)
    assert others.trouble() is None
    others.peers[1].connection.close()
    assert helper.ended().startswith("machine 0 is gone; the same command on every machine continues")
    assert said == ["machine 0 is gone"]


def test_a_machine_that_goes_is_trouble(port, tmp_path):
    connected = threading.Timer(0.5, lambda: nodes._met("127.0.0.1", port).say(node_rank=1, nodes=2, processes=2))
    connected.start()
    others = nodes.Nodes(machine(0, port))
    others.start(tmp_path / "job.json")
    assert others.finished() == "machine 1 is gone"


def test_machines_that_do_not_come_and_a_port_in_use_are_one_line(port, monkeypatch):
    monkeypatch.setattr(nodes, "MEETING", 0.3)
    with pytest.raises(UserError, match=r"^launch\.nodes=3: machines \[1, 2\] did not come$"):
        nodes.Nodes(machine(0, port, of=3))
    with pytest.raises(UserError, match=rf"^launch\.main_address=127\.0\.0\.1 launch\.main_port={port}: nobody there"):
        nodes.help_out(machine(1, port), None)
    with socket.create_server(("", port)), pytest.raises(UserError, match=rf"main_port={port}: Address already in use"):
        nodes.Nodes(machine(0, port))


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


def test_a_machine_whose_part_does_not_end_is_trouble(port, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "ENDING", 0.2)
    job, over = tmp_path / "job.json", threading.Event()
    job.touch()
    helper = Helper(machine(1, port), lambda *_: over.wait(20) and 0)
    with nodes.gathered(machine(0, port)) as others:
        others.start(job)
        assert others.finished() == "machine 1 does not end"
    over.set()
    assert helper.ended() is None


@pytest.mark.slow
def test_two_machines_make_a_stage_as_one_process_does(smoke, tmp_path, port, capfd):
    shutil.copytree(smoke / "artifacts", tmp_path / "artifacts", ignore=shutil.ignore_patterns("wandb", "dpo-*"))
    options = ["experiment=smoke", "tracker=none", "target=dpo", "dependents=false", "runtime.device=cpu"]
    options += ["launch=multi_node", "launch.processes=1", "launch.main_address=127.0.0.1", f"launch.main_port={port}"]
    command = [sys.executable, "-m", "pipeline", "run", *options, f"runs={tmp_path}", "launch.node_rank=1"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    cli.main(["run", *options, f"runs={tmp_path}"])
    assert other.wait(60) == 0 and "takes part as machine 1" in other.stdout.read()
    assert "dpo          2 × 1 CPU threads, fp32 · ddp · " in capfd.readouterr().out
    logs = [read_lines(Path(runs) / "smoke/dpo/log.jsonl") for runs in (smoke, tmp_path)]
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-4)
    assert not list(tmp_path.glob("artifacts/*.work"))
