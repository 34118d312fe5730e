"""Every training stage in several processes against one: the same losses, whatever the processes hold of the model."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from stage_worker import measure_nothing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline import chain, launch
from pipeline.artifact import read_json, read_lines, write_json
from pipeline.config import compose
from pipeline.job import Job, execute

# stage → overrides that give it at least 20 steps; sizes that no number of processes here divides come with `uneven`
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
            made.mkdir(parents=True)
        inputs = {parent: str(smoke / "smoke" / parent) for parent in chain.parents(stage, config)}
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
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
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
def two(smoke, tmp_path_factory, once) -> Path:
    return together(smoke, tmp_path_factory.mktemp("two"), list(STAGES), [], once)


@pytest.fixture(scope="module")
def shared(smoke, tmp_path_factory, once) -> Path:
    return together(smoke, tmp_path_factory.mktemp("shared"), list(STAGES), [], once, mode="fsdp2")


def agree(ours: Path, theirs: Path, stage: str, steps: int = 20) -> None:
    """Hold the step logs of two folders to each other: the loss to 1e-4, and every other metric to 1e-3."""
    logs = [read_lines(folder / stage / "log.jsonl") for folder in (ours, theirs)]
    assert len(logs[0]) == len(logs[1]) >= steps
    for mine, other in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4), f"step {mine['step']}"
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)


def moved(folder: Path, stage: str, start: Path) -> torch.Tensor:
    """Trained weights less those that they started from, as one vector."""
    trained, before = load_file(folder / stage / "model.safetensors"), load_file(start)
    return torch.cat([(trained[name] - before.get(name, 0)).flatten() for name in sorted(trained)])


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(stage, one, two):
    agree(one, two, stage)


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
