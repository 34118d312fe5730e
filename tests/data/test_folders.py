"""Files whose names say their split are of that split; what is no clear is refused; save_to_disk folders are read."""

import json

import pytest
from data_helpers import lines, source

from threefold.artifacts.digests import source_parts
from threefold.data import reading
from threefold.data.files import split_files
from threefold.errors import UserError

LAYOUTS = {
    "files": ("train.jsonl", "test.jsonl", "validation.jsonl"),
    "other words": ("my-training.jsonl", "Evaluation_set.jsonl", "dev.jsonl"),
    "numbered": ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "val-0.jsonl"),
    "folders": ("train/a.jsonl", "test/a.jsonl", "valid/a.jsonl"),
    "hub": ("data/train-0.jsonl", "data/test-0.jsonl", "data/validation-0.jsonl"),
    "words in one": ("trainset.jsonl", "testData.jsonl", "XYValidation_set.jsonl"),
    "folder first": ("train/of_the_test.jsonl", "test/train.jsonl", "valid/a.jsonl"),
}
SPLITS = ("train", "test", "validation")


def texts_of(found):
    """The texts of each split; validation, where it has no file, is a part of training."""
    return {split: {row["text"] for row in reading.load(found, split).rows} for split in SPLITS}


def fill(folder, names):
    """Files with 60 texts each, which begin with the split of that place; returns the texts by split."""
    texts = {split: {f"{split} {i}" for i in range(60)} for split in SPLITS[: len(names)]}
    for name, rows in zip(names, texts.values(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines(folder / name, [{"text": text} for text in sorted(rows)])
    return texts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_named_after_splits_are_these_splits(layout, tmp_path, capsys):
    texts = fill(tmp_path / "d", LAYOUTS[layout])
    found = source(tmp_path / "d")
    assert texts_of(found) == texts
    reading.check(found)
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/d: splits by the names of its files (") and said.count("\n") == 1
    assert all(f"{split} 1" in said for split in SPLITS)
    with pytest.raises(UserError, match=r"has files for .*, which are kept apart; set split=test"):
        reading.load(found, "all")


def test_validation_without_a_file_is_carved_from_training_and_metadata_is_no_row(tmp_path):
    texts = fill(tmp_path / "d", ("train.jsonl", "test.jsonl"))
    (tmp_path / "d/dataset_infos.json").write_text('{"default": {\n"features": 1}}')
    (tmp_path / "d/README.md").write_text("about")
    found = texts_of(source(tmp_path / "d"))
    assert found["test"] == texts["test"] and found["train"] | found["validation"] == texts["train"]
    assert found["validation"] and not found["train"] & found["validation"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "more.jsonl"),
        ("more.jsonl", "test.jsonl"),
        ("test.jsonl", "dev.jsonl"),
        ("train.jsonl", "train_and_test.jsonl"),
        ("a.jsonl", "test/a.jsonl"),
        ("train.jsonl", "heldout.jsonl"),
        ("train.jsonl", "more.jsonl"),
        ("a.jsonl", "my-held-out.jsonl"),
        ("train/part-0.jsonl", "heldout/part-0.jsonl"),
        ("data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl", "data/test-0.jsonl"),
        ("train_sft-00000-of-00001-a1.jsonl", "train_gen-00000-of-00001-b2.jsonl"),
    ],
)
def test_names_that_are_not_clear_are_refused_and_splits_decide(names, tmp_path):
    fill(tmp_path / "d", names)
    with pytest.raises(
        UserError, match=r"are named after splits, not all clearly: .*; set splits, for example"
    ) as caught:
        reading.load(source(tmp_path / "d"), "train")
    assert "\n" not in str(caught.value)
    assert reading.load(source(tmp_path / "d", splits={"train": "**/*.jsonl"}), "train").rows


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (("train/part-0.jsonl", "rest/part-0.jsonl"), "rest/part-0.jsonl"),
        (("x.jsonl", "data/train/a.jsonl", "data/test/b.jsonl"), "data/test/b.jsonl"),
        (("all.jsonl", "de/train.jsonl", "en/train.jsonl"), "de/train.jsonl"),
    ],
)
def test_a_folder_below_is_not_left_out_silently(names, unread, tmp_path):
    texts = fill(tmp_path / "d", names)
    with pytest.raises(UserError, match=f"/d: {unread} is in a folder that is not read; set splits, for") as caught:
        reading.load(source(tmp_path / "d"), "train")
    assert "\n" not in str(caught.value)
    whole = texts_of(source(tmp_path / "d", splits={"train": "**/*"}))
    assert set().union(*whole.values()) == set().union(*texts.values())


