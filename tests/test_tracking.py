"""The step log holds each step once; W&B keeps one run per stage, never waits for a network and never fails a stage."""

import socket
import time

import pytest
from omegaconf import OmegaConf

from pipeline import tracking
from pipeline.artifact import read_lines
from pipeline.tracking import StepLog, WandbRun

OFFLINE = OmegaConf.create({"project": "threefold", "entity": None, "mode": "offline"})


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


def started(folder, tracker=OFFLINE):
    folder.mkdir(parents=True, exist_ok=True)
    return WandbRun(tracker, "sft", "demo", folder, OmegaConf.create({"sft": {"epochs": 1}}))


def test_an_offline_run_is_kept_beside_the_artifacts_and_a_resumed_stage_continues_it(tmp_path, capsys):
    checkpoints = tmp_path / "artifacts/sft-abc.work/checkpoints"
    ids = []
    for step in (1, 2):
        run = started(checkpoints)
        ids.append(run.run.id)
        assert (run.run.name, run.run.group, run.run.job_type) == ("demo/sft", "demo", "sft")
        assert run.run.config["sft"] == {"epochs": 1}
        run.log(step, {"loss": 1.0})
        run.summarise({"accuracy": 0.5})
        run.close()
    assert ids[0] == ids[1] == (checkpoints / "wandb-id.txt").read_text()
    kept = list((tmp_path / "artifacts/wandb").rglob(f"run-{ids[0]}.wandb"))
    assert kept and all(file.stat().st_size > 0 for file in kept)
    assert "W&B is off" not in capsys.readouterr().out


def test_two_stages_have_two_ids(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: options["id"])
    assert started(tmp_path / "a/b/c").run != started(tmp_path / "a/b/d").run


def test_a_start_that_fails_is_one_line_and_the_stage_goes_on(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(**options):
        raise wandb.errors.CommError("no route\nto the host")

    monkeypatch.setattr(wandb, "init", fail)
    run = started(tmp_path / "artifacts/x.work/checkpoints")
    run.log(1, {"loss": 1.0})
    run.summarise({"loss": 1.0})
    run.close()
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: no route\n"


@pytest.mark.parametrize("breaking", ["log", "summary", "finish"])
def test_a_call_that_fails_later_is_one_line_and_ends_tracking(breaking, tmp_path, monkeypatch, capsys):
    import wandb

    class Breaking:
        def __getattr__(self, name):
            if name == breaking:
                raise OSError("disk is full")
            return self if name == "summary" else lambda *arguments, **options: None

    monkeypatch.setattr(wandb, "init", lambda **options: Breaking())
    run = started(tmp_path / "artifacts/x.work/checkpoints")
    run.log(1, {"loss": 1.0})
    run.log(2, {"loss": 1.0})
    run.summarise({"loss": 1.0})
    run.close()
    run.close()
    assert capsys.readouterr().out == "W&B is off for the rest of this stage: disk is full\n"


def test_auto_without_a_key_is_offline_without_a_look_at_the_network(no_key, no_network):
    assert tracking._mode("auto") == "offline"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_mode_that_was_asked_for_is_taken_without_a_look_at_the_network(mode, monkeypatch, no_network):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert tracking._mode(mode) == mode


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_auto_with_a_key_and_a_host_that_does_not_answer_is_offline_soon(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    started = time.perf_counter()
    assert tracking._mode("auto") == "offline"
    assert time.perf_counter() - started < 3


def test_auto_with_a_key_and_a_host_that_answers_is_online(monkeypatch, no_key, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert tracking._mode("auto") == "offline"
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
        assert tracking._mode("auto") == "online"


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
    assert tracking._mode("auto") == "offline"
    assert tried == [asked]
