"""The tutorial and its notebook run as they are written, on the smoke run, and name what stages write."""

import ast
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from documents import documented

from threefold import cli
from threefold.config.names import keys
from threefold.fileio import read_json
from threefold.stages import STAGES

DOCS = Path(__file__).parents[2] / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text()
NOTEBOOK = json.loads((DOCS / "tutorial.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = re.findall(r"^    (?:echo \"(.+)\" \| )?threefold (.+)$", TUTORIAL, re.MULTILINE)
CHANGES = {"more-text": "pretrain", "slow": "sft", "close": "ppo"}  # run of each change: its stage


@pytest.fixture(scope="module")
def place(smoke, tmp_path_factory):
    """A folder with the finished artifacts of the smoke run and an empty docs/, where a notebook starts."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "docs").mkdir()
    (folder / "runs/artifacts").mkdir(parents=True)
    for artifact in (smoke / "artifacts").iterdir():
        if (artifact / "manifest.json").is_file():
            (folder / "runs/artifacts" / artifact.name).symlink_to(artifact.resolve())
    return folder


def show(cell, names):
    """Run a cell as a notebook does; its last expression as text."""
    *before, last = ast.parse(cell).body
    shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(before if shown else [*before, last], []), "cell", "exec"), names)
    return repr(eval(compile(ast.Expression(last.value), "cell", "eval"), names)) if shown else ""


def test_the_notebook_runs(place, monkeypatch):
    monkeypatch.chdir(place / "docs")
    names = {}
    outputs = [show(cell, names) for cell in CELLS]
    assert "ppo.kl_coef 0.05 → 0.5" in "\n".join(outputs)
    for run, stage in CHANGES.items():
        first, changed = (read_json(place / "runs" / name / stage / "metrics.json") for name in ("smoke", run))
        assert first["fingerprint"] != changed["fingerprint"]
    first, longer = (read_json(place / "runs" / name / "pretrain/metrics.json") for name in ("smoke", "more-text"))
    assert longer["train_tokens"] == 2 * first["train_tokens"]
    assert f"a model of {first['parameters'] // 1000} thousand weights" in TUTORIAL


def test_the_commands_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for line, command in COMMANDS:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
        cli.main(shlex.split(command))
        assert capsys.readouterr().out, command
    for run, stage in CHANGES.items():
        assert (place / "runs" / run / stage / "metrics.json").is_file()
    assert "ppo.kl_coef" in (place / "runs/close/report.md").read_text()


def test_notebook_and_tutorial_change_the_same_and_store_no_output():
    stages = "|".join(STAGES)
    of_commands, of_cells = (
        set(re.findall(rf"\b(?:{stages})\.\w+(?==)", "\n".join(texts)))
        for texts in ([command for _, command in COMMANDS], CELLS)
    )
    assert of_commands == of_cells and {key.split(".")[0] for key in of_cells} == set(CHANGES.values())
    assert all(cell.get("outputs", []) == [] for cell in NOTEBOOK["cells"])


def test_what_the_tutorial_names_is_written_or_a_key():
    names = set(re.findall(r"`([a-z_.]+)(?:=[^`]*)?`", TUTORIAL))
    written = {name for stage in STAGES for part in ("", " steps") for name in documented(stage + part)}
    allowed = written | set(keys()) | {"data.text", "data.replies", "experiment", *STAGES}
    assert names <= allowed
