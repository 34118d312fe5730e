"""The fingerprints of the experiments are the stored ones: artifacts that people have stay fresh.

A commit that changes a stage's numerics raises its version, and stores the fingerprints anew:
PYTHONPATH=tests/support python tests/chain/test_plans.py
"""

import json
import os
from pathlib import Path

import pytest
from data_helpers import DATA

from threefold import chain
from threefold.config.compose import compose

STORED = Path(__file__).parents[1] / "golden" / "plans.json"
NEEDS = {"demo": None, "smoke": None, "arithmetic": None, "hh": "hh-rlhf", "finegrained": "finegrained-rlhf"}


def fingerprints(experiment):
    planned = chain.plan(compose([f"experiment={experiment}"]))
    return {stage: of_stage.fingerprint for stage, of_stage in planned.items()}


@pytest.mark.parametrize("experiment", NEEDS)
def test_an_experiment_has_the_stored_fingerprints(experiment, monkeypatch):
    if NEEDS[experiment] and not (DATA / NEEDS[experiment]).exists():
        pytest.skip(f"no copy of {NEEDS[experiment]} is here")
    monkeypatch.setenv("THREEFOLD_DATA", str(DATA))
    assert fingerprints(experiment) == json.loads(STORED.read_text())[experiment]


if __name__ == "__main__":
    os.environ["THREEFOLD_DATA"] = str(DATA)
    STORED.write_text(json.dumps({experiment: fingerprints(experiment) for experiment in NEEDS}, indent=1) + "\n")
