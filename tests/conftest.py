"""One smoke run of the whole chain, shared by the tests that look at its results."""

import contextlib
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

SMOKE = ["experiment=smoke"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs` folder after `threefold run experiment=smoke`; what that printed is in printed.txt beside it."""
    from pipeline import cli

    runs = tmp_path_factory.mktemp("smoke") / "runs"
    with (runs.parent / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
        cli.main(["run", *SMOKE, f"runs={runs}"])
    return runs


@pytest.fixture
def borrowed(smoke: Path, tmp_path: Path) -> Path:
    """A `runs` folder with the artifacts of the smoke run."""
    runs = tmp_path / "runs"
    (runs / "artifacts").mkdir(parents=True)
    for artifact in (smoke / "artifacts").iterdir():
        if (artifact / "manifest.json").is_file():
            (runs / "artifacts" / artifact.name).symlink_to(artifact.resolve())
    return runs


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A file of twelve pairs to compare."""
    from pools import row, write_pool

    return write_pool(tmp_path / "pool.jsonl", [row(i) for i in range(12)])


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """Where votes go."""
    return tmp_path / "votes.jsonl"
