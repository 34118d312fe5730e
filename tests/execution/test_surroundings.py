"""What a command meets: variables of launchers, names with signs, damaged files; each is answered in one line."""

import json
import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from threefold import cli
from threefold.config.compose import compose
from threefold.display import parts
from threefold.errors import UserError
from threefold.execution.launch import RANKS, SIZES, leave_launchers
from threefold.fileio import read_json, read_lines
from threefold.labelling import votes_arena
from threefold.report import page
from threefold.runs import sweep_table


@pytest.fixture
def bare(monkeypatch):
    """An environment without launchers."""
    for name in (*SIZES, *RANKS, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", SIZES)
def test_a_launcher_of_several_processes_is_refused_before_any_work(name, bare, capsys):
    bare.setenv(name, "2")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "experiment=smoke"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: {name}=2: says that a launcher started this command")
    assert "Threefold starts its processes itself" in said and said.count("\n") == 1


@pytest.mark.parametrize("value", ["", " ", "0", "1"])
def test_variables_that_say_nothing_are_dropped_so_that_no_library_reads_them(value, bare):
    for name in (*SIZES, *RANKS):
        bare.setenv(name, value)
    leave_launchers()
    assert [name for name in (*SIZES, *RANKS) if name in os.environ] == []


ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_DYNAMO_BACKEND": "x",
    "FORK_LAUNCHED": "",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ACCELERATE.items())
def test_accelerate_is_told_nothing_by_the_environment(name, value, bare):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    bare.setenv("ACCELERATE_USE_CPU", "true")  # so that it must not be what decides
    bare.setenv(name, value)
    leave_launchers()
    assert name not in os.environ and "ACCELERATE_USE_CPU" not in os.environ
    AcceleratorState._reset_state(True)
    assert Accelerator(cpu=True).mixed_precision == "no" and PartialState().num_processes == 1
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("value", ["two", "1.5", "-1"])
def test_a_size_that_is_none_is_refused(value, bare):
    bare.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError, match=rf"^WORLD_SIZE={value}: says"):
        leave_launchers()


def test_a_step_of_slurm_may_number_its_tasks(bare):
    bare.setenv("PMI_SIZE", "2")
    bare.setenv("PMI_RANK", "1")
    bare.setenv("SLURM_STEP_ID", "0")
    leave_launchers()
    assert "PMI_SIZE" not in os.environ and "PMI_RANK" not in os.environ
    bare.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=2"):
        leave_launchers()


def test_commands_that_only_look_do_not_mind(bare, capsys):
    bare.setenv("WORLD_SIZE", "4")
    cli.main(["config", "experiment=smoke"])
    assert "run: smoke" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["smoke/ppo", "smoke/tokenizer", "smoke/variants/seed-2/evaluate", "a/sft/b"])
def test_a_run_is_not_made_inside_a_stage_of_another(run):
    with pytest.raises(UserError, match=rf"^run={run}: .* is a stage of run .*; choose another name$"):
        compose([f"run={run}"])


def test_a_run_may_be_called_like_a_stage_or_within_another_run():
    assert compose(["run=ppo"]).run == "ppo" and compose(["run=smoke/ppo-2"]).run == "smoke/ppo-2"


NAMES = ["a[/b]x", "[bold]x[/bold]", "[red", "a\\[b]", "x:smile:y", "[link=http://h]x[/link]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_brackets_and_colons_are_shown_as_they_are(name, capsys):
    parts.print_rows([("stage", "run"), ("sft", name)])
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_so_are_those_of_a_report_and_of_a_sweep(name, tmp_path, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        Console, "__init__", lambda self, *a, f=Console.__init__, **k: made.append(k) or f(self, *a, **k)
    )
    monkeypatch.setattr(sweep_table, "tables", lambda found: [parts.Table("sweep", "", [("setting",), (name,)], [])])
    monkeypatch.setattr(sweep_table, "sentences", lambda found: [f"Best: {name}"])
    sweep_table.print_result({"failed": [], "runs": []}, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count(name) == 2 and made[-1]["markup"] is made[-1]["emoji"] is False
    monkeypatch.setattr("threefold.report.page.read", lambda folder: SimpleNamespace(models={}))
    monkeypatch.setattr(
        "threefold.report.stages.table", lambda run: parts.Table("stages", "", [("stage",), (name,)], [], texts=1)
    )
    monkeypatch.setattr("threefold.report.evaluation.task_table", lambda run: None)
    monkeypatch.setattr("threefold.report.studies.seeds_section", lambda run: SimpleNamespace(parts=[], points=[name]))
    page.print_table(tmp_path / name.replace("/", ""))
    printed = capsys.readouterr().out
    assert printed.count(name) >= 2 and f"{name.replace('/', '')}/report.html" in printed.replace("\n", "")


DAMAGED = {
    "cut": '{"stage": "pp',
    "empty": "",
    "null bytes": "\0" * 40,
    "a list": "[]",
    "no text": "\udcff",
    "deep": "[" * 99999,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_manifest_is_named_with_what_to_do(content, tmp_path):
    file = tmp_path / "artifacts/ppo-abc/manifest.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/ppo").symlink_to(file.parent)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "smoke/ppo/manifest.json")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/smoke/ppo/manifest.json: is damaged (") and "\n" not in said
    assert said.endswith(f"remove the folder {file.parent}, the same command makes it again")
    other = tmp_path / "sweep.json"
    other.write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: is damaged .*; remove the file, or mend it$"):
        read_json(other)


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: line 3 is damaged"):
        read_lines(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"a": "x\u2028y"}\n\n{"a": 2}')
    assert read_lines(tmp_path / "rows.jsonl") == [{"a": "x\u2028y"}, {"a": 2}]


SAMPLES = [
    '{"prompt": [], "sft"', "[]", "{}", '{"prompt": []}', '{"prompt": [], "sft": "x"}', "3",
    '{"prompt": 1, "sft": {"reply": "x"}}', '{"prompt": [], "sft": {"reply": null}}',
]  # fmt: skip


@pytest.mark.parametrize("row", SAMPLES)
def test_samples_without_replies_are_named_by_line(row, tmp_path):
    file, good = tmp_path / "samples.jsonl", {"prompt": [], "sft": {"reply": "x"}, "ppo": {"reply": "y"}}
    file.write_text(f"{json.dumps(good)}\n")
    assert len(votes_arena.pool(votes_arena.read_samples(file))) == 1
    file.write_text(f"{json.dumps(good)}\n{row}\n")
    with pytest.raises(UserError, match=r"samples\.jsonl: (line|row) 2 is "):
        votes_arena.read_samples(file)
