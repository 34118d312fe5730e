"""The chain: every stage with what it needs. Importing this package imports no stage, so it costs nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What the chain knows of a stage without importing it; `stages/<name>.py` has the function `run(job)`.

    `version` is raised whenever the stage's numerics change: artifacts of an older version are stale.
    """

    parents: tuple[str, ...]
    keys: tuple[str, ...]  # the configuration it may read; all of it is in its fingerprint
    sources: tuple[str, ...] = ()  # keys of data sources whose content is in its fingerprint
    functions: tuple[str, ...] = ()  # keys of reward functions whose source code is in its fingerprint
    version: int = 1
    metric: str = ""  # the metric that tables show
    several_processes: bool = False  # whether several processes can run it together (`launch.processes`)


STAGES = {
    "tokenizer": Stage(
        parents=(),
        keys=("tokenizer", "model.checkpoint", "model.revision", "model.trust_remote_code", "model.gguf_file"),
        sources=("data.text",),
        metric="bytes_per_token",
    ),
    "pretrain": Stage(
        parents=("tokenizer",),
        keys=("pretrain", "model", "precision"),
        sources=("data.text",),
        metric="bits_per_byte",
    ),
    "sft": Stage(
        parents=("pretrain",),
        keys=("sft", "sampling", "data.dialogue", "precision"),
        sources=("data.replies",),
        version=2,
        metric="reply_bits_per_byte",
    ),
    "comparisons": Stage(
        parents=("sft",),
        keys=("comparisons", "sampling", "data.dialogue", "precision"),
        sources=("data.replies", "data.preferences"),
        functions=("comparisons.judge",),
        version=2,
        metric="pairs",
    ),
    "reward": Stage(
        parents=("sft", "comparisons"),
        keys=("reward", "sampling", "precision"),
        version=2,
        metric="accuracy",
    ),
    "dpo": Stage(
        parents=("sft", "comparisons"),
        keys=("dpo", "precision"),
        metric="accuracy",
    ),
    "ppo": Stage(
        parents=("sft", "reward"),
        keys=("ppo", "sampling", "data.dialogue", "precision"),
        sources=("data.replies", "data.text"),
        functions=("ppo.reward",),
        version=2,
        metric="score",
        several_processes=True,
    ),
    "evaluate": Stage(
        parents=("pretrain", "sft", "comparisons", "reward", "dpo", "ppo"),
        keys=("evaluate", "sampling", "data.dialogue", "precision"),
        sources=("data.replies",),
        functions=("evaluate.judge", "evaluate.second_judge"),
        version=2,
        metric="ppo_gold_mean",
    ),
}


def needed_by(target: str) -> list[str]:
    """The stages that `target` needs, itself included, in the order they run."""
    needed = {target}
    for name in reversed(STAGES):
        if name in needed:
            needed.update(STAGES[name].parents)
    return [name for name in STAGES if name in needed]


def depending_on(target: str) -> list[str]:
    """The stages that need `target`, directly or not, in the order they run, without itself."""
    depending = {target}
    for name, stage in STAGES.items():
        if depending & set(stage.parents):
            depending.add(name)
    return [name for name in STAGES if name in depending and name != target]
