"""Several processes: shares and what is brought together, and PPO on two processes against one, end to end."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from helpers import PROMPTS, make_ppo, tiny_tokenizer
from omegaconf import OmegaConf
from safetensors.torch import load_file

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.execution import launch, ranks, worker
from threefold.fileio import read_json, read_lines
from threefold.ppo import rollouts
from threefold.ppo.rollouts import Rollout
from threefold.stages import ppo


def process(rank: int, processes: int) -> SimpleNamespace:
    """What shares ask of an accelerator."""
    found = {"process_index": rank, "num_processes": processes, "device": torch.device("cpu")}
    return SimpleNamespace(**found, autocast=contextlib.nullcontext)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_shares_are_the_whole_in_order(rows, processes):
    parts = [ranks.share(list(range(rows)), process(rank, processes)) for rank in range(processes)]
    assert ranks.in_order(parts) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tensors = [ranks.share(torch.arange(rows), process(rank, processes)).tolist() for rank in range(processes)]
    assert tensors == parts


def test_one_process_has_everything_already():
    accelerator, weight = Accelerator(cpu=True), torch.ones(3, requires_grad=True)
    weight.grad = torch.full((3,), 2.0)
    ranks.sum_gradients([weight], accelerator)
    assert weight.grad.tolist() == [2.0] * 3
    assert ranks.gathered([3, 4], accelerator) == [3, 4]
    assert ranks.summed({"a": 1.5}, accelerator) == {"a": 1.5}
    assert ranks.highest(2.5, accelerator) == 2.5 and ranks.decided("stop", accelerator) == "stop"


def test_a_missing_gradient_counts_as_zero_in_the_sum():
    first, second = (torch.ones(shape, requires_grad=True) for shape in (2, (2, 2)))
    second.grad = torch.arange(4.0).view(2, 2)
    accelerator = process(0, 2)
    accelerator.reduce = lambda flat, how: {"sum": flat + 10}[how]
    ranks.sum_gradients([first, second], accelerator)
    assert first.grad.tolist() == [10.0, 10.0] and second.grad.tolist() == [[10.0, 11.0], [12.0, 13.0]]


def same(ours: Rollout, theirs: Rollout, **tolerance: float) -> None:
    for field in fields(Rollout):
        torch.testing.assert_close(getattr(ours, field.name), getattr(theirs, field.name), **tolerance)


def test_single_replies_joined_are_the_rollout_that_they_come_from(tmp_path):
    whole = ppo.roll_out(make_ppo(tmp_path, 12), PROMPTS, 0)
    singles = [whole.take(torch.tensor([row])) for row in range(len(whole))]
    assert len({part.reply.size(1) for part in singles}) > 1 and len({part.prompt.size(1) for part in singles}) > 1
    same(rollouts.joined(singles, tiny_tokenizer().pad_token_id), whole, rtol=0, atol=0)


def test_shares_of_a_rollout_joined_are_the_rollout_collected_at_once(tmp_path, monkeypatch):
    made, shares = make_ppo(tmp_path, 12), {}
    whole = ppo.roll_out(made, PROMPTS, 0)

    def kept(rows, accelerator):
        shares[accelerator.process_index] = rows
        return rows

    monkeypatch.setattr(ranks, "gathered", kept)
    for rank in range(5):
        made.accelerator = process(rank, 5)
        ppo.roll_out(made, PROMPTS, 0)
    assert [len(shares[rank]) for rank in range(5)] == [3, 3, 2, 2, 2]
    joined = rollouts.joined(ranks.in_order([shares[rank] for rank in range(5)]), tiny_tokenizer().pad_token_id)
    same(joined, whole, rtol=1e-4, atol=1e-4)


def test_only_stages_that_can_are_started_in_several_processes(tmp_path, monkeypatch):
    options = ["experiment=smoke", "launch=ddp", "tracker=none", "runtime.device=cpu", f"runs={tmp_path}"]
    config, tasks = compose(options), []
    planned = chain.plan(config)
    monkeypatch.setattr(launch, "run", lambda task, work, others: tasks.append(task) or {"seconds": 1})
    monkeypatch.setitem(sys.modules, "threefold.stages.comparisons", SimpleNamespace(run=lambda job: {"pairs": 5}))
    for stage in ("comparisons", "ppo"):
        assert chain.make(config, planned[stage], planned)
    (task,) = tasks
    assert (task.stage, task.processes) == ("ppo", 2) and set(task.inputs) == {"sft", "reward"}
    assert task.config == OmegaConf.to_container(chain.view(config, "ppo"))
    assert read_json(planned["ppo"].artifact.folder / "manifest.json")["seconds"] == 1


# The driver's side, with small programs in place of the launcher

TASK = launch.Task("ppo", {}, {}, "out", "checkpoints", "abc", 2)
WORK = "import pathlib, json, sys, os; work = pathlib.Path(sys.argv[1]); "


def launched(monkeypatch, tmp_path, code: str):
    monkeypatch.setattr(launch, "_command", lambda task, rank, file: [sys.executable, "-c", WORK + code, tmp_path])
    return launch.run(TASK, tmp_path)


def test_the_result_is_what_the_main_process_left(monkeypatch, tmp_path):
    (tmp_path / "error.json").write_text("an earlier attempt's")
    code = "task = json.loads((work / 'job.json').read_text()); (work / 'result.json').write_text(json.dumps(task))"
    assert launch.Task(**launched(monkeypatch, tmp_path, code)) == TASK == launch.read(tmp_path / "job.json")


def test_processes_see_the_gpus_that_the_person_shows_them(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as an earlier stage in this process leaves it
    code = "(work / 'result.json').write_text(json.dumps(os.environ.get('CUDA_VISIBLE_DEVICES')))"
    assert launched(monkeypatch, tmp_path, code) == launch.GPUS
    monkeypatch.setattr(launch, "GPUS", "2,3")
    assert launched(monkeypatch, tmp_path, code) == "2,3"


def test_of_two_errors_the_first_is_raised(monkeypatch, tmp_path):
    code = (
        "from threefold.execution import launch; from threefold.errors import UserError\n"
        "for error in (UserError('first'), ValueError('second')): launch.report(error, work)\n"
        "sys.exit(1)"
    )
    with pytest.raises(UserError, match=r"^first$"):
        launched(monkeypatch, tmp_path, code)


def test_an_unexpected_error_comes_with_its_traceback(monkeypatch, tmp_path):
    code = "from threefold.execution import launch\ntry: 1 / 0\nexcept Exception as e: launch.report(e, work)"
    with pytest.raises(RuntimeError, match=r"^division by zero\nTraceback(.|\n)*ZeroDivisionError"):
        launched(monkeypatch, tmp_path, code)


@pytest.mark.parametrize("code", ["os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_processes_that_end_without_a_word_are_an_error(monkeypatch, tmp_path, code):
    with pytest.raises(UserError, match=r"ppo: one of its processes was ended from outside, see .*launch-0\.txt"):
        launched(monkeypatch, tmp_path, code)


def test_an_interrupted_driver_ends_its_processes(monkeypatch, tmp_path):
    original, started = subprocess.Popen.wait, []

    def interrupted(self, timeout=None):
        if not started:
            started.append(self)
            raise KeyboardInterrupt
        return original(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launched(monkeypatch, tmp_path, "sys.stdin.read()")
    assert started[0].returncode == 0  # its standard input ended


def test_another_mode_than_the_one_asked_for_is_an_error(tmp_path):
    right = SimpleNamespace(num_processes=2, distributed_type=SimpleNamespace(name="MULTI_CPU"), backend="gloo")
    worker.require_processes(right, "cpu", TASK)
    config = OmegaConf.to_container(chain.view(compose(["experiment=smoke", "runtime.device=cpu"]), "ppo"))
    task = launch.Task("ppo", config, {}, str(tmp_path), str(tmp_path), "abc", 2)
    with pytest.raises(UserError, match=r"^launch\.mode=ddp: accelerate set up 1 NO None instead of 2 MULTI_CPU"):
        worker.run(task, 0)  # in this one process


# The real thing: PPO in two processes over gloo

PPO = ["experiment=smoke", "tracker=none", "target=ppo", "runtime.device=cpu", "runtime.log_every=1"]


@pytest.fixture
def places(smoke, tmp_path) -> tuple[Path, Path]:
    """Two `runs` folders that lack nothing but PPO: one for one process, one for two."""
    for name in ("one", "two"):
        ignored = shutil.ignore_patterns("wandb", "ppo-*", "evaluate-*")
        shutil.copytree(smoke / "artifacts", tmp_path / name / "artifacts", ignore=ignored)
    return tmp_path / "one", tmp_path / "two"


def movement(runs: Path, smoke: Path, name: str, start: str) -> torch.Tensor:
    """Trained weights less those that they started from, as one vector."""
    trained, before = load_file(runs / "smoke/ppo" / name), load_file(smoke / "smoke" / start / "model.safetensors")
    return torch.cat([(trained[key] - before.get(key, 0)).flatten() for key in sorted(trained)])


def agree(one: Path, two: Path, smoke: Path) -> list[dict]:
    """Hold two runs of PPO to each other: log, results and weights; returns the log."""

    def stable(metrics: dict) -> dict:
        kept = {k: v for k, v in metrics.items() if "second" not in k and k != "peak_memory_bytes"}
        return {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in kept.items()}

    logs = [read_lines(runs / "smoke/ppo/log.jsonl") for runs in (one, two)]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*logs, strict=True):
        assert stable(theirs).keys() == stable(ours).keys()
        assert {k: v for k, v in theirs.items() if k in stable(ours)} == stable(ours)
    results = [read_json(runs / "smoke/ppo/metrics.json") for runs in (one, two)]
    assert {k: v for k, v in results[1].items() if k in stable(results[0])} == stable(results[0])
    for name, start in (("model.safetensors", "sft"), ("critic/model.safetensors", "reward")):
        ours, theirs = (movement(runs, smoke, name, start) for runs in (one, two))
        assert ours.norm() > 0 and (ours - theirs).norm() < 1e-3 * ours.norm(), name
    return logs[0]


@pytest.mark.slow
def test_two_processes_killed_and_continued_give_the_update_of_one(smoke, places):
    one, two = places
    options = [*PPO, "runtime.checkpoints=8", "ppo.batch_size=14", "ppo.episodes=84", "ppo.kl_controller=adaptive"]
    options += ["ppo.learning_rate=0.002", "ppo.reference_sync_every=3", "ppo.whiten_rewards=true"]
    options += ["reward@ppo.reward=learned_brief"]  # of which a part is normalised over the replies of all processes
    cli.main(["run", *options, f"runs={one}"])
    kill_after_first_checkpoint([*options, "launch=ddp", f"runs={two}"], two)
    assert not (two / "smoke/ppo").exists(), "the stage had finished before it was killed"
    cli.main(["run", *options, "launch=ddp", f"runs={two}"])
    log = agree(one, two, smoke)
    assert len(log) == 6 and log[-1]["kl"] > 0.01
    manifest = read_json(two / "smoke/ppo/manifest.json")
    assert manifest["environment"]["device"] == "2 × 1 CPU threads, fp32"
    assert not list(two.glob("artifacts/*.work"))


def kill_after_first_checkpoint(options: list[str], runs: Path) -> None:
    """Kill the driver with SIGKILL; every process that it started must end as well."""
    driver = subprocess.Popen([sys.executable, "-m", "threefold", "run", *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        if list(runs.glob("artifacts/ppo-*.work/checkpoints/rollout-*[0-9]/state.json")):
            break
        time.sleep(0.01)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(started) >= 3, "the launcher and two workers"
    assert psutil.wait_procs(started, timeout=20)[1] == []


@pytest.mark.slow
def test_ranks_without_rows_and_a_guard_that_rolls_back_stay_in_step(smoke, places, capfd):
    one, two = places
    options = [*PPO, "runtime.checkpoints=3", "ppo.batch_size=3", "ppo.minibatches=3", "ppo.episodes=24"]
    options += ["ppo.max_kl=0.2", "ppo.on_trip=rollback", "ppo.learning_rate=0.0003"]
    cli.main(["run", *options, f"runs={one}"])
    cli.main(["run", *options, "launch=ddp", f"runs={two}"])
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("ppo ") and "stopped" in line]
    assert len(said) == 2 and said[0] == said[1] and "back to the policy of rollout 1" in said[0]
    assert len(agree(one, two, smoke)) == 2


@pytest.mark.slow
def test_adapters_shared_trunk_and_pretraining_text_agree_up_to_a_guard_that_stops(smoke, places, capfd):
    one, two = places
    options = [*PPO, "ppo.critic=shared", "ppo.lora_rank=4", "ppo.ptx_coef=0.5", "ppo.ptx_batch_size=3"]
    options += ["ppo.ptx_context=32", "ppo.max_kl=0.8", "ppo.learning_rate=0.005", "ppo.batch_size=10"]
    options += ["ppo.epochs=1", "ppo.episodes=40"]
    cli.main(["run", *options, f"runs={one}"])
    cli.main(["run", *options, "launch=ddp", f"runs={two}"])
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("ppo ") and "stopped" in line]
    assert len(said) == 2 and said[0] == said[1] and "the policy stays as it is" in said[0]
    assert len(agree(one, two, smoke)) == 3


FUNCTION = """
import os

def score(prompts, completions, **columns):
    return [None if os.environ.get("RANK") == "1" else float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_the_error_of_one_rank_ends_all_with_its_one_line(places, tmp_path, monkeypatch, capfd):
    (tmp_path / "ranked.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    runs, options = places[1], [*PPO, "launch=ddp", "ppo.reward.function=ranked:score"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", *options, f"runs={runs}"])
    shown = capfd.readouterr()
    line = shown.err.removeprefix("error: ").removesuffix("\n")
    assert re.fullmatch(r"ranked:score: gives no score \(None\) to row 1, .*; PPO needs a reward that .* all", line)
    assert ended.value.code == 2 and "Traceback" not in shown.out
    (work,) = runs.glob("artifacts/ppo-*.work")
    assert (work / "failed.txt").read_text() == f"{line}\n" and json.loads((work / "error.json").read_text())["user"]
    assert not (runs / "smoke/ppo").exists() and not (work / "out/metrics.json").exists()