def test_hidden_files_and_texts_about_the_data_are_no_rows(tmp_path):
    texts = fill(tmp_path / "d", ("train-00000-of-00002-a1.jsonl", "train-00001-of-00002-b2.jsonl"))
    for name in ("._a.jsonl", ".train.jsonl", "README.txt", "LICENSE-MIT.txt", "requirements.txt", ".cache/a.jsonl"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text("no row")
    for options in ({}, {"splits": {"train": "*"}}):
        found = texts_of(source(tmp_path / "d", **options))
        assert set().union(*found.values()) == set().union(*texts.values())


@pytest.mark.parametrize(
    "names", [("a.jsonl", "b.jsonl"), ("train-0.jsonl", "train-1.jsonl"), ("contest.jsonl", "latest.jsonl")]
)
def test_a_folder_without_a_held_out_file_is_split_by_the_hash_as_before(names, tmp_path):
    texts = fill(tmp_path / "d", names)
    assert list(split_files(str(tmp_path / "d"), {})) == ["all"]
    found = texts_of(source(tmp_path / "d"))
    assert all(found.values()) and set().union(*found.values()) == set().union(*texts.values())
    assert "named" not in source_parts(source(tmp_path / "d"))


def test_renaming_a_file_so_that_its_split_changes_changes_the_fingerprint(tmp_path):
    fill(tmp_path / "d", ("train-a.jsonl", "validation-b.jsonl", "test-c.jsonl"))
    before = source_parts(source(tmp_path / "d"))
    (tmp_path / "d/train-a.jsonl").rename(tmp_path / "d/held")
    (tmp_path / "d/validation-b.jsonl").rename(tmp_path / "d/train-b.jsonl")
    (tmp_path / "d/held").rename(tmp_path / "d/a-validation.jsonl")
    assert source_parts(source(tmp_path / "d"))["content"] != [] and source_parts(source(tmp_path / "d")) != before


def chats(split):
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}]
    return [{"messages": [turns[0] | {"content": f"{split} {i}"}, turns[1]]} for i in range(60)]


def asked(found, split):
    return {row["messages"][0]["content"] for row in reading.load(found, split).rows}


def test_a_folder_of_save_to_disk_is_read_with_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = {split: Dataset.from_list(chats(split)) for split in ("train", "test")}
    DatasetDict(saved).save_to_disk(tmp_path / "both")
    saved["train"].select(range(3, 60)).save_to_disk(tmp_path / "one")
    both, one = source(tmp_path / "both", "messages"), source(tmp_path / "one", "messages")
    assert asked(both, "test") == {f"test {i}" for i in range(60)}
    assert asked(both, "train") | asked(both, "validation") == {f"train {i}" for i in range(60)}
    assert set().union(*(asked(one, split) for split in SPLITS)) == {f"train {i}" for i in range(3, 60)}
    named = source(tmp_path / "both", "messages", splits={"train": "test"})
    assert asked(named, "train") <= {f"test {i}" for i in range(60)}
    assert len({json.dumps(source_parts(found), default=dict) for found in (both, one, named)}) == 3


def test_a_folder_of_save_to_disk_that_cannot_be_read_or_has_other_splits_is_one_line(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({name: Dataset.from_list(chats(name)) for name in ("train_sft", "train_prefs", "test")}).save_to_disk(
        tmp_path / "several"
    )
    with pytest.raises(UserError, match=r"named after splits, not all clearly: .*; set splits, for example splits="):
        reading.load(source(tmp_path / "several", "messages"), "train")
    chosen = source(tmp_path / "several", "messages", splits={"train": "train_sft", "test": "test"})
    assert asked(chosen, "test") == {f"test {i}" for i in range(60)}
    for table in (tmp_path / "several/test").glob("*.arrow"):
        table.write_bytes(b"no table")
    with pytest.raises(
        UserError, match=r"several/test: is a folder of datasets.save_to_disk that cannot be read"
    ) as caught:
        reading.load(source(tmp_path / "several", "messages", splits={"train": "test"}), "train")
    assert "\n" not in str(caught.value) and "export it with to_parquet" in str(caught.value)
