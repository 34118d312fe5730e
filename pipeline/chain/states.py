"""Which of the planned artifacts are there, and why others are stale."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold.artifacts.imports import VERSIONED, version_of
from threefold.chain.plans import Planned, plan
from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.stages import STAGES

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
