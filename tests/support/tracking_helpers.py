"""What tests of trackers share; imports nothing heavy."""

from pathlib import Path

from threefold.tracking.trackers import About

OFFLINE = {"project": "threefold", "entity": None, "mode": "offline", "tags": ["x"], "samples": 1, "upload": False}


def about(folder: Path, stage: str = "ppo", run: str = "demo/variants/a") -> About:
    """An execution of `stage` with its folders below `folder`."""
    checkpoints = folder / "artifacts" / f"{stage}-abc.work" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    return About(stage, run, "abc", {"sft": "123"}, {"ppo": {"seed": 1}}, folder / "artifacts", checkpoints)
