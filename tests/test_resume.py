"""A training stage killed with SIGKILL continues to the same bits as one that was left alone."""

import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cli

# stage → overrides that give it enough steps to be caught in the middle, and a new artifact
LONGER = {
    "pretrain": ["pretrain.seed=5", "pretrain.tokens=30720"],
    "sft": ["sft.seed=5", "sft.epochs=3"],
    "reward": ["reward.seed=5", "reward.epochs=8"],
    "dpo": ["dpo.seed=5", "dpo.epochs=8"],
    "ppo": ["ppo.seed=5", "ppo.episodes=128", "ppo.kl_controller=adaptive"],
}


@pytest.mark.parametrize("stage", LONGER)
def test_killed_stage_continues_to_the_same_bits(stage, smoke, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for runs in (undisturbed, killed):
        shutil.copytree(smoke / "artifacts", runs / "artifacts", ignore=shutil.ignore_patterns("wandb"))
    options = ["experiment=smoke", "tracker=none", f"target={stage}", "runtime.checkpoints=8", *LONGER[stage]]
    cli.main(["run", *options, f"runs={undisturbed}"])
    kill_after_first_checkpoint([*options, f"runs={killed}"], killed, stage)
    assert not (killed / "smoke" / stage).exists(), "the stage had finished before it was killed"
    cli.main(["run", *options, f"runs={killed}"])
    for name in ["model.safetensors", *(["critic/model.safetensors"] if stage == "ppo" else [])]:
        assert filecmp.cmp(killed / "smoke" / stage / name, undisturbed / "smoke" / stage / name, shallow=False)
    steps = [len((runs / "smoke" / stage / "log.jsonl").read_text().splitlines()) for runs in (killed, undisturbed)]
    assert steps[0] == steps[1]


def kill_after_first_checkpoint(options: list[str], runs: Path, stage: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if whole_checkpoints(runs, stage):
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert whole_checkpoints(runs, stage), "no checkpoint was written in time"


def whole_checkpoints(runs: Path, stage: str) -> list[Path]:
    found = runs.glob(f"artifacts/{stage}-*.work/checkpoints/*/*")
    return [
        f
        for f in found
        if f.name == "complete"
        or (f.name == "state.json" and f.parent.name.startswith("rollout-") and f.parent.suffix != ".part")
    ]
