"""Which prompts belong together, which replies to one prompt are put side by side, and which of the two is better."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from threefold.data.formats import Message
from threefold.data.preferences import Pair


@dataclass(frozen=True)
class Answer:
    """A reply to a prompt, and who gave it: the name of a model, or people."""

    prompt: list[Message]
    reply: str
    model: str


@dataclass(frozen=True)
class Candidate:
    """Two replies to one prompt, in no order; differences are those of `one` less those of `other`."""

    one: Answer
    other: Answer
    gap: float | None  # difference of the judge's scores; None where no judge says
    scored: np.ndarray | None = None  # difference of the scores of each member of a reward model [members]


def judged(groups: list[list[Answer]], judge: Callable[..., list[float | None]]) -> list[list[float | None]]:
    """The judge's score of every answer, by group; each answer is judged once, beside the messages before it."""
    flat = [answer for group in groups for answer in group]
    rows = {"prompts": [a.prompt for a in flat], "completions": [a.reply for a in flat]}
    scores = iter(judge(**rows) if flat else [])
    return [[next(scores) for _ in group] for group in groups]


def ranked(groups: list[list[Answer]], models: list[str]) -> list[list[float | None]]:
    """In place of a judge's scores: the place of each answer's model among `models`, the better the later.

    Geng et al. 2025 (arXiv 2507.06187): what is learnt from is the difference of two models, weak as both may be.
    """
    return [[float(models.index(answer.model)) for answer in group] for group in groups]


def candidates(
    group: list[Answer], judged: list[float | None] | None, scored: np.ndarray | None = None
) -> list[Candidate]:
    """All pairs of a group's answers that the judge, where there is one, has a score for.

    `judged` are the judge's scores [answers], `scored` those of a reward model's members [answers, members].
    """
    scores = None if judged is None else {i: score for i, score in enumerate(judged) if score is not None}
    return [
        Candidate(
            group[i],
            group[j],
            None if scores is None else scores[i] - scores[j],
            None if scored is None else scored[i] - scored[j],
        )
        for i, j in itertools.combinations(range(len(group)) if scores is None else scores, 2)
    ]


def usable(candidate: Candidate, min_gap: float) -> bool:
    """Whether the replies differ and the judge, where there is one, prefers one of them by at least `min_gap`."""
    if candidate.one.reply == candidate.other.reply:
        return False
    return candidate.gap is None or (candidate.gap != 0 and abs(candidate.gap) >= min_gap)


def taken(comparable: list[Candidate], most: int, pairing: str, generator: np.random.Generator) -> list[Candidate]:
    """The `most` candidates that come first by `pairing`; of equal ones those that come first in the list.

    best_worst: largest gap, by the reward model where there is one and by the judge otherwise. random: any. uncertain:
    where the members of the reward model agree least on which reply is better, by the standard deviation of their
    differences (Gleave and Irving 2022, arXiv 2203.07472).
    """
    if pairing == "random":
        return [comparable[i] for i in generator.permutation(len(comparable))[:most]]
    if pairing == "uncertain":
        return sorted(comparable, key=lambda c: -cast(np.ndarray, c.scored).std())[:most]
    return sorted(comparable, key=lambda c: -abs(cast(float, c.gap) if c.scored is None else c.scored.mean()))[:most]


def labelled(candidate: Candidate, source: str) -> Pair:
    """The pair with the judge's label."""
    gap = cast(float, candidate.gap)
    better, worse = (candidate.one, candidate.other) if gap > 0 else (candidate.other, candidate.one)
    return Pair(better.prompt, better.reply, worse.reply, abs(gap), source)


def with_label_noise(pairs: list[Pair], share: float, generator: np.random.Generator) -> tuple[list[Pair], int]:
    """The pairs with the labels of about a `share` of them exchanged, and how many were."""
    flips = generator.random(len(pairs)) < share
    noisy = [p.exchanged() if flip else p for p, flip in zip(pairs, flips, strict=True)]
    return noisy, int(flips.sum())


def pool_row(candidate: Candidate, split: str, swap: bool) -> dict[str, Any]:
    """A pair as people are asked to compare it; with `swap` the second reply comes first."""
    a, b = (candidate.other, candidate.one) if swap else (candidate.one, candidate.other)
    content = json.dumps([a.prompt, *sorted([a.reply, b.reply])], ensure_ascii=False)
    return {
        "pair": hashlib.sha256(content.encode()).hexdigest()[:12],
        "prompt": a.prompt,
        "response_a": a.reply,
        "response_b": b.reply,
        "model_a": a.model,
        "model_b": b.model,
        "split": split,
    }


def overlapping(prompts: list[list[Message]], others: list[list[Message]]) -> list[bool]:
    """Of each prompt whether it equals, begins or continues one of `others`: then both are of one conversation."""
    conversations = {_turns(other) for other in others}
    beginnings = {turns[:end] for turns in conversations for end in range(1, len(turns) + 1)}
    return [
        turns in beginnings or any(turns[:end] in conversations for end in range(1, len(turns)))
        for turns in map(_turns, prompts)
    ]


def _turns(prompt: list[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in prompt)
