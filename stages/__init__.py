"""The chain: every stage with what it needs. Importing this package imports no stage and no torch."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from threefold import rewards
from threefold.evaluation import players


@dataclass(frozen=True)
class Stage:
    """What the chain knows of a stage without importing it; `stages/<name>.py` has the function `run(job)`.

    `version` is raised whenever the stage's numerics change: artifacts of an older version are stale.
    """

    parents: tuple[str, ...]  # all that it can need; `parents` has those of a configuration
    keys: tuple[str, ...]  # the configuration it may read; all of it is in its fingerprint
    sources: tuple[str, ...] = ()  # keys of data sources whose content is in its fingerprint; .* is every name
    functions: tuple[str, ...] = ()  # keys of reward functions whose source code is in its fingerprint
    # keys of folders of artifacts of other runs, whose fingerprints are in its own; each with the stages they may be of
    folders: tuple[tuple[str, tuple[str, ...]], ...] = ()
    models: tuple[str, ...] = ()  # keys of model folders, or names on the hub, whose content is in its fingerprint
    named: tuple[str, ...] = ()  # keys of `folders` whose names, RUN/STAGE, stand in its results and so count as well
    without: tuple[str, ...] = ()  # keys below its `keys` that it does not read
    # keys that it was given since, with the value under which it does as before: with that they are in no fingerprint
    added: dict[str, Any] = field(default_factory=dict)
    version: int = 1
    metric: str = ""  # the metric that tables show
    several_processes: bool = False  # whether several processes can run it together (`launch`)


CHECKPOINT = ("checkpoint", "revision", "trust_remote_code", "gguf_file", "chat_template_kwargs")
RENDERING = 2  # version of the rows that are made with checkpoints' chat templates; ours has its in those of stages

STAGES = {
    "tokenizer": Stage(
        parents=(),
        keys=("tokenizer", *(f"model.{key}" for key in CHECKPOINT)),
        sources=("data.text",),
        version=2,
        metric="bytes_per_token",
    ),
    "pretrain": Stage(
        parents=("tokenizer",),
        keys=("pretrain", "model", "precision"),
        sources=("data.text",),
        version=3,
        metric="bits_per_byte",
        several_processes=True,
    ),
    "sft": Stage(
        parents=("pretrain",),
        keys=("sft", "sampling", "data.dialogue", "precision"),
        sources=("data.replies",),
        version=3,
        metric="reply_bits_per_byte",
        several_processes=True,
    ),
    "comparisons": Stage(
        parents=("sft",),
        keys=("comparisons", "sampling", "data.dialogue", "precision"),
        sources=("data.replies", "data.preferences"),
        functions=("comparisons.judge",),
        folders=(
            ("comparisons.policies", ("pretrain", "sft", "dpo", "ppo")),
            ("comparisons.earlier", ("comparisons",)),
            ("comparisons.scorer", ("reward",)),
        ),
        added={"comparisons.sft": True},
        version=4,
        metric="pairs",
    ),
    "reward": Stage(
        parents=("sft", "comparisons"),
        keys=("reward", "sampling", "data.preferences.max_unusable_share", "precision"),
        without=("reward.gate",),
        version=5,
        metric="accuracy",
        several_processes=True,
    ),
    "dpo": Stage(
        parents=("sft", "comparisons"),
        keys=("dpo", "data.preferences.max_unusable_share", "precision"),
        folders=(("dpo.start", ("pretrain", "sft", "dpo", "ppo")),),
        added={
            "dpo.start": [],
            "dpo.simpo_gamma": None,
            "dpo.ld_alpha": None,
            "dpo.desirable_weight": 1.0,
            "dpo.undesirable_weight": 1.0,
            "dpo.reference_sync_every": None,
            "dpo.reference_mixup": 1.0,
        },
        version=3,
        metric="accuracy",
        several_processes=True,
    ),
    "ppo": Stage(
        parents=("sft", "reward"),
        keys=("ppo", "reward.gate", "sampling", "data.dialogue", "precision"),
        sources=("data.replies", "data.text"),
        functions=("ppo.reward",),
        version=3,
        metric="score",
        several_processes=True,
    ),
    "frontier": Stage(
        parents=("sft", "comparisons", "reward", "dpo", "ppo"),
        keys=(
            *(f"frontier.{key}" for key in ("method", "prompts", "samples", "best_of", "seed")),
            *("evaluate.seed", "evaluate.judge", "evaluate.second_judge", "sampling", "data.dialogue", "precision"),
        ),
        sources=("data.replies",),
        functions=("evaluate.judge", "evaluate.second_judge"),
        version=2,
    ),
    "evaluate": Stage(
        parents=("pretrain", "sft", "comparisons", "reward", "dpo", "ppo"),
        keys=("evaluate", "tokenizer.template_date", "pretrain.context", "sampling", "data.dialogue", "precision"),
        sources=("data.replies", "data.text", "evaluate.tasks.*"),
        functions=("evaluate.judge", "evaluate.second_judge"),
        models=("evaluate.judge_model.path",),
        folders=(("evaluate.earlier", ("sft", "dpo", "ppo")),),
        named=("evaluate.earlier",),
        without=("evaluate.reward_model",),
        version=8,
        metric="ppo_gold_mean",
    ),
}


def sources(name: str, config: Any) -> list[str]:
    """The keys of the data sources of stage `name` under `config`, those in a mapping by their names."""
    keys = []
    for key in STAGES[name].sources:
        if key.endswith(".*"):
            keys += [f"{key[:-1]}{entry}" for entry in OmegaConf.select(config, key[:-2])]
        else:
            keys.append(key)
    return keys


def parents(name: str, config: Any) -> list[str]:
    """The stages whose artifacts stage `name` needs under `config`, in the order they run.

    PPO with a reward by rules alone needs no reward model. The evaluation needs the models that it compares, SFT as the
    reference of KL, and the comparisons and reward model only where one of these was made with them, for best-of-n, and
    with evaluate.reward_model.
    The frontier needs the model of the method that it measures.
    """
    if name == "ppo" and not rewards.uses_model(config.ppo.reward):
        return ["sft"]
    if name == "frontier":
        return [
            stage
            for stage in STAGES["frontier"].parents
            if stage not in ("dpo", "ppo") or stage == config.frontier.method
        ]
    if name == "evaluate":
        taking_part = [players.player(name, "evaluate.models") for name in config.evaluate.models]
        compared = {"sft"} | players.stages_of(taking_part) | ({"reward"} if config.evaluate.reward_model else set())
        made_with = {needed for stage in compared for needed in needed_by(stage, config)}
        return [stage for stage in STAGES if stage in compared or stage in made_with & {"comparisons", "reward"}]
    return list(STAGES[name].parents)


def needed_by(target: str | None, config: Any) -> list[str]:
    """The stages that `target` needs, itself included, in the order they run; None is the last stage of the chain."""
    needed = {target or list(STAGES)[-1]}
    for name in reversed(STAGES):
        if name in needed:
            needed.update(parents(name, config))
    return [name for name in STAGES if name in needed]


def depending_on(target: str, config: Any) -> list[str]:
    """The stages that need `target`, directly or not, in the order they run, without itself."""
    return [name for name in STAGES if name != target and target in needed_by(name, config)]
