"""Each format read into texts, dialogues or pairs; each defect of a row with its reason; chat messages left out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import A, Q, conversations, everything, lines, said, source, spoken

from threefold.columns import UnusableRowError
from threefold.data import reading
from threefold.data.formats import FORMATS

GOOD = [
    ("text", {"text": " hi\n"}, {"key": "hi", "text": "hi"}),
    ("prompt_completion", {"prompt": "q", "completion": " a "}, {"key": "q", "messages": [Q, A], "symmetric": False}),
    ("prompt_completion", {"prompt": [Q], "completion": [A]}, {"key": "q", "messages": [Q, A], "symmetric": False}),
    ("messages", {"messages": [Q, A, Q, A]}, {"key": "q", "messages": [Q, A, Q, A], "symmetric": False}),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"key": "q", "prompt": [Q], "chosen": "a", "rejected": "b"},
    ),
    (
        "preference",
        {"prompt": [Q, A, Q], "chosen": [Q, A, Q, A], "rejected": [said("assistant", "b")]},
        {"key": "q", "prompt": [Q, A, Q], "chosen": "a", "rejected": "b"},
    ),
    (
        "preference_dialogues",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n"},
        {"key": "q", "prompt": [Q], "chosen": "a", "rejected": "b"},
    ),
]

TURNS = "\n\nHuman: q\n\nAssistant: a"
DEFECTS = [
    ("text", {}, "no column text"),
    ("text", {"text": 3}, "text is not text"),
    ("text", {"text": " \n"}, "text is empty"),
    ("prompt_completion", {"completion": "a"}, "no column prompt"),
    ("prompt_completion", {"prompt": [], "completion": "a"}, "prompt is empty"),
    ("prompt_completion", {"prompt": " ", "completion": "a"}, "prompt is empty"),
    ("prompt_completion", {"prompt": 3, "completion": "a"}, "prompt is not a list of messages with role and content"),
    ("prompt_completion", {"prompt": [{"role": "user"}], "completion": "a"}, "prompt is not a list of messages"),
    ("prompt_completion", {"prompt": [said("bot", "q")], "completion": "a"}, "prompt has a role other than"),
    ("prompt_completion", {"prompt": [said("user", None)], "completion": "a"}, "content is not text"),
    ("prompt_completion", {"prompt": "q"}, "no column completion"),
    ("prompt_completion", {"prompt": "q", "completion": ""}, "completion is empty"),
    ("messages", {}, "no column messages"),
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": [Q]}, "no assistant turn"),
    ("messages", {"messages": [said("tool", "x"), A]}, "messages has a role other than system, user, assistant"),
    ("messages", {"messages": [Q, said("assistant", " ")]}, "content is empty"),
    ("preference", {"chosen": "a", "rejected": "b"}, "no column prompt"),
    ("preference", {"prompt": "q", "rejected": "b"}, "no column chosen"),
    ("preference", {"prompt": "q", "chosen": "a"}, "no column rejected"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": " a "}, "chosen equals rejected"),
    ("preference_dialogues", {"rejected": TURNS}, "no column chosen"),
    ("preference_dialogues", {"chosen": "q and a", "rejected": TURNS}, "chosen does not alternate"),
    ("preference_dialogues", {"chosen": f"hey{TURNS}", "rejected": TURNS}, "chosen does not alternate"),
    ("preference_dialogues", {"chosen": f"{TURNS}\n\nHuman: q", "rejected": TURNS}, "chosen does not end with"),
    ("preference_dialogues", {"chosen": TURNS, "rejected": "\n\nHuman: q\n\nAssistant: "}, "rejected does not end"),
    (
        "preference_dialogues",
        {"chosen": TURNS, "rejected": "\n\nHuman: x\n\nAssistant: a"},
        "chosen and rejected do not share",
    ),
    ("preference_dialogues", {"chosen": TURNS, "rejected": TURNS}, "chosen equals rejected"),
]


@pytest.mark.parametrize(("kind", "raw", "row"), GOOD)
def test_a_good_row_of_each_format(kind, raw, row, tmp_path):
    assert FORMATS[kind](raw, Counter()) == [row]
    assert everything(source(lines(tmp_path / "rows.jsonl", [raw]), kind)) == [row]


@pytest.mark.parametrize(("kind", "raw", "reason"), DEFECTS)
def test_each_defect_of_each_format_has_its_reason(kind, raw, reason):
    with pytest.raises(UnusableRowError) as caught:
        FORMATS[kind](raw, Counter())
    assert str(caught.value).startswith(reason)


def test_a_conversation_is_its_topic_and_turns_that_end_with_the_assistant(tmp_path):
    turns = [("x", "Hello", "there"), ("y", "Hi"), ("y", "How are you?"), ("x", "Fine")]
    (row,) = everything(conversations(tmp_path, turns, topic="Weather"))
    assert row["messages"] == [
        said("system", "Weather"),
        said("assistant", "Hello\nthere"),
        said("user", "Hi\nHow are you?"),
        said("assistant", "Fine"),
    ]
    assert row["key"] == "id 0" and row["symmetric"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("see https://a.example/b", "address or markup"),
        ("see WWW.A.example", "address or markup"),
        ("write to me@mail.example", "address or markup"),
        ("<b>bold</b>", "address or markup"),
        ("[here](there)", "address or markup"),
        ("this is shit", "profanity"),
        ("SHIT!", "profanity"),
        (" ", "empty message"),
    ],
)
def test_a_message_that_is_unfit_is_left_out_and_counted(message, reason, tmp_path):
    found = conversations(tmp_path, [("x", "Hello there"), ("y", "Good evening", message), ("x", "How are you?")])
    (row,) = everything(found)
    assert spoken(row) == ["Hello there", "Good evening", "How are you?"]
    assert reading.load(found, "train").unusable == {f"message dropped: {reason}": {"count": 1}}


@pytest.mark.parametrize("message", ["Scunthorpe is nice", "3 < 4, I <3 it", "at 5 @ the corner", "a [note] here"])
def test_a_message_that_only_looks_unfit_is_kept(message, tmp_path):
    (row,) = everything(conversations(tmp_path, [("x", "Hello there"), ("y", message)]))
    assert spoken(row) == ["Hello there", message]


def test_a_conversation_is_cut_where_a_whole_turn_falls_away(tmp_path):
    turns = [
        ("x", "one"),
        ("y", "two"),
        ("x", "www.a.example"),
        ("y", "four"),
        ("x", "five"),
        ("y", "shit"),
        ("x", "7"),
    ]
    found = conversations(tmp_path, turns)
    assert [spoken(row) for row in everything(found)] == [["one", "two"], ["four", "five"]]
    counts = {reason: entry["count"] for reason, entry in reading.load(found, "train").unusable.items()}
    assert counts == {"message dropped: address or markup": 1, "message dropped: profanity": 1}


def test_no_context_spans_a_turn_that_fell_away_between_turns_of_one_sender(tmp_path):
    turns = [("x", "one"), ("y", "two"), ("x", "www.a.example"), ("x", "three"), ("y", "four")]
    assert [spoken(row) for row in everything(conversations(tmp_path, turns))] == [["one", "two"], ["three", "four"]]


DOCS = (Path(__file__).parents[2] / "docs/data.md").read_text()
EXAMPLES = re.findall(r"^### (\w+)\n(?:(?!^#).)*?```json\n(.*?)```", DOCS, re.MULTILINE | re.DOTALL)


def test_the_documentation_has_every_format():
    assert set(re.findall(r"^### (\w+)$", DOCS, re.MULTILINE)) == set(FORMATS)
    assert {kind for kind, _ in EXAMPLES} == set(FORMATS) - {"chitchat"}


@pytest.mark.parametrize(("kind", "rows"), EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_the_examples_of_the_documentation_are_rows_of_their_format(kind, rows):
    read = [FORMATS[kind](json.loads(row), Counter()) for row in rows.splitlines()]
    assert len(read) == 2 and all(read)
