"""Limits of `data.dialogue` that a data set of `conf/data` brings: they hold for its own path, and for no other."""

from omegaconf import DictConfig, OmegaConf


def register() -> None:
    """Let `conf/` write ${own_limit:N} for such a limit."""
    OmegaConf.register_new_resolver("own_limit", _own_limit, replace=True)


def _own_limit(limit: int, *, _root_: DictConfig) -> int | None:
    return limit if _root_.data.replies.path == _root_.data.limits_for else None
