"""Every training stage in several processes against one: the same losses, whatever the processes hold of the model."""

import filecmp
import importlib.util
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from stage_worker import measure_nothing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from threefold import chain
from threefold.config.checks import check_shares
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.execution import device, launch, ranks
from threefold.execution.job import Job, execute
from threefold.fileio import read_json, read_lines, write_json
from threefold.stages import parents
from threefold.training import hf_trainer
from threefold.training.packing import EvenedRows, PackedRows

# stage → overrides that give it at least 20 steps
STAGES = {
    "pretrain": [],
    "sft": [],
    "reward": ["reward.epochs=2", "reward.label_smoothing=0.1"],
    "dpo": ["dpo.epochs=2"],
}
OPTIONS = ["experiment=smoke", "tracker=none", "runtime.device=cpu", "runtime.log_every=1"]
OPTIONS += [option for options in STAGES.values() for option in options]


def tasks(smoke: Path, folder: Path, stages: list[str], options: list[str], processes: int, mode: str):
    """What each stage's processes are told; the parents are those of the smoke run."""
    config = compose([*OPTIONS, *options])
    for stage in stages:
        out, checkpoints = folder / stage, folder / f"{stage}.checkpoints"
        for made in (out, checkpoints):
            made.mkdir(parents=True, exist_ok=True)
        inputs = {parent: str(smoke / "smoke" / parent) for parent in parents(stage, config)}
        seen = OmegaConf.to_container(chain.view(config, stage))
        yield launch.Task(stage, seen, inputs, str(out), str(checkpoints), "abc", processes, mode)


def alone(smoke: Path, folder: Path, stages: list[str], options: list[str], monkeypatch) -> Path:
    """The stages trained in this process."""
    measure_nothing(monkeypatch.setattr)
    for task in tasks(smoke, folder, stages, options, 1, "single"):
        config, inputs = OmegaConf.create(task.config), {name: Path(place) for name, place in task.inputs.items()}
        execute(Job(task.stage, config, inputs, Path(task.out), Path(task.checkpoints)), "abc")
    return folder


