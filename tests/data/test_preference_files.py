"""A broken file of preferences is answered by the command line on one line, before any stage leaves anything behind."""

import functools
import gzip
import json

import pytest
from data_helpers import A, Q, said, source
from omegaconf import OmegaConf

from threefold import chain, cli
from threefold.artifacts.artifact import Artifact
from threefold.config.compose import compose
from threefold.data import files, reading

COMMAND = ["run", "experiment=smoke", "target=comparisons", "tracker=none"]

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
SCORED = {
    "instruction": "q",
    "completions": [{"response": "a", "overall_score": 2}, {"response": "b", "overall_score": 1}],
}
PANDA = {"instruction": "q", "input": "", "response1": "a", "response2": "b", "annotator1": 1}
BATTLE = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "model_a"}
VOTES = {"question": "q", "passages": [], "prediction 1": "a", "prediction 2": "b", "preference": [1]}


def without(row, column):
    return {key: value for key, value in row.items() if key != column}


def completions(*scores):
    return [{"response": f"r{i}", "overall_score": score} for i, score in enumerate(scores)]


SCORED = {"instruction": "q", "completions": completions(2, 1)}

# format, a good row, a bad row, the reason
ROWS = {
    "missing column": ("preference", PAIR, without(PAIR, "rejected"), "no column rejected beside prompt, chosen"),
    "missing prompt": ("preference", PAIR, without(PAIR, "prompt"), "no column prompt beside chosen, rejected"),
    "empty reply": ("preference", PAIR, PAIR | {"chosen": " \n"}, "chosen is empty"),
    "same reply twice": ("preference", PAIR, PAIR | {"rejected": "a "}, "chosen equals rejected"),
    "number for text": ("preference", PAIR, PAIR | {"prompt": 7}, "prompt is not a list of messages"),
    "null for text": ("preference", PAIR, PAIR | {"chosen": None}, "chosen is empty"),
    "list for text": ("preference", PAIR, PAIR | {"chosen": ["a"]}, "chosen is not a list of messages"),
    "object for text": ("preference", PAIR, PAIR | {"rejected": {"text": "b"}}, "rejected is not a list of messages"),
    "unknown role": ("preference", PAIR, PAIR | {"prompt": [said("bot", "q")]}, "prompt has a role other than system"),
    "no content": ("preference", PAIR, PAIR | {"prompt": [{"role": "user"}]}, "prompt is not a list of messages"),
    "empty content": ("preference", PAIR, PAIR | {"prompt": [said("user", "")]}, "content is empty"),
    "reply of the user": ("preference", PAIR, PAIR | {"chosen": [Q]}, "chosen does not end with an assistant's reply"),
    "two prompts": (
        "preference", PAIR, {"chosen": [Q, A], "rejected": [said("user", "x"), said("assistant", "b")]},
        "chosen and rejected do not share their prompt",
    ),
    "margin below 0": ("preference", PAIR, PAIR | {"margin": -1}, "margin is not above 0"),
    "dialogues of two prompts": (
        "preference_dialogues", HH, HH | {"chosen": "\n\nHuman: x\n\nAssistant: a"},
        "chosen and rejected do not share their prompt",
    ),
    "dialogue without a reply": (
        "preference_dialogues", HH, HH | {"chosen": HH["chosen"] + "\n\nHuman: and?"},
        "chosen does not end with an assistant's reply",
    ),
    "dialogue without marks": ("preference_dialogues", HH, HH | {"chosen": "q a"}, "chosen does not alternate Human:"),
    "score is text": ("ultrafeedback", SCORED, SCORED | {"completions": completions(1, "good")}, "overall_score"),
    "score is NaN": ("ultrafeedback", SCORED, SCORED | {"completions": completions(1, float("nan"))}, "overall_score"),
    "one answer": ("ultrafeedback", SCORED, SCORED | {"completions": completions(1)}, "fewer than two completions"),
    "label outside": ("pandalm", PANDA, PANDA | {"annotator1": 3}, "an annotator's label is not 0, 1 or 2"),
    "no annotator": ("pandalm", PANDA, without(PANDA, "annotator1"), "no column annotator1 beside instruction, input"),
    "winner outside": ("arena", BATTLE, BATTLE | {"winner": "model_c"}, "winner is not model_a, model_b, tie"),
    "no winner": ("arena", BATTLE, without(BATTLE, "winner"), "no column winner beside prompt, response_a"),
    "split outside": ("arena", BATTLE, BATTLE | {"split": "dev"}, "split is not test, validation, train"),
    "vote on no answer": ("finegrained_rlhf", VOTES, VOTES | {"preference": [1, 2, 1]}, "preference does not hold one"),
    "vote outside": ("finegrained_rlhf", VOTES, VOTES | {"preference": ["a"]}, "a vote of preference is not 0, 1 or 2"),
    "one prediction": ("finegrained_rlhf", VOTES, without(VOTES, "prediction 2"), "fewer than two predictions"),
}  # fmt: skip

