"""One smoke run of the whole chain, shared by the tests that look at its results."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

SMOKE = ["experiment=smoke"]


@pytest.fixture(autouse=True)
def no_secrets() -> Iterator[None]:
    """What one test takes from the environment is no secret in the next."""
    from threefold.errors import SECRETS

    yield
    SECRETS.clear()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs` folder after `threefold run experiment=smoke`; what that printed is in printed.txt beside it.

    Of the workers that test side by side the first makes it, and all copy it.
    """
    base, own = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("smoke")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_smoke(own)
    first = base.parent / "smoke"
    with FileLock(f"{first}.lock"):
        if not (first / "made").exists():
            make_smoke(first)
            (first / "made").touch()
    shutil.copytree(first, own, symlinks=True, dirs_exist_ok=True)
    return own / "runs"


def make_smoke(folder: Path) -> Path:
    """Make the smoke run below `folder`; returns its `runs`."""
    from threefold import cli

    runs = folder / "runs"
    runs.mkdir(parents=True)
    with (folder / "printed.txt").open("w") as printed, contextlib.redirect_stdout(printed):
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    from browsers import CHROMIUM, playwright

    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
