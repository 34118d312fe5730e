"""The command line answers help, status and mistakes at once, on one line, without torch and without a traceback."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.errors import UserError

# runs the command line and says on the last line of stdout whether torch was imported
TOLD = """
import sys
from threefold import cli
try:
    cli.main(sys.argv[1:])
finally:
    print("\\ntorch" if "torch" in sys.modules else "\\nno torch", file=sys.stdout)
"""


def answer(*arguments, code=TOLD):
    """Exit status, stdout, stderr and seconds of processor time of `threefold ARGUMENTS`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "usage: threefold COMMAND [KEY=VALUE ...]"),
        (("--help",), "usage: threefold COMMAND [KEY=VALUE ...]"),
        (("config", "experiment=smoke", "ppo.kl_coef=0.2"), "  kl_coef: 0.2\n"),
        (("status", "experiment=smoke", "runs={tmp}/runs"), "tokenizer"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, tuple) else "",
)
def test_an_answer_comes_soon_without_torch(arguments, said, tmp_path):
    status, out, err, seconds = answer(*(a.format(tmp=tmp_path) for a in arguments))
    assert (status, err) == (0, "")
    assert said in out and out.endswith("\nno torch\n")
    assert seconds < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bogus",), "error: bogus: no such command; there are run, "),
        (("stauts",), "error: stauts: no such command (nearest: status); there are run, "),
        (("run", "ppo.kl_cof=0.1"), "error: ppo.kl_cof is not a configuration key (nearest: ppo.kl_coef)"),
        (("status", "model=tyny"), "error: model=tyny: no such choice (nearest: tiny); there are gpt2, hf, llama_"),
        (("config", "--foo"), "error: --foo: no such option; overrides are written KEY=VALUE"),
        (("report", "run=none", "runs={tmp}"), "error: run=none: there is no such run; `threefold runs` lists them"),
        (("status", "run=none", "runs={tmp}"), "error: run=none: there is no such run; `threefold runs` lists them\n"),
        (
            ("chat", "experiment=smoke", "runs={tmp}", "chat.seed=3"),
            "error: chat.model=ppo: run smoke has no ppo yet; make it with: "
            'make ppo ARGS="experiment=smoke runs={tmp}"\n',
        ),
        (
            ("chat", "chat.model=ppo_best_off_8"),
            "error: chat.model: ppo_best_off_8 must be one of base, sft,",
        ),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_answered_soon_on_one_line_without_torch(arguments, message, tmp_path):
    status, out, err, seconds = answer(*(a.format(tmp=tmp_path) for a in arguments))
    assert status == 2
    assert err.startswith(message.format(tmp=tmp_path)) and err.count("\n") == 1
    assert out == "\nno torch\n"
    assert seconds < 5


def test_the_installed_command_and_the_module_are_the_command_line():
    commands = [[sys.executable, "-m", "threefold"]]
    if (script := Path(sys.executable).with_name("threefold")).exists():
        commands.append([script])
    for command in commands:
        done = subprocess.run([*command, "bogus"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error: bogus: no such command")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    others = {
        "status",
        "submit",
        "cancel",
        "report",
        "frontier",
        "label",
        "chat",
        "dashboard",
        "sync",
        "config",
        "runs",
    }
    assert set(cli.COMMANDS) == {"run", "sweep"} | others
    assert all(f"\n  {name}" in shown and text in shown for name, (_, text) in cli.COMMANDS.items())


def test_hydras_own_options_are_answered(capsys):
    for line in (["run", "seed=7", "--cfg", "job"], ["seed=7", "-c", "job"], ["report", "seed=7", "-c", "job"]):
        assert cli._parse(line) == ("config", ["seed=7"], {})
    assert cli._parse(["report", "--compare", "x", "--cfg", "job"])[2] == {}
    with pytest.raises(UserError, match="--multirun: sweeps have a command of their own: threefold sweep seed=1,2"):
        cli._parse(["run", "-m", "seed=1,2"])
    with pytest.raises(UserError, match=r"threefold sweep 'dpo.beta=interval\(0.1,1\)'"):
        cli._parse(["-m", "dpo.beta=interval(0.1,1)"])


def test_the_printed_configuration_is_the_composed_one(capsys):
    from omegaconf import OmegaConf

    cli.main(["config", "experiment=smoke", "seed=7"])
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed == OmegaConf.to_container(compose(["experiment=smoke", "seed=7"]))


def test_status_shows_every_stage(capsys, tmp_path):
    cli.main(["status", "experiment=smoke", f"runs={tmp_path}"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "state", "reason", "fingerprint", "made", "main", "metric"]
    planned = chain.plan(compose(["experiment=smoke"]))
    assert [row.split() for row in rows] == [[name, "missing", entry.fingerprint] for name, entry in planned.items()]


@pytest.mark.parametrize("reason", ["cannot read [/data/rows.jsonl]", "shape [b, t] expected"])
def test_status_shows_a_reason_as_it_was_written(reason, capsys, tmp_path):
    artifact = chain.plan(compose(["experiment=smoke", f"runs={tmp_path}"]))["tokenizer"].artifact
    artifact.open()
    (artifact.work / "failed.txt").write_text(f"{reason}\n")
    cli.main(["status", "experiment=smoke", f"runs={tmp_path}"])
    assert reason in capsys.readouterr().out


def failing(error):
    def command(overrides):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("data.text.path: no such file"), 2, "error: data.text.path: no such file\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command continues from the last checkpoint\n"),
    ],
)
def test_errors_of_the_user_and_interruptions_have_their_own_status(error, status, line, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "run", (failing(error), ""))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run"])
    assert ended.value.code == status
    assert capsys.readouterr().err == line


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "run", (failing(ZeroDivisionError()), ""))
    with pytest.raises(ZeroDivisionError):
        cli.main(["run"])


def test_overrides_reach_the_command_in_their_order(monkeypatch):
    got = []
    monkeypatch.setitem(cli.COMMANDS, "run", (got.extend, ""))
    cli.main(["run", "experiment=smoke", "target=ppo", "ppo.missing_end_penalty=-2"])
    assert got == ["experiment=smoke", "target=ppo", "ppo.missing_end_penalty=-2"]


def test_a_run_with_an_unknown_target_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "experiment=smoke", "target=pppo", f"runs={tmp_path}/runs"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: target=pppo: must be one of tokenizer, pretrain, sft,")
    assert not (tmp_path / "runs").exists()