GOOD_LINES = b"".join(json.dumps(PAIR | {"prompt": f"q {i}"}).encode() + b"\n" for i in range(400))

# file name, its content, the message after the file's path
FILES = {
    "bad JSON": ("p.jsonl", GOOD_LINES + b'{"prompt": "q", \n', "line 401 is not JSON (Expecting property name"),
    "single quotes": ("p.jsonl", b"{'prompt': 'q'}\n", "line 1 is not JSON"),
    "not an object": ("p.jsonl", GOOD_LINES + b'["q", "a", "b"]\n', "line 401 is not a JSON object; every row"),
    "wrong encoding": ("p.jsonl", GOOD_LINES + b'{"prompt": "\xe4"}\n', "line 401 is not UTF-8; save the file in that"),
    "UTF-16": ("p.jsonl", '{"prompt": "q"}'.encode("utf-16"), "line 1 is not UTF-8; save the file in that encoding"),
    "empty": ("p.jsonl", b"", "is empty; give it rows"),
    "blank lines": ("p.jsonl", b"\n  \n\n", "is empty; give it rows"),
    "empty list": ("p.json", b"[]", "is empty; give it rows"),
    "cut gzip": ("p.jsonl.gz", gzip.compress(GOOD_LINES)[:-20], "is no whole gzip file, it ends after line"),
    "not gzip": ("p.jsonl.gz", GOOD_LINES, "is no whole gzip file"),
    "list cut off": ("p.json", b'[\n{"prompt": "q"},\n{"prompt": ', "line 3 is not JSON"),
    "list of texts": ("p.json", b'[{"prompt": "q"},\n"q"]', "line 2 is not a JSON object"),
    "fields too many": ("p.csv", b"prompt,chosen,rejected\nq,a,b\nq,a,b, or c\n", "line 3 has 4 fields, but"),
    "open quote": ("p.csv", b'prompt,chosen,rejected\nq,a,b\nq,"a,b\nq,a,b\n', "line 3 is not CSV"),
    "only a header": ("p.csv", b"prompt,chosen,rejected\n", "is empty; give it rows"),
    "no parquet": ("p.parquet", b"PAR1 and no more", "cannot be read as parquet"),
}  # fmt: skip


composed_once = functools.cache(compose)


def quickly_composed(overrides):
    """The configuration of COMMAND with plain values set on a copy, because composing takes most of the time."""
    config = composed_once(tuple(COMMAND[1:])).copy()
    OmegaConf.set_readonly(config, False)
    config.merge_with_dotlist(overrides[len(COMMAND) - 1 :])
    return config


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """A function of a source's overrides: the one line that answers them; nothing is left behind."""

    def run(path, *overrides, composed=quickly_composed):
        monkeypatch.setattr("threefold.config.compose.compose", composed)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            cli.main(
                [*COMMAND, f"runs={tmp_path}/runs", *(f"data.preferences.{o}" for o in (f"path={path}", *overrides))]
            )
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_refused_with_line_count_reason_and_what_to_do(case, tmp_path, refusal):
    kind, good, bad, reason = ROWS[case]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(["", *(json.dumps(row) for row in (good, good, bad, good, bad)), ""]))
    answer = refusal(file, f"format={kind}")
    assert answer.startswith(f"error: {file}: 2 of 5 rows cannot be used as format={kind}, most often because {reason}")
    assert "(first in pairs.jsonl, line 4); mend them, or set max_unusable_share > 0.400" in answer


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_refused_with_what_and_where(case, tmp_path, refusal):
    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(f"error: {tmp_path / name}: {message}")


