"""Artifacts appear whole or not at all, their fingerprint covers their parts, and locks end with their holder."""

import hashlib
import math
import os
import signal
import subprocess
import sys
import threading

import pytest

from threefold.artifacts.artifact import Artifact, fingerprint_of
from threefold.errors import UserError
from threefold.fileio import read_json, read_lines, write_json, write_lines

HOLDER = """
import sys, time
from pathlib import Path
from threefold.artifacts.artifact import Artifact
with Artifact(Path(sys.argv[1]), "sft", "abc").lock():
    print("held", flush=True)
    time.sleep(60)
"""


def made(runs, fingerprint):
    artifact = Artifact(runs, "sft", fingerprint)
    artifact.open()
    (artifact.out / "model").write_text(fingerprint)
    artifact.finish({"fingerprint": fingerprint})
    return artifact


def test_fingerprint_is_the_digest_of_canonical_json():
    canonical = '{"a": 1, "b": {"c": null, "d": [0.5, "x"]}}'
    parts = {"b": {"d": [0.5, "x"], "c": None}, "a": 1}
    assert fingerprint_of(parts) == hashlib.sha256(canonical.encode()).hexdigest()[:12]


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint_of({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint_of({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    "other", [{"a": 2, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": "1", "b": [1, 2]}, {"a": 1}, {"A": 1, "b": [1, 2]}]
)
def test_fingerprint_changes_with_any_value(other):
    assert fingerprint_of({"a": 1, "b": [1, 2]}) != fingerprint_of(other)


def test_finish_moves_the_whole_folder_in_one_step(tmp_path):
    artifact = Artifact(tmp_path, "sft", "abc")
    artifact.open()
    (artifact.out / "model").write_text("weights")
    assert not artifact.finished and not artifact.folder.exists()
    being_made = artifact.out.stat().st_ino
    artifact.finish({"stage": "sft"})
    assert artifact.finished
    assert artifact.folder.stat().st_ino == being_made
    assert sorted(f.name for f in artifact.folder.iterdir()) == ["manifest.json", "model"]
    assert read_json(artifact.folder / "manifest.json") == {"stage": "sft"}
    assert not artifact.work.exists()


def test_an_artifact_whose_manifest_cannot_be_written_does_not_appear(tmp_path):
    artifact = Artifact(tmp_path, "sft", "abc")
    artifact.open()
    with pytest.raises(TypeError):
        artifact.finish({"stage": object()})
    assert not artifact.folder.exists() and artifact.out.is_dir()


def test_a_folder_without_manifest_is_not_finished(tmp_path):
    artifact = Artifact(tmp_path, "sft", "abc")
    artifact.folder.mkdir(parents=True)
    assert not artifact.finished


def test_open_keeps_what_an_interrupted_attempt_left_and_forgets_its_failure(tmp_path):
    artifact = Artifact(tmp_path, "sft", "abc")
    artifact.open()
    (artifact.checkpoints / "step").write_text("10")
    (artifact.work / "failed.txt").write_text("out of memory\n")
    assert artifact.failure == "out of memory"
    artifact.open()
    assert artifact.failure is None
    assert (artifact.checkpoints / "step").read_text() == "10"


def test_a_link_replaces_an_older_one_and_survives_a_move_of_the_folder(tmp_path):
    runs = tmp_path / "runs"
    first, second = made(runs, "aaa"), made(runs, "bbb")
    for artifact in (first, second):
        artifact.link_into(runs / "demo")
    assert [f.name for f in (runs / "demo").iterdir()] == ["sft"]
    assert (first.folder / "model").read_text() == "aaa"
    runs.rename(tmp_path / "moved")
    assert (tmp_path / "moved/demo/sft/model").read_text() == "bbb"


def test_a_link_is_there_at_every_moment_while_it_is_replaced(tmp_path):
    both = made(tmp_path, "aaa"), made(tmp_path, "bbb")
    both[0].link_into(tmp_path / "demo")
    seen, missed, stop = set(), [], threading.Event()

    def watch():
        while not stop.is_set():
            try:
                seen.add((tmp_path / "demo/sft/model").read_text())
            except OSError as error:
                missed.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(1000):
        both[i % 2].link_into(tmp_path / "demo")
    stop.set()
    watcher.join()
    assert not missed and seen <= {"aaa", "bbb"} and seen


def test_a_link_half_made_by_a_killed_process_of_the_same_id_is_no_obstacle(tmp_path):
    artifact = made(tmp_path, "aaa")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / f".sft.{os.getpid()}").symlink_to("nowhere")
    artifact.link_into(tmp_path / "demo")
    assert (tmp_path / "demo/sft/model").read_text() == "aaa"


def test_running_while_another_process_holds_the_lock_and_not_after_its_kill(tmp_path):
    artifact = Artifact(tmp_path, "sft", "abc")
    assert not artifact.running
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert artifact.running
        assert not Artifact(tmp_path, "sft", "another").running
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=30)
    assert not artifact.running


@pytest.mark.parametrize(
    ("write", "read", "old", "new"),
    [(write_json, read_json, {"a": [1, 2, 3]}, {"б": "é"}), (write_lines, read_lines, [{"a": 1}] * 3, [{"б": "é\n"}])],
)
def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path, write, read, old, new):
    file = tmp_path / "metrics.json"
    write(file, old)
    write(file, new)
    assert read(file) == new
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("write", "read"), [(write_json, read_json), (write_lines, read_lines)])
def test_content_that_cannot_be_written_leaves_the_old_file_as_it_was(tmp_path, write, read):
    write(tmp_path / "file", [{"a": 1}])
    with pytest.raises(TypeError):
        write(tmp_path / "file", [{"a": 2}, {"a": object()}])
    assert read(tmp_path / "file") == [{"a": 1}]


@pytest.mark.parametrize(("write", "read"), [(write_json, read_json), (write_lines, read_lines)])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_refused_with_its_place_as_json_has_no_word_for_it(tmp_path, write, read, number):
    write(tmp_path / "scores.json", [{"a": 1}])
    rows = [{"models": {"ppo": {"gold_ci95": [0.5, number]}}}]
    with pytest.raises(UserError, match=rf"^scores.json: .*models.ppo.gold_ci95.1 is {number}, no finite number; look"):
        write(tmp_path / "scores.json", rows)
    assert read(tmp_path / "scores.json") == [{"a": 1}] and len(list(tmp_path.iterdir())) == 1


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path):
    assert read_lines(tmp_path / "log.jsonl") == []
