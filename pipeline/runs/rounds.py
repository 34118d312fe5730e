"""Iterated DPO: a round compares replies of the policy of the round before, and trains that policy further on them.

runs/<run>/round-<k>   the run of each round but the last
runs/<run>             the last round
"""

from pathlib import Path

from omegaconf import DictConfig

from threefold.errors import UserError
from threefold.stages import needed_by


def overrides_of(config: DictConfig, overrides: list[str]) -> list[list[str]]:
    """The overrides of each round of `config`, composed from `overrides`; each needs those before it to be made.

    The first round is the ordinary one. Later ones draw other prompts, and hold the policy to that of the round before.
    """
    require(config)
    folder, dpo = Path(config.runs) / config.run, []
    rounds = []
    for number in range(1, config.rounds + 1):
        added = ["rounds=null"]
        if dpo:
            added += [
                f"comparisons.policies=[{quoted(dpo[-1])}]",
                "comparisons.sft=false",
                f"dpo.start={quoted(dpo[-1])}",
            ]
            added += [f"comparisons.seed={config.comparisons.seed + number - 1}"]
        if number < config.rounds:
            added += [f"run={quoted(f'{config.run}/round-{number}')}", "target=dpo", "dependents=false"]
            dpo.append(str(folder / f"round-{number}" / "dpo"))
        else:
            added += [f"evaluate.earlier=[{','.join(map(quoted, [*config.evaluate.earlier, *dpo]))}]"]
        rounds.append([*overrides, *added])
    return rounds


def require(config: DictConfig) -> None:
    """Raises `UserError` for what rounds set themselves, or cannot be made with."""
    of_rounds = {"comparisons.policies": config.comparisons.policies, "dpo.start": config.dpo.start}
    for key in [key for key, value in of_rounds.items() if value] + ["comparisons.sft"] * (not config.comparisons.sft):
        raise UserError(f"{key}: rounds={config.rounds} sets it for each round; leave it out")
    if "dpo" not in needed_by(config.target, config):
        raise UserError(f"rounds={config.rounds}: are rounds of dpo, which target={config.target} does not need")
    if config.seeds is not None:
        raise UserError(
            f"rounds={config.rounds}: seeds={config.seeds} is another way to make several; set one of the two"
        )
    if config.data.preferences.path is not None:
        raise UserError(f"rounds={config.rounds}: each samples its own pairs, and data.preferences.path has others")
    if config.comparisons.label_by != "judge":
        raise UserError(f"rounds={config.rounds}: needs comparisons.label_by=judge, which labels without waiting")


def quoted(text: str) -> str:
    """A text of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
