"""Artifacts: folders named after a fingerprint, that appear whole or not at all.

runs/artifacts/<stage>-<fingerprint>/       a finished artifact
runs/artifacts/<stage>-<fingerprint>.work/  one being made: out/ becomes the artifact, checkpoints/ lets it continue
runs/artifacts/<stage>-<fingerprint>.lock   held while it is being made
runs/artifacts/<stage>-<fingerprint>.stop   why the process that makes it is to end early, where a sweep asks for that
runs/artifacts/<stage>-<fingerprint>.job    the Slurm job that is to make it (pipeline/slurm/job_records.py)
runs/<run>/<stage>                          a link to the artifact that the run uses
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from threefold.fileio import read_json, write_json

COSTS = ("seconds", "peak_memory_bytes")  # of metrics.json: what making it cost, which is no result


def stop_file(work: Path) -> Path:
    """The file that tells the process that makes an artifact in the folder `work`, wherever it runs, why it is to end.

    It lies beside that folder, which is removed as soon as the artifact is finished.
    """
    return work.with_suffix(".stop")


def fingerprint_of(parts: dict[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of `parts` as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def asked_to_stop(work: Path, run: str) -> str | None:
    """Why the maker of an artifact in `work` for `run` is to end, if it is."""
    file = stop_file(work)
    asked = read_json(file) if file.exists() else None
    return asked["reason"] if asked and belongs(run, asked["run"]) else None


def belongs(wanted_by: str, run: str) -> bool:
    """Whether the run `wanted_by` is `run` or one of its variants."""
    return wanted_by == run or wanted_by.startswith(f"{run}/")


class Artifact:
    """The place of one stage's result in the store below `runs`."""

    def __init__(self, runs: Path, stage: str, fingerprint: str):
        self.stage, self.fingerprint = stage, fingerprint
        self.folder = runs / "artifacts" / f"{stage}-{fingerprint}"
        self.work = self.folder.with_name(f"{self.folder.name}.work")
        self.out = self.work / "out"
        self.checkpoints = self.work / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the artifact is there; it is whole if it is."""
        return (self.folder / "manifest.json").is_file()

    @property
    def running(self) -> bool:
        """Whether a process is making it now."""
        lock = self.lock()
        if not Path(lock.lock_file).exists():
            return False
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True

    @property
    def failure(self) -> str | None:
        """The error line of the last attempt, if it failed."""
        file = self.work / "failed.txt"
        return file.read_text().strip() if file.is_file() else None

    def lock(self) -> FileLock:
        """The lock that its maker holds; the system releases it when the process ends, however it ends."""
        return FileLock(f"{self.folder}.lock")

    def open(self) -> None:
        """Make the work folders, keeping what an interrupted attempt left in them."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        self.forget_failure()
        stop_file(self.work).unlink(missing_ok=True)

    def ask_to_stop(self, run: str, reason: str) -> None:
        """Ask the maker to end with an error at the next step that it logs; a later attempt continues from there.

        The maker does so only where it makes the artifact for `run` or one of its variants.
        """
        if self.work.is_dir():
            write_json(stop_file(self.work), {"run": run, "reason": reason})
        if self.finished:  # in the meantime
            stop_file(self.work).unlink(missing_ok=True)

    def note_failure(self, line: str) -> None:
        """Keep the error line of an attempt."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "failed.txt").write_text(f"{line}\n")

    def forget_failure(self) -> None:
        """Remove the error line of the last attempt, because a new attempt begins."""
        (self.work / "failed.txt").unlink(missing_ok=True)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, move `out` to its final name in one step, and drop the work folder."""
        write_json(self.out / "manifest.json", manifest)
        self.out.replace(self.folder)
        shutil.rmtree(self.work)
        stop_file(self.work).unlink(missing_ok=True)

    def link_into(self, run: Path) -> None:
        """Point `run`/<stage> at this artifact, replacing an older link in one step."""
        run.mkdir(parents=True, exist_ok=True)
        link, fresh = run / self.stage, run / f".{self.stage}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(self.folder, run))
        fresh.replace(link)
