"""A training stage killed with SIGKILL continues to the same bits as one that was left alone."""

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threefold import cli

# stage → overrides that give it enough steps to be caught in the middle, and a new artifact
LONGER = {
    "pretrain": ["pretrain.seed=5", "pretrain.tokens=30720"],
    "sft": ["sft.seed=5", "sft.epochs=3"],
    "reward": ["reward.seed=5", "reward.epochs=8", "reward.ensemble=2"],
    "dpo": ["dpo.seed=5", "dpo.epochs=8"],
    "ppo": ["ppo.seed=5", "ppo.episodes=128", "ppo.kl_controller=adaptive"],
}


# `make test` kills one that transformers' Trainer trains; how PPO goes on is in tests/ppo/test_actors.py as well
QUICK = ("dpo",)


@pytest.mark.parametrize(
    "stage", [stage if stage in QUICK else pytest.param(stage, marks=pytest.mark.slow) for stage in LONGER]
)
def test_killed_stage_continues_to_the_same_bits(stage, smoke, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for runs in (undisturbed, killed):
        shutil.copytree(smoke / "artifacts", runs / "artifacts", ignore=shutil.ignore_patterns("wandb"))
    options = ["experiment=smoke", "tracker=none", f"target={stage}", "runtime.checkpoints=8", *LONGER[stage]]
    cli.main(["run", *options, f"runs={undisturbed}"])
    kill_after_first_checkpoint([*options, f"runs={killed}"], killed, stage)
    assert not (killed / "smoke" / stage).exists(), "the stage had finished before it was killed"
    cli.main(["run", *options, f"runs={killed}"])
    others = {"ppo": ["critic/model.safetensors"], "reward": ["members/2/model.safetensors"]}
    for name in ["model.safetensors", *others.get(stage, [])]:
        assert filecmp.cmp(killed / "smoke" / stage / name, undisturbed / "smoke" / stage / name, shallow=False)
    steps = [len((runs / "smoke" / stage / "log.jsonl").read_text().splitlines()) for runs in (killed, undisturbed)]
    assert steps[0] == steps[1]
    logs = [map(json.loads, (runs / "smoke" / stage / "log.jsonl").open()) for runs in (killed, undisturbed)]
    held_out = [[row for row in log if "eval_loss" in row] for log in logs]
    assert held_out[0] == held_out[1] and bool(held_out[0]) == (stage != "ppo")


def kill_after_first_checkpoint(options: list[str], runs: Path, stage: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "threefold", "run", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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
    found = runs.glob(f"artifacts/{stage}-*.work/checkpoints/**/*")
    return [
        f
        for f in found
        if f.name == "complete"
        or (f.name == "state.json" and f.parent.name.startswith("rollout-") and f.parent.suffix != ".part")
    ]


KILLER = """
import os, signal, sys
from pathlib import Path
from threefold import cli
from threefold.ppo import rollouts, safety
from threefold.sampling import decoding
from threefold.stages import ppo

places = {
    "prompt": (rollouts, "collect"), "token": (decoding.FusedDecoder, "step"), "update": (ppo, "minibatch_step"),
    "weights": (safety.torch, "save"), "finish": (Path, "rename"), "clean": (safety.shutil, "rmtree"),
}
(owner, name), after, calls = places[sys.argv[1]], int(sys.argv[2]), 0
original = getattr(owner, name)

def killing(*given, **options):
    global calls
    calls += 1
    if calls == after:
        if name == "save":
            given[1].write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **options)

setattr(owner, name, killing)
cli.main(sys.argv[3:])
"""


@pytest.mark.slow
def test_ppo_killed_at_ten_moments_ends_with_the_same_bits(smoke, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for runs in (undisturbed, killed):
        shutil.copytree(smoke / "artifacts", runs / "artifacts", ignore=shutil.ignore_patterns("wandb"))
    options = ["experiment=smoke", "tracker=none", "target=ppo", "runtime.checkpoints=16", "ppo.seed=5"]
    options += ["ppo.episodes=256", "ppo.kl_controller=adaptive"]
    cli.main(["run", *options, f"runs={undisturbed}"])
    generator = random.Random(1)
    places = ["prompt", "token", "token", "update", "update", "weights", "weights", "finish", "clean", "update"]
    most = {"prompt": 2, "token": 50, "update": 8, "weights": 2, "finish": 2, "clean": 3}
    for place in places:
        moment = [place, str(generator.randint(1, most[place]))]
        arguments = [sys.executable, "-c", KILLER, *moment, "run", *options, f"runs={killed}"]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (moment, done.stdout, done.stderr)
    cli.main(["run", *options, f"runs={killed}"])
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert filecmp.cmp(killed / "smoke" / "ppo" / name, undisturbed / "smoke" / "ppo" / name, shallow=False)
    logs = [(runs / "smoke" / "ppo" / "log.jsonl").read_text().splitlines() for runs in (killed, undisturbed)]
    timeless = [[{k: v for k, v in json.loads(line).items() if "second" not in k} for line in log] for log in logs]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 16
