"""Reward functions tried on two rows of the data before the first stage runs, and answers that none could check."""

import functools
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.artifacts.digests import module_of
from threefold.data import reading
from threefold.data.reading import Example
from threefold.evaluation import tasks
from threefold.rewards.numeric import numeric_match
from threefold.rewards.scores import require_all

NUMERIC = f"{numeric_match.__module__}:{numeric_match.__name__}"
TRAINING = ("comparisons", "ppo")  # these score replies to training prompts, the others to held-out ones
MADE_UP = Example([{"role": "user", "content": "What is 2 + 2?"}], "It is 4.")  # where prompts come from nowhere


def check(config: DictConfig, stage: str, key: str) -> None:
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
