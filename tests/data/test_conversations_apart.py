"""Rows of one conversation, cut off at other turns, lie in one split in every format; what does overlap is counted."""

import itertools

import numpy as np
import pytest
from data_helpers import lines, said, source

from threefold.data import reading
from threefold.data.preferences import Pair
from threefold.evaluation import checkup
from threefold.stages.comparisons import not_held_out

DEPTHS, CONVERSATIONS = (1, 3, 5), 120


def prompt_of(number, depth):
    """A greeting and a system message that all share, and `depth` turns of a conversation that is the number's own."""
    turns = [said(("user", "assistant")[i % 2], f"turn {i} of {number}") for i in range(depth)]
    return [said("system", "Be brief."), said("assistant", "How can I help?"), *turns]


def transcript(prompt, reply):
    names = {"user": "Human", "assistant": "Assistant"}
    spoken = [m for m in prompt if m["role"] in names][1:]  # the format begins with Human
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in [*spoken, said("assistant", reply)])


A, B = said("assistant", "yes"), said("assistant", "no")
SCORES = {"score_chosen": 2, "score_rejected": 1}
RAW = {
    "preference": lambda prompt: {"prompt": prompt, "chosen": [A], "rejected": [B]},
    "ultrafeedback": lambda prompt: {"chosen": [*prompt, A], "rejected": [*prompt, B], **SCORES},
    "arena": lambda prompt: {"conversation_a": [*prompt, A], "conversation_b": [*prompt, B], "winner": "model_a"},
    "unpaired": lambda prompt: {"prompt": prompt, "completion": [A], "label": True},
    "prompt_completion": lambda prompt: {"prompt": prompt, "completion": [A]},
    "messages": lambda prompt: {"messages": [*prompt, A]},
    "preference_dialogues": lambda prompt: {"chosen": transcript(prompt, "yes"), "rejected": transcript(prompt, "no")},
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_a_conversation_lies_in_one_split_whatever_its_depth(kind, tmp_path):
    rows = [RAW[kind](prompt_of(n, depth)) for depth, n in itertools.product(DEPTHS, range(CONVERSATIONS))]
    found = source(lines(tmp_path / "rows.jsonl", rows), kind)
    conversations = {}
    for split in ("train", "validation", "test"):
        turns = [row.get("messages") or row["prompt"] for row in reading.load(found, split).rows]
        conversations[split] = [next(m["content"] for m in t if m["role"] == "user") for t in turns]
    assert all(conversations.values()) and sum(map(len, conversations.values())) == len(rows)
    sets = [set(named) for named in conversations.values()]
    assert sum(map(len, sets)) == len(set().union(*sets)) == CONVERSATIONS


def pair(prompt, rejected_prompt=None):
    return Pair(prompt, "yes", "no", None, "dataset", rejected_prompt)


@pytest.mark.parametrize("form", [list, lambda prompt: prompt[2:]], ids=["greeted", "plain"])
def test_prompts_that_begin_or_continue_one_another_overlap(form):
    shallow, middle, deep = (form(prompt_of(1, depth)) for depth in DEPTHS)
    other, branched = form(prompt_of(2, 3)), [*shallow, said("assistant", "else"), said("user", "well?")]
    for held_out in (shallow, middle, deep):
        train = [pair(shallow), pair(middle), pair(other), pair(other, deep), pair(deep)]
        assert not_held_out(train, [pair(held_out)]) == [pair(other)]
        found = checkup.accuracy(np.ones(2), np.zeros(2), [pair(other), pair(middle)], [pair(held_out), pair(held_out)])
        assert found["train_overlap"] == 1
    assert not_held_out([pair(branched)], [pair(middle)]) == [pair(branched)]  # neither is the beginning of the other
    apart = checkup.accuracy(np.ones(2), np.zeros(2), [pair(other)], [pair(middle), pair(branched)])
    assert apart["train_overlap"] == 0
