"""Looking at tracked runs: sending W&B's offline ones, local pages, the terminal, and the workspace of W&B."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold.artifacts.artifact import Artifact
from threefold.errors import UserError, first_line
from threefold.fileio import write_text
from threefold.tracking import trackers
from threefold.tracking.trackers import AXES, OPTIMISER_STEP

WORKSPACE = Path(__file__).with_name("workspace.yaml")
UNSENT = "unsent.txt"  # in the folder of an online run whose data did not all get out


def sync(config: DictConfig) -> None:
    """Send W&B runs that are kept here alone. Raises `UserError` without a key or host, and where sending fails."""
    folders = unsent(Path(config.runs))
    if not folders:
        print(f"nothing to send: no unsent W&B run in {wandb_folder(config)}")
        return
    require_online("sync")
    print(f"sends {len(folders)} runs", flush=True)
    done = subprocess.run(sync_command(folders))
    if done.returncode:
        raise UserError(f"sync: wandb ended with status {done.returncode}; what it said is above")


def sync_command(folders: list[Path]) -> list[str]:
    """The command that sends W&B runs, those that began online as well, without asking."""
    return [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *map(str, folders)]


def unsent(runs: Path) -> list[Path]:
    """Folders of W&B runs that were not sent: offline ones and those cut short, but for stages that are running."""
    place, busy = runs / "artifacts" / "wandb" / "wandb", running(runs)
    folders = [*place.glob("offline-run-*"), *(file.parent for file in place.glob(f"run-*/{UNSENT}"))]
    new = [folder for folder in folders if not list(folder.glob("*.synced"))]
    return sorted(folder for folder in new if folder.name.rpartition("-")[2] not in busy)


def running(runs: Path) -> set[str]:
    """Ids of the W&B runs of stages that are being made now."""
    ids = set()
    for file in runs.glob("artifacts/*.work/checkpoints/wandb-id.txt"):
        stage, _, fingerprint = file.parent.parent.name.removesuffix(".work").rpartition("-")
        if Artifact(runs, stage, fingerprint).running:
            ids.add(file.read_text())
    return ids


def require_online(key: str) -> None:
    """Raise `UserError` naming `key` where W&B cannot be reached, before it is tried at length."""
    if not trackers.has_key():
        raise UserError(f"{key}: {trackers.NO_KEY}")
    if not trackers.reachable():
        raise UserError(f"{key}: W&B's host does not answer; the runs stay here, try again later")


def show(config: DictConfig) -> None:
    """Open what `dashboard.show` names. Raises `UserError` where there is nothing to show, or with what to show it."""
    store = Path(config.runs) / "artifacts"
    chosen = config.dashboard.show
    if chosen == "auto":
        chosen = "trackio" if any(trackio_folder(store).glob("*.db")) else "leet"
    shown = {"trackio": show_trackio, "leet": show_leet, "tensorboard": show_tensorboard, "wandb": set_up_workspace}
    with contextlib.suppress(KeyboardInterrupt):  # that is how to end a page
        shown[chosen](config, store)


def show_trackio(config: DictConfig, store: Path) -> None:
    """Serve trackio's page on this machine until Ctrl-C, with the panels of the workspace first."""
    trackers.installed("trackio", "dashboard.show=trackio")
    if not any(trackio_folder(store).glob("*.db")):
        raise UserError(f"{trackio_folder(store)}: nothing was tracked there; make a run with tracker=trackio")
    os.environ["TRACKIO_DIR"] = str(trackio_folder(store))
    os.environ["TRACKIO_PLOT_ORDER"] = ",".join(plot_order())
    import trackio

    port = config.dashboard.port
    print(f"http://127.0.0.1:{port}/?project={config.tracker.project} shows {trackio_folder(store)}; Ctrl-C ends it")
    try:
        trackio.show(project=config.tracker.project, host="127.0.0.1", server_port=port, open_browser=False)
    except OSError as error:
        raise UserError(f"dashboard.port={port}: is in use; choose another") from error


