"""Which trackers there are, and whether they can be used here. Imports none of them."""

import importlib.util
import netrc
import os
import socket
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from omegaconf import DictConfig

from threefold.errors import UserError

# kind → name for people, module and class, package that it needs
KINDS = {
    "wandb": ("W&B", "threefold.tracking.wandb_run", "WandbRun", "wandb"),
    "trackio": ("trackio", "threefold.tracking.trackio_run", "TrackioRun", "trackio"),
    "tensorboard": ("TensorBoard", "threefold.tracking.tensorboard_run", "TensorboardRun", "tensorboard"),
}
NO_KEY = "no W&B key; run `wandb login` or set WANDB_API_KEY"


def require(config: DictConfig) -> None:
    """Raise `UserError` where a tracker of `config.kinds` is not installed, or is to be online without a key."""
    for kind in config.kinds:
        installed(KINDS[kind][-1], "tracker.kinds")
    if "wandb" in config.kinds and config.mode == "online" and not has_key():
        raise UserError(f"tracker.mode=online: {NO_KEY}, or use tracker.mode=auto")


def installed(package: str, key: str) -> None:
    """Raise `UserError` naming `key` where a package of the extras is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{key}: {package} is not installed; install it (pip install {package.replace('_', '-')})")


def mode(asked: str) -> str:
    """`asked`, with auto resolved: online only with a key and a host that answers within two seconds."""
    if asked != "auto":
        return asked
    return "online" if has_key() and reachable() else "offline"


def has_key() -> bool:
    """Whether W&B would find a key, without asking the network or the person."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc.netrc(file).authenticators(server().netloc) is not None
    except netrc.NetrcParseError:
        return False


def server() -> SplitResult:
    """The address of W&B, or of one's own server."""
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def reachable() -> bool:
    """Whether the host of W&B takes a connection within two seconds."""
    address = server()
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=2).close()
    except OSError:
        return False
    return True
