"""Pools and votes on disk: strict reading, whole lines, torn lines, taking back, one writer."""

import json
import os
from dataclasses import asdict

import pytest
from pools import a_vote, opened, row, vote_on

from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.labelling.votes import Comparison, Journal, Vote, only_writer, read_pool


def test_a_pool_is_read_as_it_was_written(pool):
    rows = read_pool(pool)
    assert [asdict(comparison) for comparison in rows] == [row(i) for i in range(12)]


MALFORMED = [
    ("{", "line 3: is not JSON"),
    ("[]", "line 3: is not a JSON object"),
    (json.dumps({k: v for k, v in row(3).items() if k != "response_b"}), 'line 3: has no "response_b"'),
    (json.dumps(row(3, response_a=None)), 'line 3: "response_a" must be text'),
    (json.dumps(row(3, pair=3)), 'line 3: "pair" must be text'),
    (json.dumps(row(3, prompt="hello")), 'line 3: "prompt" must be a list of {"role", "content"}'),
    (json.dumps(row(3, prompt=[])), 'line 3: "prompt" must be a list'),
    (json.dumps(row(3, prompt=[{"role": "user"}])), 'line 3: "prompt" must be a list'),
    (json.dumps(row(3, split="validation")), "line 3: \"split\" is 'validation'; it must be one of train, test"),
    (json.dumps(row(3, response_a="\ud800")), 'line 3: "response_a" must be text'),
    (json.dumps(row(0)), "line 3: pair pair-0 is on line 1 already"),
]


@pytest.mark.parametrize(("line", "said"), MALFORMED, ids=[said for _, said in MALFORMED])
def test_a_malformed_pool_is_refused_naming_file_and_line(line, said, tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(f"{text}\n" for text in (json.dumps(row(0)), json.dumps(row(1)), line)))
    with pytest.raises(UserError) as caught:
        read_pool(file)
    assert f"{file}, {said}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pool_that_is_not_utf8_or_empty_is_refused(tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_bytes(b'{"pair": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: is not UTF-8"):
        read_pool(file)
    file.write_text("\n\n")
    with pytest.raises(UserError, match="holds no pair"):
        read_pool(file)


def test_a_vote_is_a_line_that_says_everything(pool, votes):
    labelling = opened(pool, votes)
    shown = labelling.next("anna")
    vote_on(labelling, "anna", "first", "kinder – and 雨")
    [line] = read_lines(votes)
    better = shown.first
    assert line[f"response_{line['winner'][-1]}"] == better
    assert line.pop("time").endswith("+00:00")
    chosen = {"winner": "model_a" if shown.a_first else "model_b", "labeller": "anna", "reason": "kinder – and 雨"}
    assert line == asdict(shown.comparison) | chosen


@pytest.mark.parametrize("kept", [1, 9, 10, 60, -1])
def test_a_torn_last_line_is_cut_and_said(kept, votes):
    journal = Journal(votes, Vote)
    for number in range(3):
        journal.append(a_vote(number))
    whole = votes.read_bytes()
    last = whole.splitlines()[-1]
    torn = last[:kept]
    votes.write_bytes(whole + torn)
    again = Journal(votes, Vote)
    assert votes.read_bytes() == whole and len(again.rows) == 3
    assert f"cut an unfinished last line of {len(torn)} bytes" in again.mended


def test_a_last_line_that_lacks_only_its_end_is_kept(votes):
    Journal(votes, Vote).append(a_vote(1))
    whole = votes.read_bytes()
    votes.write_bytes(whole.rstrip(b"\n"))
    again = Journal(votes, Vote)
    assert votes.read_bytes() == whole and again.rows == [a_vote(1)] and not again.mended


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"pair": "1"}\n{"pair": "2', b'{"pair": "1"}\n'])
def test_a_file_that_holds_something_else_is_left_alone(content, votes):
    votes.write_bytes(content)
    with pytest.raises(UserError, match=r"votes\.jsonl, line 1: "):
        Journal(votes, Vote)
    assert votes.read_bytes() == content


def test_a_vote_that_does_not_fit_leaves_the_file_as_it_was(votes, monkeypatch):
    journal = Journal(votes, Vote)
    journal.append(a_vote(1))
    before = votes.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.append(a_vote(2))
    assert votes.read_bytes() == before and journal.rows == [a_vote(1)]


def test_taking_back_keeps_every_other_line_to_the_byte(votes):
    journal = Journal(votes, Vote)
    for number in range(4):
        journal.append(a_vote(number))
    lines = votes.read_bytes().splitlines(keepends=True)
    spaced = json.dumps(json.loads(lines[0]), indent=None, separators=(" , ", " : ")).encode() + b"\r\n"
    votes.write_bytes(spaced + b"".join(lines[1:]))
    Journal(votes, Vote).remove(a_vote(2))
    assert votes.read_bytes() == spaced + lines[1] + lines[3]
    assert [file.name for file in votes.parent.iterdir()] == ["votes.jsonl"]


def test_two_servers_cannot_write_one_file(votes):
    with only_writer(votes), pytest.raises(UserError, match="another threefold label writes to it"), only_writer(votes):
        pass
    with only_writer(votes):
        pass


def test_a_comparison_has_the_columns_of_the_pool():
    assert list(asdict(Comparison(**row(1)))) == list(row(1))
