"""All that can be known to be wrong before the first stage starts."""

import functools
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.artifacts.digests import module_of
from threefold.chain.plans import TASKS, Planned
from threefold.config.checks import check_shares
from threefold.data import reading
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import tasks
from threefold.execution import launch
from threefold.rewards.numeric import numeric_match
from threefold.rewards.scores import require_all
from threefold.schema.stages import LABEL_LOSSES
from threefold.stages import STAGES, sources
from threefold.tracking import trackers


def check(config: DictConfig, planned: dict[str, Planned]) -> None:
    """All that can be known to be wrong before the first of the planned stages starts; raises `UserError`."""
    check_processes(config, planned)
    check_pairs(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        trackers.require(config.tracker)
    check_checkpoint(config, planned)
    check_sources(config, planned)
    check_rewards(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        from threefold.chain import preflight  # imports torch

        preflight.check(config, planned)


def check_pairs(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Raise `UserError` where DPO is to be made of replies that were labelled one by one."""
    given, wanted = config.data.preferences, "dpo" in planned and not planned["dpo"].artifact.finished
    if given.path and given.format == "unpaired" and wanted and config.dpo.loss_type not in LABEL_LOSSES:
        raise UserError(
            "data.preferences.format=unpaired: replies that were labelled one by one are no pairs, which "
            f"dpo.loss_type={config.dpo.loss_type} needs; set dpo.loss_type=kto, or target=reward or ppo, or take "
            "dpo out of evaluate.models"
        )


def check_checkpoint(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Look at the checkpoint of model=hf before the first stage that reads it; raises `UserError` for a bad one."""
    if not config.model.checkpoint or all(planned[name].artifact.finished for name in planned if name in READ_IT):
        return
    from threefold.models.loading import check_checkpoint

    if check_checkpoint(config.model) and not set(planned) <= READ_IT:
        raise UserError(
            f"model.checkpoint={config.model.checkpoint}: needs code of its own, and stages after pretrain run none; "
            "set target=pretrain, or take a model whose architecture transformers has"
        )


READ_IT = {"tokenizer", "pretrain"}  # stages that read the checkpoint; later ones read what they made of it


def check_processes(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Hold what several processes would share to what they can, for the stages to be made; raises `UserError`."""
    stages = [name for name, entry in planned.items() if not entry.artifact.finished]
    if any(STAGES[stage].several_processes for stage in stages):
        check_shares(config, stages)
        launch.check(config)


def check_sources(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Read the data of the stages to be made before the first of them starts; raises `UserError` for a bad source.

    A broken file of preferences would otherwise show after pretraining. A source that a finished artifact was made from
    is known to be good, and what is read here stays in memory for the stages, so a good source is read once as before.
    """
    from threefold.data import reading
    from threefold.evaluation import tasks

    proven = {key for entry in planned.values() if entry.artifact.finished for key in sources(entry.stage, config)}
    needed = {key for entry in planned.values() if not entry.artifact.finished for key in sources(entry.stage, config)}
    for key in sorted(needed - proven):
        source = OmegaConf.select(config, key)
        if key.startswith(TASKS):
            tasks.check(key, source)
        elif source.path is not None:
            reading.check(source)
        if key == "data.replies":
            unfinished = {entry.stage for entry in planned.values() if not entry.artifact.finished}
            reading.check_replies(source, config.data.dialogue, _splits_of_replies(unfinished, config))


def _splits_of_replies(stages: set[str], config: DictConfig) -> set[str]:
    """The splits of `data.replies` that some of `stages` take prompts from."""
    given = config.data.preferences.path is not None
    needed = {"sft": {"train", "validation"}, "ppo": {"train"}, "frontier": {"test"}, "evaluate": {"test"}}
    needed["evaluate"] |= {"validation"} if config.evaluate.validation_prompts else set()
    needed["comparisons"] = set() if given else {"train", "validation"}
    return set().union(*(needed.get(stage, set()) for stage in stages))


def check_rewards(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Try the reward functions of the stages to be made before the first of them starts; raises `UserError`."""

    for entry in planned.values():
        for key in STAGES[entry.stage].functions if not entry.artifact.finished else ():
            rewards.load(OmegaConf.select(config, key), rewards.GIVEN[entry.stage])
            check_reward_function(config, entry.stage, key)


NUMERIC = f"{numeric_match.__module__}:{numeric_match.__name__}"
TRAINING = ("comparisons", "ppo")  # these score replies to training prompts, the others to held-out ones
MADE_UP = Example([{"role": "user", "content": "What is 2 + 2?"}], "It is 4.")  # where prompts come from nowhere


def check_reward_function(config: DictConfig, stage: str, key: str) -> None:
    """Have the reward function of `key` score two of the rows that `stage` will give it; raises `UserError`.

    The learned reward model, which is not there yet, gives 0 to all. PPO's reward must apply to each of the rows, and
    where it compares numbers, every answer of the data must be one.
    """
    reward = OmegaConf.select(config, key)
    if rewards.functions(reward) == {"": None} or not _called(config, stage):
        return
    examples = _examples(config, stage)
    _try(json.dumps(OmegaConf.to_container(reward)), stage, json.dumps([[e.prompt, e.reply] for e in examples[:2]]))
    if stage == "ppo" and any(_imported(path) == NUMERIC for path in rewards.functions(reward).values() if path):
        tasks.require_checkable(key, "numeric", [example.reply for example in examples])


def _imported(path: str) -> str:
    """The import path that the configuration calls `path`."""
    module, _, name = path.partition(":")
    return f"{module_of(module)}:{name}"


def _called(config: DictConfig, stage: str) -> bool:
    """Whether `stage` will call its reward functions; the comparisons do not where people label, or have labelled."""
    return stage != "comparisons" or (config.comparisons.label_by == "judge" and config.data.preferences.path is None)


def _examples(config: DictConfig, stage: str) -> list[Example]:
    """Prompts of the split that the stage takes its own from, with the data's replies; at least two."""
    if config.data.replies.path is None:
        return [MADE_UP, MADE_UP]
    examples = reading.prompts(config.data.replies, "train" if stage in TRAINING else "test", config.data.dialogue)
    return examples if len(examples) > 1 else examples * 2


@functools.cache  # the runs of several seeds have the same function
def _try(reward_json: str, stage: str, rows_json: str) -> None:
    config, (prompts, replies) = OmegaConf.create(json.loads(reward_json)), zip(*json.loads(rows_json), strict=True)
    function = rewards.load(config, rewards.GIVEN[stage], _zero)
    # no tokenizer is there yet: bytes stand for tokens
    columns: dict[str, Any] = {
        "answer": list(replies),
        "prompt_ids": [list(prompt[-1]["content"].encode()) for prompt in prompts],
        "completion_ids": [list(reply.encode()) for reply in replies],
    }
    given = {name: columns[name] for name in rewards.GIVEN[stage]}
    scores = function(list(prompts), list(replies), **given)
    if stage == "ppo":
        require_all(rewards.name(config), scores, list(replies))


def _zero(prompts: list[Any], completions: list[str], **columns: Any) -> rewards.Scores:
    return [0.0] * len(completions)