def show_leet(config: DictConfig, store: Path) -> None:
    """Show the runs that W&B keeps here in the terminal."""
    place = wandb_folder(config) / "wandb"
    if not place.is_dir():
        raise UserError(f"{place}: nothing was tracked there; make a run with tracker=wandb or tracker=trackio")
    if not sys.stdout.isatty():
        raise UserError(f"dashboard.show=leet: needs a terminal; without one: wandb leet inspect --summary {place}")
    run_tool("wandb", "leet", str(place))


def show_tensorboard(config: DictConfig, store: Path) -> None:
    """Serve TensorBoard's page on this machine until Ctrl-C."""
    trackers.installed("tensorboard", "dashboard.show=tensorboard")
    place = store / "tensorboard"
    if not place.is_dir():
        raise UserError(f"{place}: nothing was tracked there; make a run with tracker=tensorboard")
    port = str(config.dashboard.port)
    run_tool("tensorboard.main", "--logdir", str(place), "--port", port)


def run_tool(module: str, *arguments: str) -> None:
    """Run a Python module until it ends. Raises `UserError` where it fails; it has printed the reason itself."""
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status not in (0, -signal.SIGINT, 128 + signal.SIGINT):
        raise UserError(f"{module.partition('.')[0]}: ended with status {status}; it says above why")


def set_up_workspace(config: DictConfig, store: Path) -> None:
    """Make the workspace of W&B's project as `workspace.yaml` describes it, or bring the one made before up to date."""
    trackers.installed("wandb_workspaces", "dashboard.show=wandb")
    require_online("dashboard.show=wandb")
    import wandb
    import wandb_workspaces.workspaces as ws

    try:
        entity: Any = config.tracker.entity or wandb.Api().default_entity
        wanted = workspace(entity, config.tracker.project)
        address_file = store / "wandb" / f"workspace-{entity}-{config.tracker.project}.txt"
        if address_file.is_file():
            earlier = ws.Workspace.from_url(address_file.read_text().strip())
            earlier.sections, earlier.settings = wanted.sections, wanted.settings
            earlier.runset_settings, wanted = wanted.runset_settings, earlier
        wanted.save()
    except Exception as error:  # whatever the network, the key or the service has
        raise UserError(f"dashboard.show=wandb: W&B says {first_line(error)}") from error
    address_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(address_file, f"{wanted.url}\n")
    print(f"workspace: {wanted.url}")


def workspace(entity: str, project: str) -> Any:
    """The workspace that `workspace.yaml` describes, as an object of W&B's public API."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    described = OmegaConf.load(WORKSPACE)
    sections = []
    for stage, section in described.sections.items():
        axis = f"{stage}/{AXES.get(stage, OPTIMISER_STEP)}"
        panels: list[Any] = [
            wr.LinePlot(title=f"{stage}: {', '.join(names)}", x=axis, y=[f"{stage}/{name}" for name in names])
            for names in section.lines
        ]
        media = section.get("media", ())
        panels += [wr.MediaBrowser(title=f"{stage}: {name}", media_keys=[f"{stage}/{name}"]) for name in media]
        sections.append(ws.Section(name=stage, panels=panels, is_open=stage == next(iter(described.sections))))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=described.name,
        sections=sections,
        settings=ws.WorkspaceSettings(group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]),
    )


def plot_order() -> list[str]:
    """Metrics in the order of the workspace's panels, as trackio names them."""
    described = OmegaConf.load(WORKSPACE)
    return [
        f"{stage}/{name}"
        for stage, section in described.sections.items()
        for name in [*(name for names in section.lines for name in names), *section.get("media", ())]
    ]


def wandb_folder(config: DictConfig) -> Path:
    """Where W&B keeps its runs."""
    return Path(config.runs) / "artifacts" / "wandb"


def trackio_folder(store: Path) -> Path:
    """Where trackio keeps its database: below runs/artifacts, or where TRACKIO_DIR says."""
    return Path(os.environ.get("TRACKIO_DIR") or store / "trackio").absolute()
