"""The chain: which artifacts a configuration asks for, which of them are there, and making the rest."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.artifacts.artifact import Artifact, fingerprint_of, read_json
from threefold.artifacts.digests import artifact_digest, checkpoint_digest, model_digest, source_parts
from threefold.artifacts.imports import VERSIONED, function_parts, version_of
from threefold.chain import model_card
from threefold.config import interpolations
from threefold.config.checks import check_shares
from threefold.errors import UserError, first_line, public_traceback
from threefold.evaluation.players import policy_name
from threefold.execution import launch, nodes, precision
from threefold.stages import STAGES, depending_on, needed_by, parents, sources
from threefold.tracking import backends

LOCATION = ("path", "config_name", "revision")  # of a source: its content counts, and these for one from the hub
TASKS = "evaluate.tasks."
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class Planned:
    """One stage under one configuration: `parts` is everything its fingerprint covers."""

    stage: str
    parts: dict[str, Any]
    artifact: Artifact

    @property
    def fingerprint(self) -> str:
        """The fingerprint, 12 hexadecimal digits."""
        return self.artifact.fingerprint


def plan(config: DictConfig, names: list[str] | None = None) -> dict[str, Planned]:
    """The stages `names` (default: the whole chain) with fingerprints, parents before children; runs nothing."""
    planned: dict[str, Planned] = {}
    for name in names or needed_by(None, config):
        parts = fingerprint_parts(config, name)
        parts |= {f"parent.{parent}": planned[parent].fingerprint for parent in parents(name, config)}
        planned[name] = Planned(name, parts, Artifact(Path(config.runs), name, fingerprint_of(parts)))
    return planned


def fingerprint_parts(config: DictConfig, name: str) -> dict[str, Any]:
    """Everything but the parents that can change the result of stage `name`, as flat dotted keys."""
    stage = STAGES[name]
    parts: dict[str, Any] = {"version": stage.version}
    for key in stage.keys:
        parts |= _flatten(key, *_placed(config, key))
    parts = {key: value for key, value in parts.items() if not _below(key, stage.without)}
    if "precision" in parts:
        parts |= {"precision": precision.resolved(config, name)}
    for key, made_by in stage.folders:
        folders = _listed(OmegaConf.select(config, key))
        parts = _replaced(parts, key, [artifact_digest(folder, key, made_by) for folder in folders])
        if key in stage.named:
            parts[f"{key}.names"] = [policy_name(folder) for folder in folders]
    for key in stage.models:
        if (model := OmegaConf.select(config, key)) is not None and (digest := model_digest(model, key)) != model:
            parts = _replaced(parts, key, digest)
    for key in sources(name, config):
        parts = _without_location(parts, key) | _source_parts(config, key)
        if key.startswith(TASKS):
            from threefold.evaluation import verifiable

            parts |= _prefixed(key, verifiable.parts(OmegaConf.select(config, key).check))
    for key in stage.functions:
        for place, function in rewards.functions(OmegaConf.select(config, key)).items():
            if function is not None:
                parts |= _prefixed(f"{key}.{place}".rstrip("."), function_parts(function))
    checkpoint = config.model.checkpoint if "model.checkpoint" in parts else None
    if checkpoint and Path(checkpoint).is_dir():
        parts = _replaced(parts, "model.checkpoint", checkpoint_digest(Path(checkpoint)))
    return parts


def _source_parts(config: DictConfig, key: str) -> dict[str, Any]:
    """What counts of a data source; a name on the hub that the environment gives stays an interpolation."""
    source = OmegaConf.select(config, key)
    if not source.path:
        return {key: None}
    counted = OmegaConf.create(source_parts(source))
    return {
        part: value
        for name in counted
        for part, value in _flatten(f"{key}.{name}", source if name in source else counted, name).items()
    }


def _without_location(parts: dict[str, Any], key: str) -> dict[str, Any]:
    return {part: value for part, value in parts.items() if not _below(part, tuple(f"{key}.{n}" for n in LOCATION))}


def _replaced(parts: dict[str, Any], key: str, digest: str) -> dict[str, Any]:
    """`parts` with a digest of the content that a key names, in place of the name."""
    return {part: value for part, value in parts.items() if not _below(part, (key,))} | {key: digest}


def _prefixed(key: str, parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}": value for name, value in parts.items()}


def view(config: DictConfig, name: str) -> DictConfig:
    """The configuration that stage `name` may see: what its fingerprint covers, plus runtime and tracker.

    Reading any other key raises, so no stage can depend on a key that its fingerprint leaves out.
    """
    stage = STAGES[name]
    seen = OmegaConf.create({})
    for key in (*stage.keys, *sources(name, config), "runtime", "tracker", "run"):
        value = interpolations.as_written(*_placed(config, key))
        if key == "precision":
            value = precision.resolved(config, name)
        if hidden := [name.removeprefix(f"{key}.") for name in stage.without if name.startswith(f"{key}.")]:
            value = OmegaConf.masked_copy(value, [name for name in value if name not in hidden])
        OmegaConf.update(seen, key, value, force_add=True)
    OmegaConf.set_struct(seen, True)
    OmegaConf.set_readonly(seen, True)
    return seen


def status(config: DictConfig) -> list[dict[str, Any]]:
    """A row for each stage of the whole chain: its state, the reason, fingerprint, time of making and main metric."""
    run = Path(config.runs) / config.run
    return [_status_row(planned, run) for planned in plan(config).values()]


def _status_row(planned: Planned, run: Path) -> dict[str, Any]:
    artifact, link = planned.artifact, run / planned.stage
    row = {"stage": planned.stage, "fingerprint": planned.fingerprint, "reason": "", "made": "", "metric": ""}
    if artifact.finished:
        manifest = read_json(artifact.folder / "manifest.json")
        metric = STAGES[planned.stage].metric
        value = read_json(artifact.folder / "metrics.json").get(metric)
        return row | {
            "state": "fresh",
            "reason": made_with(manifest),
            "made": manifest["created"],
            "metric": f"{metric} {value:.4g}" if value is not None else "",
        }
    if artifact.running:
        return row | {"state": "running"}
    if artifact.failure:
        return row | {"state": "failed", "reason": artifact.failure}
    if artifact.work.is_dir():
        return row | {"state": "interrupted", "reason": "continues from its last checkpoint"}
    if (link / "manifest.json").is_file():
        return row | {"state": "stale", "reason": stale_reason(read_json(link / "manifest.json"), planned)}
    return row | {"state": "missing"}


def made_with(manifest: dict[str, Any]) -> str:
    """The libraries of an artifact that are installed in other versions now; they make it no less fresh."""
    made = manifest.get("environment", {})
    other = [f"{name} {made[name]}" for name in VERSIONED if name in made and made[name] != version_of(name)]
    return f"made with {', '.join(other)}" if other else ""


def stale_reason(manifest: dict[str, Any], planned: Planned) -> str:
    """The keys in which `planned` differs from the artifact that `manifest` describes."""
    old, new = manifest["parts"], planned.parts
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    own = [_difference(key, old.get(key), new.get(key)) for key in changed if not key.startswith("parent.")]
    return ", ".join(own or [f"{key.removeprefix('parent.')} is stale" for key in changed])


def require_finished(config: DictConfig) -> None:
    """Raise `UserError` where the run of `config` has no finished stage."""
    folder = Path(config.runs) / config.run
    if not any((folder / stage / "manifest.json").is_file() for stage in STAGES):
        raise UserError(f"{folder}: this run has no finished stage; make one with: threefold run run={config.run}")


def wanted(config: DictConfig) -> list[str]:
    """The stages that `config.target` (or the whole chain) needs, and with `dependents` those of the run behind it."""
    if config.target is not None and config.target not in STAGES:
        raise UserError(f"target={config.target}: must be one of {', '.join(STAGES)}")
    found = needed_by(config.target, config)
    if config.target and config.dependents:
        run = Path(config.runs) / config.run
        made = [name for name in depending_on(config.target, config) if (run / name).exists()]
        found = [name for name in STAGES if any(name in needed_by(w, config) for w in [*found, *made])]
    return found


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


def check(config: DictConfig, planned: dict[str, Planned]) -> None:
    """All that can be known to be wrong before the first of the planned stages starts; raises `UserError`."""
    check_processes(config, planned)
    check_pairs(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        backends.require(config.tracker)
    check_checkpoint(config, planned)
    check_sources(config, planned)
    check_rewards(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        from threefold.chain import preflight  # imports torch

        preflight.check(config, planned)


def check_pairs(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Raise `UserError` where DPO is to be made of replies that were labelled one by one."""
    given = config.data.preferences
    if given.path and given.format == "unpaired" and "dpo" in planned and not planned["dpo"].artifact.finished:
        raise UserError(
            "data.preferences.format=unpaired: replies that were labelled one by one are no pairs, which dpo needs; "
            "set target=reward or ppo, or take dpo out of evaluate.models"
        )


