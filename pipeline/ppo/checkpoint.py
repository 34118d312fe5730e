"""PPO's checkpoints: folders that are there whole or not at all.

checkpoints/rollout-<n>/state.pt    weights and optimisers after n rollouts
checkpoints/rollout-<n>/state.json  the rollouts done and what else goes on from there
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch


def save(folder: Path, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the `state_dict` of every part, and `state` with its key `rollouts`; older checkpoints go then."""
    whole = folder / f"rollout-{state['rollouts']}"
    if whole.exists():  # this run was killed after writing it, and has come here again
        return
    fresh = whole.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    torch.save({name: part.state_dict() for name, part in parts.items()}, fresh / "state.pt")
    (fresh / "state.json").write_text(json.dumps(state))
    fresh.rename(whole)
    for other in folder.glob("rollout-*"):
        if other != whole:
            shutil.rmtree(other)


def load(folder: Path, parts: dict[str, Any]) -> dict[str, Any] | None:
    """Give every part its state in the last whole checkpoint; returns `state`, or None when there is no checkpoint."""
    files = [file for file in folder.glob("rollout-*/state.json") if file.parent.suffix != ".part"]
    states = [json.loads(file.read_text()) for file in files]
    if not states:
        return None
    last = max(states, key=lambda state: state["rollouts"])
    saved = torch.load(folder / f"rollout-{last['rollouts']}" / "state.pt", weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return last