def test_a_table_without_a_header_is_told_by_its_columns(tmp_path, refusal):
    (tmp_path / "p.csv").write_text("How are you?,Fine,Bad\nq,a,b\n")
    answer = refusal(tmp_path / "p.csv")
    assert "no column prompt beside How are you?, Fine, Bad" in answer or "no column chosen beside How are" in answer
    assert "(first in p.csv, line 2); mend them, or set format or columns to what it holds" in answer


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("none.jsonl", (), "no such file or folder"),
        ("empty", (), "no data file (.jsonl, .json"),
        ("full", ("splits={train: 'train-*.jsonl'}",), "no data file matches train-*.jsonl"),
        ("full", ("splits={test: p.jsonl}",), "splits names test but not train"),
        ("full/p.jsonl", ("splits={train: p.jsonl}",), "is one file, so it cannot have splits"),
        ("full/p.jsonl", ("format=preferences",), "format=preferences: must be one of text"),
        ("full/p.jsonl", ("format=pandaml",), "(nearest: pandalm)"),
        ("full/p.jsonl", ("format=messages",), "format=messages: holds no pairs; must be one of preference, "),
        ("full/p.jsonl", (), "none of its pairs falls into the test split; give more rows"),
    ],
)
def test_a_source_that_cannot_be_one_is_refused(path, overrides, message, tmp_path, refusal):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/p.jsonl").write_text(json.dumps(PAIR) + "\n")
    assert message in refusal(tmp_path / path, *overrides, composed=compose)


def test_a_folder_with_one_broken_file_is_refused_by_that_file(tmp_path, refusal):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.jsonl").write_bytes(GOOD_LINES)
    (tmp_path / "d/b.jsonl").write_bytes(b"{}\n{")
    assert refusal(tmp_path / "d").startswith(f"error: {tmp_path}/d/b.jsonl: line 2 is not JSON")
    splits = ("splits={train: a.jsonl, test: b.jsonl}",)
    assert refusal(tmp_path / "d", *splits, composed=compose).startswith(
        f"error: {tmp_path}/d/b.jsonl: line 2 is not JSON"
    )


def test_defects_within_the_share_do_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(GOOD_LINES + b'{"prompt": "q", "chosen": "a"}\n')
    made = []
    monkeypatch.setattr("threefold.chain.making.make", lambda config, entry, *rest: made.append(entry.stage))
    monkeypatch.setattr(Artifact, "link_into", lambda self, run: None)
    monkeypatch.setattr("threefold.report.write_report", lambda config: None)
    monkeypatch.setattr("threefold.report.print_table", lambda folder: None)
    sources = [f"data.{source}.path={tmp_path}/p.jsonl" for source in ("text", "replies", "preferences")]
    formats = [f"data.{source}.format=preference" for source in ("text", "replies")]
    cli.main([*COMMAND, f"runs={tmp_path}/runs", *sources, *formats])
    assert made == ["tokenizer", "pretrain", "sft", "comparisons"]


def test_only_data_that_no_finished_stage_was_made_from_is_read_before_the_first_stage(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(GOOD_LINES)
    read = []
    monkeypatch.setattr("threefold.data.reading.check", lambda source: read.append(source.path))
    monkeypatch.setattr("threefold.data.reading.read_all", lambda source: read.append(source.path))
    monkeypatch.setattr("threefold.data.reading.check_replies", lambda *_: None)
    config = compose(["experiment=smoke", f"runs={tmp_path}/runs", f"data.preferences.path={tmp_path}/p.jsonl"])
    planned = chain.plan(config)
    chain.check_sources(config, planned)
    tasks = [task.path for task in config.evaluate.tasks.values()]
    assert read == [f"{tmp_path}/p.jsonl", config.data.replies.path, config.data.text.path, *tasks]
    for stages, left in ((("tokenizer", "pretrain", "sft"), [read[0], *tasks]), (("comparisons",), tasks)):
        for stage in stages:
            planned[stage].artifact.folder.mkdir(parents=True)
            (planned[stage].artifact.folder / "manifest.json").touch()
        read.clear()
        chain.check_sources(config, planned)
        assert read == left


def test_data_is_read_once_for_all_stages(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_bytes(GOOD_LINES)
    opened, read = [], files.read
    monkeypatch.setattr(files, "read", lambda file: opened.append(file.name) or read(file))
    found = source(tmp_path / "p.jsonl", "preference")
    reading.check(found)
    for split in ("train", "validation", "test"):
        assert reading.load(found, split).rows
    assert opened == ["p.jsonl"]
