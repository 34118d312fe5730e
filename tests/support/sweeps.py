"""Sweeps in this process: stages that are written at once instead of made, with results that follow from their keys."""

import functools
import json
import math
import time
from pathlib import Path

import yaml
from helpers import composed_once
from omegaconf import OmegaConf

from threefold import chain
from threefold.artifacts.artifact import asked_to_stop
from threefold.chain import making
from threefold.config import choices
from threefold.config.compose import check
from threefold.errors import UserError
from threefold.fileio import write_json, write_lines
from threefold.runs import sweep, sweep_space, variants
from threefold.schema.config import Config


def quality(config) -> float:
    """What the stand-in for DPO reaches: best at beta 0.1 and learning rate 3e-4, and a little by its seed."""
    far = math.log10(config.dpo.beta / 0.1) ** 2 + 0.5 * math.log10(config.dpo.learning_rate / 3e-4) ** 2
    return 0.9 - 0.2 * far + 0.01 * (config.dpo.seed - 2)


class Stages:
    """Stands in for `chain.make`: `made` lists what it made; `breaks` may raise; `steps` is the length of DPO's log.

    `evaluation` gives the metrics of stage evaluate for a configuration, `samples` the rows of samples.jsonl. Every
    stage took two seconds in one process, PPO ten in four.
    """

    def __init__(self, breaks=None, steps: int = 0, patience: float = 0.0, evaluation=None, samples=None):
        self.made, self.breaks, self.steps, self.patience = [], breaks or (lambda config: None), steps, patience
        self.evaluation, self.samples = evaluation, samples or (lambda config: [])

    def make(self, config, entry, planned, others=None) -> bool:
        artifact, metrics = entry.artifact, {"fingerprint": entry.fingerprint}
        artifact.open()
        if entry.stage == "dpo":
            self.breaks(config)
            self.log(config, artifact)
            metrics |= {"accuracy": quality(config), "drift": {"kl": 1 / config.dpo.beta}}
        if entry.stage == "evaluate":
            metrics |= self.evaluation(config)
            write_lines(artifact.out / "samples.jsonl", self.samples(config))
        write_json(artifact.out / "metrics.json", metrics)
        seconds, processes = (10.0, 4) if entry.stage == "ppo" else (2.0, 1)
        cost = {"seconds": seconds, "devices": {"type": "cpu", "count": processes}}
        of_stage = {"stage": entry.stage, "fingerprint": entry.fingerprint, "parts": entry.parts, "parents": {}}
        artifact.finish(of_stage | cost)
        self.made.append((entry.stage, entry.fingerprint))
        return True

    def log(self, config, artifact) -> None:
        """Log the quality at each step, giving the sweep `patience` seconds to end a run of low quality after each."""
        for step in range(1, self.steps + 1):
            with (artifact.out / "log.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": step, "rewards/accuracies": quality(config)}) + "\n")
            waited = time.monotonic() + (self.patience if quality(config) < 0.8 else 0)
            while not (reason := asked_to_stop(artifact.work, config.run)) and time.monotonic() < waited:
                time.sleep(0.01)
            if reason:
                raise UserError(f"dpo: ended at step {step}: {reason}")


def run_here(work, jobs):
    """Make variants one after the other in this process."""
    return {name: reason for name, task in work.items() if (reason := variants._make_one(*task))}


@functools.cache
def quickly(*overrides: str):
    """The smoke configuration with plain values set on it; composing takes longer."""
    config = composed_once().copy()
    OmegaConf.set_readonly(config, False)
    for key, _, value in (text.partition("=") for text in overrides):
        if key not in ("experiment", "tracker"):
            OmegaConf.update(config, key, yaml.safe_load(value))
    check(config, Config)
    OmegaConf.set_readonly(config, True)
    return config


def stand_in(monkeypatch, **options) -> Stages:
    """Have stages made by `Stages` and variants in this process; returns the stand-in."""
    stages = Stages(**options)
    for module in (choices, variants, sweep_space):
        monkeypatch.setattr(module, "compose", lambda given: quickly(*given))
    monkeypatch.setattr(choices, "chosen", lambda given: {"experiment": "smoke"})
    for check_inputs in ("check_sources", "check_rewards"):
        monkeypatch.setattr(making, check_inputs, lambda config, planned: None)
    monkeypatch.setattr(variants, "_run", run_here)
    for module in (chain, making):
        monkeypatch.setattr(module, "make", stages.make)
        monkeypatch.setattr(module, "check", lambda config, planned: None)
    # the report asks for more numbers than these stages have
    monkeypatch.setattr("threefold.report.write_report", lambda config: Path(config.runs))
    return stages


def swept(runs, *overrides: str) -> dict:
    """A sweep of the smoke run's DPO below `runs`; returns what sweep.json holds."""
    own = [f"runs={runs}", "target=dpo", "launcher.jobs=1"]
    found = sweep.run(*sweep_space.read(["experiment=smoke", *own, *overrides]))
    assert found == json.loads((runs / found["run"] / "sweep.json").read_text())
    return found
