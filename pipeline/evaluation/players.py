"""Players: the models of a run, each with a way to decode, by name. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from threefold.errors import UserError, nearest

MODELS = {"base": "pretrain", "sft": "sft", "dpo": "dpo", "ppo": "ppo"}  # a model's name → the stage that makes it
DECODINGS = ("best_of", "majority")
FORM = re.compile(rf"(?:({'|'.join(MODELS)})_)?({'|'.join(DECODINGS)})_([1-9]\d*)")


@dataclass(frozen=True)
class Player:
    """A model, and which of its `count` samples is its reply.

    decoding: sample, the first; best_of, the one that the reward model scores highest; majority, the first with the
    answer that most of them give.
    """

    model: str
    decoding: str = "sample"
    count: int = 1


def player(name: str, key: str) -> Player:
    """The player called MODEL, MODEL_best_of_N or MODEL_majority_N; without MODEL the last two are of the SFT model.

    Raises `UserError` naming `key` for any other name.
    """
    if name in MODELS:
        return Player(name)
    form = FORM.fullmatch(name)
    if not form:
        number = re.findall(r"\d*$", name)[0] or "16"
        names = [*MODELS, *(f"{model}_{decoding}_{number}" for model in MODELS for decoding in DECODINGS)]
        raise UserError(
            f"{key}: {name} must be one of {', '.join(MODELS)}, or one of these with _best_of_N or _majority_N"
            f"{nearest(name, names)}"
        )
    if int(form[3]) < 2:
        raise UserError(f"{key}: {name} has nothing to choose from; give it 2 samples or more")
    return Player(form[1] or "sft", form[2], int(form[3]))


def most_samples(players: dict[str, Player]) -> int:
    """How many samples of a prompt the players of one model need; all choose among the same."""
    return max(player.count for player in players.values())


def stages_of(players: list[Player]) -> set[str]:
    """The stages whose artifacts the players need themselves."""
    chosen_by_model = {"reward"} if any(player.decoding == "best_of" for player in players) else set()
    return {MODELS[player.model] for player in players} | chosen_by_model


def policy_name(folder: str | Path) -> str:
    """What the policy in the folder of a run, runs/RUN/STAGE, is called beside those of another run: RUN/STAGE."""
    return "/".join(Path(folder).parts[-2:])