def check_checkpoint(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Look at the checkpoint of model=hf before the first stage that reads it; raises `UserError` for a bad one."""
    if not config.model.checkpoint or all(planned[name].artifact.finished for name in planned if name in READ_IT):
        return
    from threefold.models.loading import check_checkpoint

    if check_checkpoint(config.model) and not set(planned) <= READ_IT:
        raise UserError(
            f"model.checkpoint={config.model.checkpoint}: needs code of its own, and stages after pretrain run none; "
            "set target=pretrain, or take a model whose architecture transformers has"
        )


READ_IT = {"tokenizer", "pretrain"}  # stages that read the checkpoint; later ones read what they made of it


def check_processes(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Hold what several processes would share to what they can, for the stages to be made; raises `UserError`."""
    stages = [name for name, entry in planned.items() if not entry.artifact.finished]
    if any(STAGES[stage].several_processes for stage in stages):
        check_shares(config, stages)
        launch.check(config)


def check_sources(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Read the data of the stages to be made before the first of them starts; raises `UserError` for a bad source.

    A broken file of preferences would otherwise show after pretraining. A source that a finished artifact was made from
    is known to be good, and what is read here stays in memory for the stages, so a good source is read once as before.
    """
    from threefold.data import reading
    from threefold.evaluation import verifiable

    known = {key for entry in planned.values() if entry.artifact.finished for key in sources(entry.stage, config)}
    needed = {key for entry in planned.values() if not entry.artifact.finished for key in sources(entry.stage, config)}
    for key in sorted(needed - known):
        source = OmegaConf.select(config, key)
        if key.startswith(TASKS):
            verifiable.check(key, source)
        elif source.path is not None:
            reading.check(source)
        if key == "data.replies":
            unfinished = {entry.stage for entry in planned.values() if not entry.artifact.finished}
            reading.check_replies(source, config.data.dialogue, _splits_of_replies(unfinished, config))


def _splits_of_replies(stages: set[str], config: DictConfig) -> set[str]:
    """The splits of `data.replies` that some of `stages` take prompts from."""
    given = config.data.preferences.path is not None
    needed = {"sft": {"train", "validation"}, "ppo": {"train"}, "frontier": {"test"}, "evaluate": {"test"}}
    needed["evaluate"] |= {"validation"} if config.evaluate.validation_prompts else set()
    needed["comparisons"] = set() if given else {"train", "validation"}
    return set().union(*(needed.get(stage, set()) for stage in stages))


def check_rewards(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Try the reward functions of the stages to be made before the first of them starts; raises `UserError`."""
    from threefold.chain import reward_checks

    for entry in planned.values():
        for key in STAGES[entry.stage].functions if not entry.artifact.finished else ():
            rewards.load(OmegaConf.select(config, key), rewards.GIVEN[entry.stage])
            reward_checks.check(config, entry.stage, key)


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
            stage, OmegaConf.to_container(seen), folders, *places, entry.fingerprint, **launch.place(config.launch)
        )
        return launch.run(task, artifact.work, others)
    from threefold.execution.job import Job, execute

    job = Job(stage, seen, inputs, artifact.out, artifact.checkpoints)
    if config.precision == "auto" and job.device.bf16 and job.device.type == "cpu":
        job.say(
            "precision=auto is bf16 here, as of a GPU, and torch sees none: it is slow; set fp32, or mend the driver"
        )
    return execute(job, entry.fingerprint)


def _below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _placed(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    """The section that a key is in, and its name there."""
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(config, section) if section else config), name


def _flatten(key: str, section: DictConfig, name: str) -> dict[str, Any]:
    """What is called `name` in `section`, as flat dotted keys below `key`.

    A value that the environment gives stays an interpolation. A digest of it stands beside it, but for arguments of
    functions and addresses, which count as written: these may hold secrets, and a weak one could be found from its
    digest.
    """
    value = section[name]
    if OmegaConf.is_dict(value):
        return {part: v for below in value for part, v in _flatten(f"{key}.{below}", value, below).items()}
    if OmegaConf.is_list(value):
        written, value = OmegaConf.to_container(value), OmegaConf.to_container(value, resolve=True)
    else:
        written = interpolations.as_written(section, name)
    if written == value or ".args." in key or "://" in str(value):
        return {key: written}
    return {key: written, f"{key}.value": hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _difference(key: str, old: Any, new: Any) -> str:
    """How one part differs, in words for people: digests have no values to show."""
    if isinstance(old, str) and isinstance(new, str) and all(DIGEST.fullmatch(value) for value in (old, new)):
        return f"{key} changed"
    return f"{key} {_short(old)} → {_short(new)}"
