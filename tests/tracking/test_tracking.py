"""The step log holds each step once; trackers work beside the stage, and neither block it nor fail it."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tracking_helpers import OFFLINE, about

from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.tracking import trackers
from threefold.tracking.trackers import Background, Histogram, StepLog, Table, Trackers, results


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("tried the network")

    for name in ("create_connection", "getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, refuse)


def test_the_step_log_is_json_lines_there_at_once(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    log.write(10, {"loss": 3.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10, "loss": 3.5}\n'
    log.write(20, {"loss": 2.5, "kl": 0.0})
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 10, "loss": 3.5}, {"step": 20, "loss": 2.5, "kl": 0.0}]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_rewind_drops_what_lies_after_the_checkpoint(tmp_path, step, kept):
    log = StepLog(tmp_path / "log.jsonl")
    for number in (10, 20, 30):
        log.write(number, {"loss": 1.0})
    log.rewind(step)
    assert [row["step"] for row in read_lines(log.file)] == kept


@pytest.mark.parametrize("cut", ['{"step": 20, "lo', '{"step": 5, "loss": 1.0}', "{"])
def test_rewind_drops_a_line_cut_short_and_writing_goes_on_below(tmp_path, cut):
    log = StepLog(tmp_path / "log.jsonl")
    log.write(10, {"loss": 3.0})
    with log.file.open("a") as stream:
        stream.write(cut)
    log.rewind(30)
    log.write(20, {"loss": 2.0})
    assert read_lines(log.file) == [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}]


def test_rewind_of_a_log_not_yet_written_writes_none(tmp_path):
    StepLog(tmp_path / "log.jsonl").rewind(10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "last"), [("", -1), ('{"step": 3}\n{"step": 5}\n{"step": 7', 5)])
def test_the_last_step_is_that_of_the_last_whole_line(tmp_path, text, last):
    (tmp_path / "log.jsonl").write_text(text)
    assert StepLog(tmp_path / "log.jsonl").last() == last


# A tracker in the background


class Fake:
    """A tracker that writes down what it is asked, and does `trouble` when asked for it."""

    def __init__(self, trouble=None):
        self.calls, self.trouble = [], trouble or {}

    def __getattr__(self, name):
        def call(*arguments, **_):
            self.calls.append((name, *arguments))
            self.trouble.get(name, lambda: None)()

        return call


def failing(error):
    def fail():
        raise error

    return fail


def test_calls_reach_the_tracker_in_order_and_close_waits_for_them():
    fake = Fake({"log": lambda: time.sleep(0.05)})
    tracker = Background("fake", lambda: fake)
    started = time.perf_counter()
    for step in range(3):
        tracker.call("log", step, {})
    assert time.perf_counter() - started < 0.04
    tracker.close(5)
    assert fake.calls == [("log", 0, {}), ("log", 1, {}), ("log", 2, {}), ("close",)]


def test_a_start_that_fails_is_one_line_and_the_stage_goes_on(capsys):
    tracker = Background("W&B", failing(OSError("no route\nto the host")))
    tracker.thread.join(5)
    tracker.call("log", 1, {})
    tracker.close(5)
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: no route\n"


@pytest.mark.parametrize("breaking", ["log", "finish", "close"])
def test_a_call_that_fails_later_is_one_line_and_ends_tracking(breaking, capsys):
    fake = Fake({breaking: failing(OSError("disk is full"))})
    tracker = Background("W&B", lambda: fake)
    for method in ("log", "log", "finish"):
        tracker.call(method)
    tracker.close(5)
    tracker.close(5)
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: disk is full\n"
    assert [call[0] for call in fake.calls].count("close") == 1 and fake.calls[-1] == ("close",)


def test_a_tracker_that_hangs_is_left_alone_in_time(capsys):
    for_ever = threading.Event()
    tracker = Background("W&B", lambda: Fake({"close": for_ever.wait}))
    started = time.perf_counter()
    tracker.close(0.2)
    assert time.perf_counter() - started < 2
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: did not finish within 0.2 s\n"
    for_ever.set()


def test_a_tracker_that_hangs_at_its_start_costs_no_memory_without_end(capsys, monkeypatch):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    for_ever = threading.Event()
    tracker = Background("W&B", lambda: for_ever.wait() and Fake())
    for step in range(10):
        tracker.call("log", step, {})
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: is 3 calls behind\n"
    for_ever.set()


# What trackers are given


def test_metrics_are_named_by_stage_with_their_axis_and_a_resumed_stage_repeats_none(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(trackers, "_start", lambda *_: Background("fake", lambda: fake))
    running = Trackers(OmegaConf.create({"kinds": ["wandb"]}), about(tmp_path), last_tracked=1)
    for step in (1, 2):
        running.log(step, {"kl": 0.5}, {"rollout": step})
    running.show({"samples": 3}, 2)
    running.show({"probes": 4})
    running.close()
    assert fake.calls[:-1] == [
        ("log", 2, {"ppo/rollout": 2, "ppo/kl": 0.5}),
        ("log", 2, {"ppo/rollout": 2, "ppo/samples": 3}),
        ("log", 2, {"ppo/rollout": 2, "ppo/probes": 4}),
    ]


def test_variants_of_a_run_are_one_group(tmp_path):
    assert (about(tmp_path).group, about(tmp_path).name) == ("demo", "demo/variants/a/ppo")
    assert (about(tmp_path).axis, about(tmp_path, "pretrain").axis, about(tmp_path, "dpo").axis) == (
        "ppo/rollout", "pretrain/tokens", "dpo/optimiser_step",
    )  # fmt: skip


def test_a_table_stays_one_in_markdown():
    table = Table(("a", "b"), [("x|y\nz", 0.123456)])
    assert table.markdown() == "| a | b |\n| --- | --- |\n| x\\|y<br>z | 0.1235 |"


def test_a_histogram_of_ratios_that_are_all_but_1_is_made():
    ratios = np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(1), np.float32(0))])
    found = Histogram.of(ratios.astype(np.float32))
    assert found.counts.sum() == 3 and (np.diff(found.edges) > 0).all()


def test_a_histogram_counts_what_is_finite():
    found = Histogram.of(np.array([0.0, 1.0, 1.0, np.nan, np.inf], dtype=np.float32))
    assert (found.counts.sum(), found.counts[0], found.counts[-1]) == (3, 1, 2)
    assert len(found.edges) == len(found.counts) + 1


def test_results_are_single_numbers_and_words_by_their_path():
    metrics = {"a": 1, "b": {"c": 0.5, "d": {"e": "x"}}, "list": [1, 2], "none": None}
    assert results(metrics).rows == [("a", 1), ("b.c", 0.5), ("b.d.e", "x")]


# Which trackers, and in which mode


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracker.kinds=[wandv]", r"tracker\.kinds: wandv must be one of wandb, trackio, tensorboard \(nearest: wandb"),
        ("tracker.kinds=[wandb,wandb]", r"tracker\.kinds=\['wandb', 'wandb'\]: names one twice"),
        (f"tracker.tags=[{'x' * 65}]", r"tracker\.tags: x+… is longer than the 64 characters"),
        ("tracker.samples=-1", r"tracker\.samples=-1: must be at least 0"),
    ],
)
def test_a_wrong_tracker_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        compose([override])


def test_several_trackers_are_a_list_and_each_choice_of_the_group_is_one():
    assert compose(["tracker.kinds=[wandb,trackio]"]).tracker.kinds == ["wandb", "trackio"]
    files = (Path(__file__).parents[2] / "conf/tracker").glob("*.yaml")
    kinds = {file.stem: list(OmegaConf.load(file).kinds) for file in files}
    assert kinds == {"wandb": ["wandb"], "trackio": ["trackio"], "tensorboard": ["tensorboard"], "none": []}


def test_offensive_text_is_not_tracked():
    assert compose(["experiment=demo"]).tracker.samples > 0
    assert compose(["experiment=hh"]).tracker.samples == 0


def test_a_package_that_is_not_installed_is_one_line_before_any_stage(monkeypatch, tmp_path, capsys):
    from threefold import cli

    monkeypatch.setitem(trackers.KINDS, "trackio", ("trackio", "module", "Class", "not_there"))
    with pytest.raises(SystemExit):
        cli.main(["run", "experiment=smoke", "tracker=trackio", f"runs={tmp_path}/runs"])
    said = "error: tracker.kinds: not_there is not installed; install it (pip install not-there)\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "runs").exists()


def test_online_without_a_key_is_refused_before_any_stage(no_key):
    with pytest.raises(UserError, match=r"tracker\.mode=online: no W&B key; run `wandb login`"):
        trackers.require(compose(["tracker.mode=online"]).tracker)


def test_auto_without_a_key_is_offline_without_a_look_at_the_network(no_key, no_network):
    assert trackers.mode("auto") == "offline"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_mode_that_was_asked_for_is_taken_without_a_look_at_the_network(mode, monkeypatch, no_network):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert trackers.mode(mode) == mode


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_auto_with_a_key_and_a_host_that_does_not_answer_is_offline_soon(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    started = time.perf_counter()
    assert trackers.mode("auto") == "offline"
    assert time.perf_counter() - started < 3


def test_auto_with_a_key_and_a_host_that_answers_is_online(monkeypatch, no_key, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
        assert trackers.mode("auto") == "offline"
        for machine, mode in (("api.wandb.ai", "offline"), (host, "online")):
            (tmp_path / "netrc").write_text(f"machine {machine} login user password key\n")
            assert trackers.mode("auto") == mode


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("https://wandb.example", ("wandb.example", 443)),
        ("http://wandb.example:8080", ("wandb.example", 8080)),
        ("http://wandb.example", ("wandb.example", 80)),
    ],
)
def test_the_host_is_asked_at_the_port_of_its_address(address, asked, monkeypatch):
    tried = []

    def refuse(place, timeout):
        tried.append(place)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert trackers.mode("auto") == "offline"
    assert tried == [asked]


# W&B itself, offline


def run_wandb(folder, known=-1, **changed):
    found = Trackers(OmegaConf.create(OFFLINE | {"kinds": ["wandb"]} | changed), about(folder), known)
    found.log(known + 1, {"kl": 1.0}, {"rollout": known + 1})
    found.finish({"score": 0.5}, folder)
    found.close()


def test_a_resumed_stage_continues_its_run(tmp_path, capsys):
    for known in (-1, 0):
        run_wandb(tmp_path, known)
    identity = (about(tmp_path).checkpoints / "wandb-id.txt").read_text()
    kept = list((tmp_path / "artifacts/wandb").rglob("run-*.wandb"))
    assert len(kept) == 2 and {file.name for file in kept} == {f"run-{identity}.wandb"}
    assert capsys.readouterr().out == ""


def test_a_dead_network_with_a_key_leaves_an_offline_run(tmp_path, monkeypatch, capsys):
    """W&B is asked for online although nothing answers, as when the network goes after the probe."""
    from threefold.tracking import wandb_run

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_run, "START_SECONDS", 1)
    started = time.perf_counter()
    run_wandb(tmp_path, mode="online")
    assert time.perf_counter() - started < 30
    said = capsys.readouterr().out
    assert said.startswith("W&B is offline for this stage (") and said.count("\n") == 1
    assert list((tmp_path / "artifacts/wandb").rglob("offline-run-*/run-*.wandb"))


def test_tracking_draws_no_random_number(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_wandb(tmp_path)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("upload", [False, True])
def test_online_a_run_has_parents_an_artifact_and_alerts(tmp_path, monkeypatch, upload):
    import wandb

    from threefold.tracking import wandb_run

    fake, given = Fake({"use_artifact": failing(ValueError("no such artifact"))}), {}
    fake.summary = type("Summary", (), {"update": lambda self, metrics: given.update(metrics)})()
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or fake)
    for name in ("config.yaml", "metrics.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    tracker = OmegaConf.create(OFFLINE | {"mode": "online", "upload": upload})
    run = wandb_run.WandbRun(tracker, about(tmp_path))
    run.alert("PPO stopped", "kl 9 is above ppo.max_kl=8")
    run.finish({"score": 0.5}, tmp_path)
    run.close()
    assert (given["group"], given["job_type"], given["score"]) == ("demo", "ppo", 0.5)
    assert given["config"]["lineage"] == {"fingerprint": "abc", "parents": {"sft": "123"}}
    assert given["tags"][:2] == ["x", "ppo"]
    calls = {name: arguments for name, *arguments in fake.calls}
    assert calls["use_artifact"] == ["sft:123"] and calls["alert"][0] == "PPO stopped"
    (artifact,) = calls["log_artifact"]
    assert (artifact.name, artifact.type, artifact.metadata["parents"]) == ("ppo", "model", {"sft": "123"})
    assert ("model.safetensors" in artifact.manifest.entries) == upload


def test_data_that_did_not_get_out_is_marked_for_sync(tmp_path, monkeypatch):
    import wandb

    from threefold.tracking import wandb_run

    fake = Fake()
    fake.settings = type("Settings", (), {"sync_dir": str(tmp_path)})()
    monkeypatch.setattr(wandb, "init", lambda **options: fake)
    run = wandb_run.WandbRun(OmegaConf.create(OFFLINE), about(tmp_path))
    fake.finish = lambda exit_code: failing(TimeoutError("Timed out finishing run."))()
    with pytest.raises(TimeoutError):
        run.close()
    assert (tmp_path / "unsent.txt").exists()


# A full disk


TRACK_AND_COUNT = """
import json, subprocess, sys, time
from pathlib import Path
from omegaconf import OmegaConf
sys.path.insert(0, {tests!r})
from tracking_helpers import OFFLINE, about
from threefold.tracking.trackers import Table
from threefold.tracking.trackers import Trackers

