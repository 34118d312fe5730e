"""Making what a configuration asks for and the store lacks."""

import time
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from threefold.chain import model_card
from threefold.chain.checks import check
from threefold.chain.plans import Planned, plan, view, wanted
from threefold.errors import first_line, public_traceback
from threefold.execution import launch, nodes
from threefold.stages import STAGES, parents


def bring_up_to_date(config: DictConfig) -> list[str]:
    """Make what `config.target` (or the whole chain) needs and lacks; returns the stages that ran.

    Raises `UserError` for bad input; an unexpected error in a stage is written to its work folder and raised again.
    """
    run = Path(config.runs) / config.run
    planned, ran = plan(config, wanted(config)), []
    check(config, planned)
    with nodes.gathered(config.launch, Path(config.runs) / "artifacts") as others:
        for entry in planned.values():
            if not entry.artifact.finished and make(config, entry, planned, others):
                ran.append(entry.stage)
            entry.artifact.link_into(run)
    return ran


def make(config: DictConfig, entry: Planned, planned: dict[str, Planned], others: nodes.Nodes | None = None) -> bool:
    """Make one artifact under its lock, together with `others`; False when another process made it meanwhile."""
    artifact = entry.artifact
    artifact.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = artifact.lock()
    if artifact.running:
        print(f"{entry.stage}: another process is making it; waiting for that", flush=True)
    with lock:
        if artifact.finished:
            return False
        artifact.open()
        inputs = {parent: planned[parent].artifact.folder for parent in parents(entry.stage, config)}
        try:
            _run(config, entry, inputs, others)
        except Exception as error:
            artifact.note_failure(first_line(error))
            (artifact.work / "traceback.txt").write_text(public_traceback(error))
            raise
    return True


def _run(config: DictConfig, entry: Planned, inputs: dict[str, Path], others: nodes.Nodes | None) -> None:
    started = time.time()
    execution = _execute(config, entry, inputs, others)
    manifest = {
        "stage": entry.stage,
        "fingerprint": entry.fingerprint,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "parts": entry.parts,
        "parents": {
            key.removeprefix("parent."): value for key, value in entry.parts.items() if key.startswith("parent.")
        },
    }
    manifest |= execution
    model_card.write(entry.artifact.out, manifest, entry.artifact.folder.parent)
    entry.artifact.finish(manifest)


def _execute(config: DictConfig, entry: Planned, inputs: dict[str, Path], others: nodes.Nodes | None) -> dict[str, Any]:
    """Run the stage, in this process or in those of `launch`; returns what the manifest says of the execution."""
    stage, artifact, seen = entry.stage, entry.artifact, view(config, entry.stage)
    if config.launch.processes * config.launch.nodes > 1 and STAGES[stage].several_processes:
        folders = {parent: str(folder) for parent, folder in inputs.items()}
        places = str(artifact.out), str(artifact.checkpoints)
        task = launch.Task(
            stage,
            cast(dict[str, Any], OmegaConf.to_container(seen)),
            folders,
            *places,
            entry.fingerprint,
            **launch.place(config.launch),
        )
        return launch.run(task, artifact.work, others)
    from threefold.execution.job import Job, execute

    job = Job(stage, seen, inputs, artifact.out, artifact.checkpoints)
    if config.precision == "auto" and job.device.bf16 and job.device.type == "cpu":
        job.say(
            "precision=auto is bf16 here, as of a GPU, and torch sees none: it is slow; set fp32, or mend the driver"
        )
    return execute(job, entry.fingerprint)
