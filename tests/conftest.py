"""One smoke run of the whole chain, shared by the tests that look at its results."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

SMOKE = ["experiment=smoke"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs` folder after `threefold run experiment=smoke`."""
    from pipeline import cli

    runs = tmp_path_factory.mktemp("smoke") / "runs"
    cli.main(["run", *SMOKE, f"runs={runs}"])
    return runs