def together(
    smoke: Path, folder: Path, stages: list[str], options: list[str], monkeypatch, processes: int = 2, mode: str = "ddp"
) -> Path:
    """The stages trained in several processes."""
    monkeypatch.setattr(launch, "WORKER", "stage_worker")
    paths = [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    files = []
    for task in tasks(smoke, folder, stages, options, processes, mode):
        files.append(str(folder / f"{task.stage}.json"))
        write_json(Path(files[-1]), asdict(task))
    (folder / "jobs.json").write_text(json.dumps(files))
    status = launch._wait(launch._command(task, 0, folder / "jobs.json"), folder / "log.txt", lambda: None)
    error = folder / "error.json"
    assert status == 0, read_json(error)["traceback"] if error.exists() else (folder / "log.txt").read_text()
    return folder


@pytest.fixture(scope="module")
def once():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def one(smoke, tmp_path_factory, once) -> Path:
    return alone(smoke, tmp_path_factory.mktemp("one"), list(STAGES), [], once)


@pytest.fixture(scope="module")
def shared(smoke, tmp_path_factory, once) -> Path:
    return together(smoke, tmp_path_factory.mktemp("shared"), list(STAGES), [], once, mode="fsdp2")


def agree(ours: Path, theirs: Path, stage: str, leaving: str | None = None) -> None:
    """Hold the step logs of two folders to each other: the loss to 1e-4, and every other metric to 1e-3."""
    logs = [read_lines(folder / stage / "log.jsonl") for folder in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) >= 20
    for mine, other in zip(*logs, strict=True):
        assert mine.pop(leaving, None) is None or other.pop(leaving) > 0
        assert mine.get("loss") == pytest.approx(other.get("loss"), rel=1e-4), f"step {mine['step']}"
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


def moved(folder: Path, stage: str, start: Path) -> torch.Tensor:
    """Trained weights less those that they started from, as one vector."""
    trained, before = load_file(folder / stage / "model.safetensors"), load_file(start)
    return torch.cat([(trained[name] - before.get(name, 0)).flatten() for name in sorted(trained)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(stage, smoke, tmp_path, monkeypatch):
    one = alone(smoke, tmp_path / "one", [stage], [], monkeypatch)
    agree(one, together(smoke, tmp_path / "two", [stage], [], monkeypatch), stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_processes_that_share_the_model_train_as_one_and_leave_a_whole_model(stage, one, shared, smoke):
    agree(one, shared, stage)
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model, loading = kind.from_pretrained(shared / stage, output_loading_info=True)
    assert not any(loading.values()) and all(p.dtype == torch.float32 for p in model.parameters())
    assert {f.name for f in (shared / stage).iterdir()} == {f.name for f in (one / stage).iterdir()}
    start = smoke / "smoke" / ("pretrain" if stage == "sft" else "sft") / "model.safetensors"
    ours, theirs = moved(one, stage, start), moved(shared, stage, start)
    assert ours.norm() > 0 and (ours - theirs).norm() < 1e-2 * ours.norm()


@pytest.mark.slow
def test_three_processes_with_batches_that_they_cannot_share_alike_train_as_one(smoke, tmp_path, monkeypatch):
    options = ["sft.batch_size=2", "sft.examples=48"]  # sft: fewer rows than processes; pretrain: eight rows for three
    ours = alone(smoke, tmp_path / "one", ["pretrain", "sft"], options, monkeypatch)
    agree(ours, together(smoke, tmp_path / "three", ["pretrain", "sft"], options, monkeypatch, 3), "pretrain")
    agree(ours, tmp_path / "three", "sft", leaving="num_tokens")  # which counts the rows without labels


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_stages_continue_from_a_checkpoint_to_the_same_bits(mode, smoke, tmp_path, monkeypatch):
    folder = together(smoke, tmp_path / "run", list(STAGES), ["runtime.checkpoints=1"], monkeypatch, mode=mode)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(folder, undisturbed)
    for stage in STAGES:
        shutil.rmtree(folder / stage)
        (folder / stage).mkdir()
        shutil.copy(undisturbed / stage / "log.jsonl", folder / stage)
        place = folder / f"{stage}.checkpoints" / ("0" if stage == "reward" else "")
        (place / "done").unlink(missing_ok=True)
        last = hf_trainer.last_checkpoint(place)
        (Path(last) / hf_trainer.COMPLETE).unlink()  # as if it had been killed while it wrote this one
    together(smoke, folder, list(STAGES), ["runtime.checkpoints=1"], monkeypatch, mode=mode)
    for stage in STAGES:
        ours, theirs = folder / stage, undisturbed / stage
        assert filecmp.cmp(ours / "model.safetensors", theirs / "model.safetensors", shallow=False), stage
        logs = [[line | {"num_tokens": 0} for line in read_lines(place / "log.jsonl")] for place in (ours, theirs)]
        assert logs[0] == logs[1]  # but for TRL's own count, which begins anew


def test_a_batch_is_filled_up_so_that_all_processes_take_as_many():
    assert ranks.evened([1, 2, 3, 4], 2, 2, None) == [1, 2, 3, 4]
    assert ranks.evened([1, 2, 3, 4, 5], 2, 3, None) == [1, 2, None, 3, 4, None, 5, None, None]
    assert ranks.evened([1, 2, 3], 8, 2, None) == [1, 2, 3, *[None] * 5]


def test_rows_of_pretraining_keep_their_batches_and_count_only_once():
    rows = PackedRows(np.arange(35, dtype=np.uint16), 5)
    evened = EvenedRows(rows, 3, 2)  # batches of 3, 3 and 1 rows, to be shared by two
    assert len(evened) == 12
    labels = [evened[i]["labels"] for i in range(12)]
    assert [row[0].item() for row in labels] == [0, 5, 10, -100, 15, 20, 25, -100, 30, -100, -100, -100]
    assert all(len(evened[i]["input_ids"]) == 5 for i in range(12))


def test_passes_of_all_processes_make_up_a_batch():
    def shares(batch_size, processes, micro):
        config = compose(["experiment=smoke", f"runtime.micro_batch_size={micro}"])
        job = SimpleNamespace(config=config, checkpoints=Path("x"), device=device.Device("cpu", False, 1, processes))
        found = hf_trainer.arguments(job, batch_size, 10, 1)
        return found["per_device_train_batch_size"], found["gradient_accumulation_steps"]

    assert shares(8, 1, "null") == (8, 1) and shares(8, 1, 2) == (2, 4)
    assert shares(8, 2, "null") == (4, 1) and shares(8, 2, 2) == (2, 2) and shares(8, 3, "null") == (3, 1)
    assert shares(2, 3, 4) == (1, 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["launch=ddp", "launch.processes=3"], "launch.processes=3: must divide reward.batch_size=4, for each process"),
        (["launch=multi_node", "launch.nodes=4"], "launch.processes=2 on launch.nodes=4: must divide reward.batch_"),
        (["launch=ddp", "launch.processes=4", "ppo.batch_size=2", "reward.batch_size=8", "dpo.batch_size=8",
          "ppo.minibatches=1"], "launch.processes=4: is above ppo.batch_size=2"),
        (["runtime.micro_batch_size=3"], "runtime.micro_batch_size=3: must divide pretrain.batch_size=8"),
        (["launch=ddp", "runtime.micro_batch_size=3"], "runtime.micro_batch_size=3: must divide pretrain.batch_size=8, "
         "of which each of 2 processes takes 4"),
        (["launch=fsdp2"], "launch.mode=fsdp2: does not share out PPO's models"),
        (["launch=deepspeed_zero3"], "launch.mode=deepspeed_zero3: cuts up the matrices that pretrain's Muon needs"),
        (["launch=fsdp2", "reward.lora_rank=4"], "reward.lora_rank: launch.mode=fsdp2 shares out whole models"),
    ],
)  # fmt: skip
def test_mixes_that_cannot_be_are_refused_before_anything_runs(options, line, tmp_path, monkeypatch):
    monkeypatch.setattr("threefold.chain.making.make", lambda *_: pytest.fail("a stage was run"))
    with pytest.raises(UserError) as refused:
        chain.bring_up_to_date(compose(["experiment=smoke", f"runs={tmp_path}", *options]))
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["launch.processes=2"], "launch.mode=single: is one process, and 2 are asked for; use launch=ddp"),
        (["launch=fsdp2", "launch.processes=1"], "launch.mode=fsdp2: shares a model among processes; set"),
        (["launch=multi_node", "launch.node_rank=2"], "launch.node_rank=2: must be below launch.nodes=2"),
    ],
)
def test_values_of_launch_that_contradict_each_other(options, line):
    with pytest.raises(UserError) as refused:
        compose(options)
    assert str(refused.value).startswith(line)


