"""Ways to decode: several samples of a policy, and which of them is the reply.

N: prompts, n: samples of each.
"""

from collections import Counter
from collections.abc import Hashable
from typing import Any, cast

import numpy as np
from torch import nn

from threefold.columns import Message
from threefold.evaluation.players import Player
from threefold.models import chat
from threefold.rewards import RewardFunction
from threefold.rewards.numeric import number_of
from threefold.sampling import sampler
from threefold.sampling.sampler import Reply
from threefold.schema.stages import SamplingConfig


def samples(
    policy: nn.Module, prompts: list[list[int]], count: int, settings: SamplingConfig, tokenizer: Any, seed: int,
    bar: Any = None,
) -> list[list[Reply]]:  # fmt: skip
    """`count` samples [N][n] of each prompt (token ids), under the sampling `settings`.

    The first n of them are drawn with the same numbers whatever `count` is: best-of-4 chooses among the first four
    samples of best-of-16, and a policy by itself gives the first.
    """
    numbers = sampler.random_numbers(seed, count * len(prompts), settings)
    replies = sampler.sample(policy, prompts * count, settings, tokenizer, numbers, bar)
    return [replies[i :: len(prompts)] for i in range(len(prompts))]


def texts_of(tokenizer: Any, sampled: list[list[Reply]]) -> list[list[str]]:
    """The text [N][n] of each sample."""
    return [[chat.reply_text(tokenizer, reply.ids) for reply in group] for group in sampled]


def scores(
    reward_model: RewardFunction, messages: list[list[Message]], prompts: list[list[int]], sampled: list[list[Reply]],
    texts: list[list[str]],
) -> list[list[float]]:  # fmt: skip
    """The reward model's score [N][n] of each sample; `prompts` are the token ids of `messages`."""
    count = len(sampled[0])
    asked = [i for i in range(len(sampled)) for _ in range(count)]
    flat = reward_model(
        [messages[i] for i in asked],
        [text for group in texts for text in group],
        prompt_ids=[prompts[i] for i in asked],
        completion_ids=[reply.ids for group in sampled for reply in group],
    )
    flat = cast(list[float], flat)  # a reward model, unlike a rule, leaves no reply without a score
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def chosen(player: Player, texts: list[str], scores: list[float] | None) -> int:
    """Which sample of one prompt is the player's reply; equal scores or votes go to the one sampled first."""
    if player.decoding == "best_of":
        assert scores is not None
        return int(np.argmax(scores[: player.count]))
    if player.decoding == "majority":
        return majority([answer(text) for text in texts[: player.count]])
    return 0


def majority(answers: list[Hashable]) -> int:
    """The first place of the answer given most often, of several the one given first (Wang et al. 2022, 2203.11171)."""
    [(most_frequent, _)] = Counter(answers).most_common(1)  # counts in order of first occurrence
    return answers.index(most_frequent)


def answer(text: str) -> Hashable:
    """What a reply answers with: its number as `numeric_match` finds it, or where it has none its words."""
    number = number_of(text)
    return " ".join(text.split()) if number is None else number
