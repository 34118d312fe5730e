"""The chain: which artifacts a configuration asks for, which of them are there, and making the rest."""

from threefold.chain.checks import check, check_processes, check_rewards, check_sources
from threefold.chain.making import bring_up_to_date, keep_choices, make
from threefold.chain.plans import (
    Planned,
    State,
    fingerprint_parts,
    made_with,
    plan,
    require_finished,
    stale_reason,
    state_in_run,
    status,
    view,
    wanted,
)

__all__ = [
    "Planned",
    "State",
    "bring_up_to_date",
    "check",
    "check_processes",
    "check_rewards",
    "check_sources",
    "fingerprint_parts",
    "keep_choices",
    "made_with",
    "make",
    "plan",
    "require_finished",
    "stale_reason",
    "state_in_run",
    "status",
    "view",
    "wanted",
]