def test_stages_that_are_there_already_do_not_count(tmp_path):
    check_shares(compose(["launch=ddp", "launch.processes=3"]), ["tokenizer", "pretrain", "sft", "evaluate"])
    check_shares(compose(["launch=fsdp2"]), ["pretrain", "sft", "reward", "dpo"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_sharing_a_model_needs_gpus_and_deepspeed(monkeypatch):
    with pytest.raises(UserError, match=r"^launch\.mode=fsdp2: needs GPUs, and there is none to be used here; use"):
        launch.check(compose(["launch=fsdp2"]))
    zero3 = compose(["launch=deepspeed_zero3"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^launch\.mode=deepspeed_zero3: DeepSpeed is missing; pip install"):
        launch.check(zero3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"^launch\.mode=deepspeed_zero3: needs GPUs"):
        launch.check(zero3)


def test_a_trainer_in_another_mode_than_the_one_asked_for_is_an_error():
    def trainer(kind, processes=2, fsdp2=False):
        found = {"distributed_type": SimpleNamespace(name=kind), "num_processes": processes, "is_fsdp2": fsdp2}
        return SimpleNamespace(accelerator=SimpleNamespace(**found))

    def job(mode):
        return SimpleNamespace(device=device.Device("cuda", True, 1, 2, mode))

    hf_trainer.require_mode(trainer("FSDP", fsdp2=True), job("fsdp2"))
    hf_trainer.require_mode(trainer("MULTI_CPU"), job("ddp"))
    hf_trainer.require_mode(trainer("DEEPSPEED"), job("deepspeed_zero3"))
    for found, asked in (("MULTI_CPU", "fsdp2"), ("FSDP", "fsdp2"), ("MULTI_GPU", "deepspeed_zero3"), ("NO", "ddp")):
        with pytest.raises(UserError, match=rf"^launch\.mode={asked}: accelerate set up 2 {found} instead of 2 "):
            hf_trainer.require_mode(trainer(found), job(asked))


def test_a_training_that_was_begun_in_another_mode_is_not_continued(tmp_path):
    job = SimpleNamespace(device=device.Device("cpu", False, 1, 2, "ddp"))
    assert hf_trainer.continued_from(tmp_path, job) is None
    (tmp_path / "checkpoint-3").mkdir()
    done = tmp_path / "checkpoint-3" / hf_trainer.COMPLETE
    done.write_text("single")
    assert hf_trainer.continued_from(tmp_path, job) == str(tmp_path / "checkpoint-3")
    done.write_text("fsdp2")
    with pytest.raises(UserError, match=r"^launch\.mode=ddp: was begun with fsdp2; continue with that, or remove"):
        hf_trainer.continued_from(tmp_path, job)


def test_fewer_pairs_than_a_batch_are_one_clear_line():
    job = SimpleNamespace(stage="dpo", device=device.Device("cpu", False, 1, 2, "ddp"))
    hf_trainer.require_whole_batch(job, 8, 8)
    with pytest.raises(UserError, match=r"^dpo\.batch_size=8: 5 pairs are fewer, which 2 processes cannot share alike"):
        hf_trainer.require_whole_batch(job, 5, 8)


def test_the_fingerprint_does_not_depend_on_where_it_is_made():
    plans = [
        {name: entry.fingerprint for name, entry in chain.plan(compose(["experiment=smoke", *options])).items()}
        for options in ([], ["launch=ddp", "launch.processes=4"], ["launch=fsdp2"], ["launch=deepspeed_zero3"],
                        ["launch=multi_node", "launch.nodes=8", "launch.main_port=1234"])
    ]  # fmt: skip
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp2", "deepspeed_zero3"])
def test_every_stage_says_devices_mode_and_batch(mode, capsys):
    job = Job.__new__(Job)
    job.stage, job.main = "sft", True
    job.device = device.Device("cpu", False, 1, 1 if mode == "single" else 2, mode)
    job.announce("824 tokens", 32, None, device.Work())
    start = "1 CPU threads, fp32 · one process" if mode == "single" else f"2 × 1 CPU threads, fp32 · {mode}"
    assert capsys.readouterr().out.startswith(f"sft          {start} · 824 tokens × 32 steps")
