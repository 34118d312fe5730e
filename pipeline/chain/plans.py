"""Plans: the stages a configuration asks for, what each fingerprint covers, which artifacts are there, and why not.

Nothing here runs a stage.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.artifacts.artifact import Artifact, fingerprint_of
from threefold.artifacts.digests import (
    VERSIONED,
    artifact_digest,
    checkpoint_digest,
    function_parts,
    model_digest,
    source_parts,
    version_of,
)
from threefold.config import choices
from threefold.errors import UserError
from threefold.evaluation.players import policy_name
from threefold.execution import interpolations, precision
from threefold.fileio import read_json
from threefold.stages import RENDERING, STAGES, depending_on, needed_by, parents, sources

LOCATION = ("path", "config_name", "revision")  # of a source: its content counts, and these for one from the hub
TASKS = "evaluate.tasks."


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


def wanted(config: DictConfig) -> list[str]:
    """The stages that `config.target` (or the whole chain) needs, and with `dependents` those of the run behind it."""
    if config.target is not None and config.target not in STAGES:
        raise UserError(f"target={config.target}: must be one of {', '.join(STAGES)}")
    if config.rounds is not None:
        raise UserError(
            f"rounds={config.rounds}: is for threefold run and threefold.make; leave it out here, or where the run "
            "keeps it write rounds=null"
        )
    names = needed_by(config.target, config)
    if config.target and config.dependents and not config.takeover:
        run = Path(config.runs) / config.run
        made = [name for name in depending_on(config.target, config) if (run / name).exists()]
        names = [name for name in STAGES if any(name in needed_by(w, config) for w in [*names, *made])]
    return names


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
        selected = OmegaConf.select(config, key)
        folders = [selected] if isinstance(selected, str) else list(selected or [])
        parts = _replaced(parts, key, [artifact_digest(folder, key, made_by) for folder in folders])
        if key in stage.named:
            parts[f"{key}.names"] = [policy_name(folder) for folder in folders]
    for key in stage.models:
        if (model := OmegaConf.select(config, key)) is not None and (digest := model_digest(model, key)) != model:
            parts = _replaced(parts, key, digest)
    for key in sources(name, config):
        located = tuple(f"{key}.{name}" for name in LOCATION)
        parts = {part: value for part, value in parts.items() if not _below(part, located)}
        parts |= _source_parts(config, key)
        if key.startswith(TASKS):
            from threefold.evaluation import tasks

            parts |= _prefixed(key, tasks.parts(OmegaConf.select(config, key).check))
    for key in stage.functions:
        for place, function in rewards.functions(OmegaConf.select(config, key)).items():
            if function is not None:
                parts |= _prefixed(f"{key}.{place}".rstrip("."), function_parts(function))
    checkpoint = config.model.checkpoint if "model.checkpoint" in parts else None
    if checkpoint:
        parts["model.rendering"] = RENDERING
    if checkpoint and Path(checkpoint).is_dir():
        parts = _replaced(parts, "model.checkpoint", checkpoint_digest(Path(checkpoint)))
    return {key: value for key, value in parts.items() if key not in stage.added or value != stage.added[key]}


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


def _replaced(parts: dict[str, Any], key: str, digest: str | list[str]) -> dict[str, Any]:
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
            value = OmegaConf.masked_copy(cast(DictConfig, value), [name for name in value if name not in hidden])
        OmegaConf.update(seen, key, value, force_add=True)
    OmegaConf.set_struct(seen, True)
    OmegaConf.set_readonly(seen, True)
    return seen


def _below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _placed(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    """The section that a key is in, and its name there."""
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(config, section) if section else config), name


def _flatten(key: str, section: DictConfig, name: Any) -> dict[str, Any]:
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


@dataclass
class Member:
    """A run, composed from `overrides`."""

    config: DictConfig
    overrides: list[str]

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """Its stages, parents first."""
        return plan(self.config, wanted(self.config))

    def keep(self) -> None:
        """Store what the run was told."""
        choices.keep(self.config, self.overrides)

    def link(self) -> None:
        """Link what is made into the run."""
        for entry in self.planned.values():
            if entry.artifact.finished:
                entry.artifact.link_into(Path(self.config.runs) / self.config.run)


DIGEST = re.compile(r"[0-9a-f]{64}")
FRESH = "fresh"


@dataclass(frozen=True)
class State:
    """Where a stage is: fresh, stale, missing, unlinked, failed, interrupted or running; `reason` says more."""

    word: str
    reason: str = ""


def state_in_run(planned: Planned, manifest: dict[str, Any] | None) -> State:
    """The state of a stage in a run that links to the artifact of `manifest`, or to none."""
    if manifest and manifest["fingerprint"] == planned.fingerprint:
        return State(FRESH)
    return _unmade(planned, manifest)


def _unmade(planned: Planned, manifest: dict[str, Any] | None) -> State:
    """The state of a stage whose planned artifact is not the one that the run links to."""
    artifact = planned.artifact
    if artifact.running:
        return State("running")
    if artifact.failure:
        return State("failed", artifact.failure)
    if artifact.work.is_dir():
        return State("interrupted", "continues from its last checkpoint")
    if manifest:
        return State("stale", stale_reason(manifest, planned))
    return State("unlinked" if artifact.finished else "missing")


def status(config: DictConfig) -> list[dict[str, Any]]:
    """A row for each stage of the whole chain: its state, the reason, fingerprint, time of making and main metric."""
    run = Path(config.runs) / config.run
    return [_status_row(planned, run) for planned in plan(config).values()]


def _status_row(planned: Planned, run: Path) -> dict[str, Any]:
    artifact = planned.artifact
    row = {"stage": planned.stage, "fingerprint": planned.fingerprint, "reason": "", "made": "", "metric": ""}
    if artifact.finished:
        manifest = read_json(artifact.folder / "manifest.json")
        metric = STAGES[planned.stage].metric
        value = read_json(artifact.folder / "metrics.json").get(metric)
        return row | {
            "state": FRESH,
            "reason": made_with(manifest),
            "made": manifest["created"],
            "metric": f"{metric} {value:.4g}" if value is not None else "",
        }
    linked = run / planned.stage / "manifest.json"
    state = _unmade(planned, read_json(linked) if linked.is_file() else None)
    return row | {"state": state.word, "reason": state.reason}


def listing(runs: Path) -> list[list[str]]:
    """A table of the runs in a folder, newest first: experiment, when last made, main metric of each finished stage."""
    manifests, rows = {}, []
    for run in choices.run_names(runs):
        files = {stage: runs / run / stage / "manifest.json" for stage in STAGES}
        manifests[run] = {stage: read_json(file) for stage, file in files.items() if file.is_file()}
    columns = [stage for stage in STAGES if any(stage in made for made in manifests.values())]
    for run, made in manifests.items():
        told = choices.read(runs / run)
        experiment = str(told.groups.get("experiment")) if told else ""
        newest = max((manifest["created"] for manifest in made.values()), default="")
        rows.append([run, experiment, newest, *(_figure(runs / run, stage, stage in made) for stage in columns)])
    rows.sort(key=lambda row: row[2], reverse=True)
    headings = [f"{stage} {STAGES[stage].metric}".strip() for stage in columns]
    return [["run", "experiment", "made", *headings], *rows] if rows else []


def _figure(run: Path, stage: str, made: bool) -> str:
    """The main metric of a stage, "made" where it has none, nothing where the stage is not finished."""
    value = read_json(run / stage / "metrics.json").get(STAGES[stage].metric) if made else None
    return f"{value:.4g}" if value is not None else "made" if made else ""


def made_with(manifest: dict[str, Any]) -> str:
    """The libraries of an artifact that are installed in other versions now; they make it no less fresh."""
    made = manifest.get("environment", {})
    other = [f"{name} {made[name]}" for name in VERSIONED if name in made and made[name] != version_of(name)]
    return f"made with {', '.join(other)}" if other else ""


def stale_reason(manifest: dict[str, Any], planned: Planned) -> str:
    """The keys in which `planned` differs from the artifact that `manifest` describes."""
    old, new = manifest["parts"], planned.parts
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    differences = [_difference(key, old.get(key), new.get(key)) for key in changed if not key.startswith("parent.")]
    return ", ".join(differences or [f"{key.removeprefix('parent.')} is stale" for key in changed])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _difference(key: str, old: Any, new: Any) -> str:
    """How one part differs, in words for people: digests have no values to show."""
    if isinstance(old, str) and isinstance(new, str) and all(DIGEST.fullmatch(value) for value in (old, new)):
        return f"{key} changed"
    return f"{key} {_short(old)} → {_short(new)}"


def require_finished(config: DictConfig) -> None:
    """Raise `UserError` where the run of `config` has no finished stage."""
    folder = Path(config.runs) / config.run
    if not any((folder / stage / "manifest.json").is_file() for stage in STAGES):
        raise UserError(f"{folder}: this run has no finished stage; make one with: threefold run run={config.run}")