folder, full, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
places = [folder / "artifacts" / kind for kind in kinds]
for place in places:
    place.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).returncode:
        sys.exit(77)
try:
    def fill():
        for place in places:
            try:
                with (place / "fill").open("wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
            except OSError:
                pass

    if full == "before":
        fill()
    trackers, slowest = Trackers(OmegaConf.create(OFFLINE | {{"kinds": kinds}}), about(folder)), 0.0
    for step in range(200):
        if step == 20 and full == "meanwhile":
            time.sleep(2)
            fill()
        started = time.perf_counter()
        trackers.log(step, {{"loss": 1.0, "table": Table(("text",), [("x" * 1000,)])}}, {{"rollout": step}})
        slowest = max(slowest, time.perf_counter() - started)
    trackers.finish({{"score": 1.0}}, folder)
    trackers.close()
    print(json.dumps({{"steps": step + 1, "slowest": slowest}}))
finally:
    for place in places:
        subprocess.run(["umount", "-l", place])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize(("full", "kinds"), [("before", ["wandb", "trackio"]), ("meanwhile", ["wandb"])])
def test_a_full_disk_leaves_training_untouched(full, kinds, tmp_path):
    for kind in kinds:
        pytest.importorskip(kind)
    code = TRACK_AND_COUNT.format(tests=str(Path(__file__).parents[1] / "support"))
    command = [sys.executable, "-c", code, tmp_path, full, *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("no disk can be mounted here")
    *said, counted = done.stdout.splitlines()
    assert json.loads(counted)["steps"] == 200 and json.loads(counted)["slowest"] < 1, done.stderr
    assert len(said) == len(kinds) and done.stderr == ""
    assert all("is off for the rest of this stage: [Errno 28] No space left" in line for line in said)
