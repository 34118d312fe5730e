"""Files of every kind read into the same rows with their lines; what is broken is refused by file and line."""

import csv
import gzip
import json

import pytest
from data_helpers import everything, lines, source

from threefold.data import files, reading
from threefold.errors import UserError


def test_the_line_of_an_unusable_row_counts_blank_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n')
    found = reading.load(source(tmp_path / "rows.jsonl", max_unusable_share=1.0), "train").unusable
    assert found["text is empty"]["first_line"] == 3


def test_the_line_of_an_unusable_row_counts_the_header(tmp_path):
    (tmp_path / "rows.csv").write_text('text\none\n" "\n')
    found = reading.load(source(tmp_path / "rows.csv", max_unusable_share=1.0), "train").unusable
    assert found["text is empty"]["first_line"] == 3


def test_the_refusal_of_a_folder_names_the_file(tmp_path):
    lines(tmp_path / "d/a.jsonl", [{"text": "one"}])
    lines(tmp_path / "d/b.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"b\.jsonl.*line 1\b"):
        reading.load(source(tmp_path / "d"), "train")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": ', "is not JSON"),
        (b"{'text': 'single quotes'}", "is not JSON"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8"),
        (b'["a", "list"]', "is not a JSON object"),
        (b'"text"', "is not a JSON object"),
        (b"3", "is not a JSON object"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_broken_line_is_named_by_its_number(name, bad, reason, number, tmp_path):
    content = [b'{"text": "one"}', b'{"text": "two"}', b'{"text": "three"}']
    content[number - 1] = bad
    file = tmp_path / name
    file.write_bytes((gzip.compress if name.endswith("gz") else bytes)(b"\n".join(content) + b"\n"))
    with pytest.raises(UserError) as caught:
        reading.load(source(file), "train")
    assert f"{file}: line {number} {reason}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        pytest.param("rows.jsonl", b"", "text", id="empty file"),
        pytest.param("rows.jsonl.gz", b'{"text": "one"}\n', "text", id="not gzip"),
        pytest.param("rows.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 5000)[:-20], "text", id="cut gzip"),
        pytest.param("rows.jsonl", b'{"text": "one"}\n{"text": "two"}\n', "chitchat", id="rows for chitchat"),
        pytest.param("rows.json", b"[]", "chitchat", id="list for chitchat"),
        pytest.param("rows.json", b'{"1": {"prompt": "p"}}', "chitchat", id="conversation without messages"),
        pytest.param("rows.json", b'{"1": {"messages": 5}}', "chitchat", id="messages that are no list"),
        pytest.param("rows.json", b'{"1": {"messages": [[]]}}', "chitchat", id="turn without messages"),
        pytest.param("rows.json", b'{"1": {"messages": [[{"sender": 1}]]}}', "chitchat", id="message without text"),
        pytest.param("rows.json", b'{"1": {"messages": [], "prompt": 5}}', "chitchat", id="topic that is no text"),
        pytest.param("rows.xyz", b"some text", "text", id="unknown suffix"),
        pytest.param("rows.xyz.gz", b"some text", "text", id="unknown suffix before gz"),
    ],
)
def test_a_file_that_is_no_data_is_refused_on_one_line(name, content, kind, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        reading.load(source(tmp_path / name, kind), "train")


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
def test_other_broken_files_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b'[{"text": ')
    with pytest.raises(UserError, match=name) as caught:
        reading.load(source(tmp_path / name), "train")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unreachable_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        reading.load(source(tmp_path / "rows.jsonl"), "train")
    with pytest.raises(UserError, match="nobody/nothing: neither a file or folder here nor loadable from the hub"):
        reading.load(source("nobody/nothing"), "train")
    with pytest.raises(UserError, match="the package no_such_package is not installed"):
        reading.load(source("package:no_such_package/rows.jsonl"), "train")


def write_csv(file):
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], ["one, two"], ['three "four"']])


def write_parquet(file):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one, two", 'three "four"']}), file)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.csv", write_csv),
        ("rows.parquet", write_parquet),
        ("rows.txt", lambda file: file.write_text('one, two\n\nthree "four"\n')),
        ("rows.json", lambda file: file.write_text(json.dumps([{"text": "one, two"}, {"text": 'three "four"'}]))),
        ("rows.jsonl", lambda file: lines(file, [{"text": "one, two"}, {"text": 'three "four"'}])),
    ],
)
def test_each_kind_of_file_gives_the_same_rows(name, write, tmp_path):
    write(tmp_path / name)
    assert sorted(row["text"] for row in everything(source(tmp_path / name))) == ["one, two", 'three "four"']


def test_paragraphs_of_a_text_file_are_texts_with_their_first_line(tmp_path):
    (tmp_path / "book.txt").write_text("\n\none\ntwo\n \nthree\n")
    assert [(line, row["text"]) for _, line, row in files.read(tmp_path / "book.txt")] == [
        (3, "one\ntwo"),
        (6, "three"),
    ]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 200_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_cannot_hold_is_refused_with_its_line(tmp_path, name, value):
    (tmp_path / name).write_text(f'{{"text": "fine"}}\n{{"text": {value}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl?: line 2 "):
        reading.load(source(tmp_path / name), "train")
