"""Where a stage's metrics go while it runs: a step log in its folder, and W&B."""

import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.errors import UserError


class StepLog:
    """Metrics by step as JSON lines, {"step": 10, "loss": 3.2}; a resumed stage drops what follows its checkpoint."""

    def __init__(self, file: Path):
        self.file = file

    def rewind(self, step: int) -> None:
        """Forget lines after `step`, and a line cut short by a kill."""
        if not self.file.exists():
            return
        complete = [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        self.file.write_text("".join(line for line in complete if json.loads(line)["step"] <= step))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line and hand it to the system at once."""
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")


class WandbRun:
    """One W&B run of a stage. It never blocks and never fails the stage: trouble is printed once, in one line."""

    def __init__(self, tracker: DictConfig, stage: str, run: str, folder: Path, config: DictConfig):
        self.run = None
        try:
            self.run = self._start(tracker, stage, run, folder, config)
        except Exception as error:
            self._give_up(error)

    def _start(self, tracker: DictConfig, stage: str, run: str, folder: Path, config: DictConfig) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        identity = folder / "wandb-id.txt"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        place = folder.parent.parent / "wandb"
        place.mkdir(exist_ok=True)
        return wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=_mode(tracker.mode),
            dir=str(place),
            id=identity.read_text(),
            resume="allow",
            name=f"{run}/{stage}",
            group=run.partition("/")[0],
            job_type=stage,
            config=OmegaConf.to_container(config),
            settings=wandb.Settings(console="off", init_timeout=20, x_disable_stats=False),
        )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Log `metrics` at the stage's own `step`."""
        self._try(lambda run: run.log({"step": step, **metrics}, step=step))

    def summarise(self, metrics: dict[str, Any]) -> None:
        """Put a stage's final metrics into the run's summary."""
        self._try(lambda run: run.summary.update(metrics))

    def close(self) -> None:
        """Finish the run."""
        self._try(lambda run: run.finish())

    def _try(self, action: Any) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"W&B is off for the rest of this stage: {reason}", flush=True)


def _mode(asked: str) -> str:
    """`asked`, with auto resolved: online only with a key and a host that answers within two seconds."""
    if asked == "online" and not _has_key():
        raise UserError(
            "tracker.mode=online: no W&B key; run `wandb login`, set WANDB_API_KEY, or use tracker.mode=auto"
        )
    if asked != "auto":
        return asked
    return "online" if _has_key() and _reachable() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text()


def _reachable() -> bool:
    from urllib.parse import urlsplit

    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        socket.create_connection(
            (address.hostname, address.port or (80 if address.scheme == "http" else 443)), timeout=2
        ).close()
    except OSError:
        return False
    return True
