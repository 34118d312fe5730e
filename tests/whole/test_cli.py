"""The command line answers help, status and mistakes at once, on one line, without torch and without a traceback."""

import os
import re
import resource
import shutil
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
        "template",
    }
    assert set(cli.COMMANDS) == {"run", "sweep"} | others
    assert all(f"\n  {name}" in shown and text in shown for name, (_, text) in cli.COMMANDS.items())


def test_hydras_own_options_are_answered():
    for line in (["run", "seed=7", "--cfg", "job"], ["seed=7", "-c", "job"], ["report", "seed=7", "-c", "job"]):
        assert cli._parse(line) == ("config", ["seed=7"], {})
    assert cli._parse(["sweep", "-m", "seed=1,2"]) == ("sweep", ["seed=1,2"], {})


def test_options_may_stand_anywhere_and_a_folder_is_an_override(tmp_path):
    folder = f"hydra.searchpath=['file://{tmp_path}']"
    for line in (["--config-dir", "{}", "run", "a=1"], ["run", "-cd", "{}", "a=1"], ["run", "a=1", "--config-dir={}"]):
        assert cli._parse([word.format(tmp_path) for word in line]) == ("run", [folder, "a=1"], {})


def test_the_name_of_a_stage_is_the_target():
    for command in ("run", "submit", "sweep", "config"):
        assert cli._parse([command, "seed=2", "ppo"]) == (command, ["seed=2", "target=ppo"], {})


WORDS = [
    ("-m dpo.beta=interval(0.1,1)", "--multirun: .* of their own: threefold sweep 'dpo.beta=interval(0.1,1)'"),
    ("run -m ppo seed=1,2", "--multirun: sweeps have a command of their own: threefold sweep target=ppo seed=1,2"),
    ("run --cfg all", "--cfg: prints the composed configuration: write --cfg job"),
    ("run --info", "--info: is an option of Hydra's; `threefold config` prints the composed configuration"),
    ("run --info all", "--info: is an option of Hydra's"),
    (
        "run -cn mine",
        "--config-name: .*; a run is chosen by experiment=NAME, from a folder of your own with --config-dir",
    ),
    ("run -cp conf", "--config-path: .* --config-dir DIR adds a folder of your own"),
    ("--hydra-help", "--hydra-help: is an option of Hydra's; `threefold --help` lists the commands"),
    ("run --config-dir", "--config-dir: name a folder that holds experiment/NAME.yaml"),
    ("--completion tcsh", "--completion: name the shell: bash, zsh or fish"),
    ("report --compare", "--compare: name the run to set beside it"),
    ("report --compare=b --compare c", "--compare: takes one run, and has b and c"),
    ("runs run=mine", "run=mine: `threefold runs` lists all runs; `threefold status run=mine` shows one"),
    ("report --compare x --cfg job", "--compare: is an option of report, not of --cfg"),
    ("run --wandb", "--wandb: is an option of dashboard, not of run"),
    ("dashboard --wandb=1", "--wandb: takes no value"),
    ("run --seed 3", "--seed: no such option; overrides are written KEY=VALUE: seed=VALUE"),
    ("run --ppo.kl-coef=3", "--ppo.kl-coef=3: no such option; overrides are written KEY=VALUE: ppo.kl_coef=3"),
    ("run --lr 3", r"--lr: no such option; .* \(nearest: pretrain.learning_rate, sft.learning_rate, "),
    ("run --config-di x", r"--config-di: no such option; .* \(nearest: --config-dir\)"),
    ("ppo seed=2", "ppo: no such command; write threefold run target=ppo seed=2"),
    ("demo", "demo: no such command; write threefold run experiment=demo"),
    ("target=ppo", "target=ppo: no such command; write threefold run target=ppo"),
    ("run ppo dpo", "ppo, dpo: a run has one target"),
    ("run ppo target=dpo", "ppo, target=dpo: a run has one target"),
    ("chat ppo", "ppo: a model is chosen with chat.model=ppo"),
    ("run sweep.trials=9", "sweep.trials=9: is read by `threefold sweep` and `threefold submit`, not by run"),
    ("status label.port=1", "label.port=1: is read by `threefold label` and `threefold report`, not by status"),
    ("status ppo", "ppo: `threefold status` is about a whole run; leave the stage out"),
]


@pytest.mark.parametrize(("line", "answer"), WORDS)
def test_what_no_command_takes_is_refused_with_what_to_write(line, answer):
    with pytest.raises(UserError, match=f"^{answer.replace('(0.1,1)', '.0.1,1.')}") as caught:
        cli._parse(line.split())
    assert "\n" not in str(caught.value)


def test_versions_are_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(
        r"threefold \S+, torch 2\.\S+, transformers \S+, trl \S+, hydra-core 1\.\S+\n", capsys.readouterr().out
    )


TYPED = """
source <(threefold --completion bash)
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9 COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete threefold
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def command_on_path(tmp_path_factory):
    """An environment in which `threefold` is the command line of this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "threefold").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m threefold "$@"\n')
    (folder / "threefold").chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("threefold st", "status"),
        ("threefold run ppo.kl_c", "ppo.kl_coef= ppo.kl_controller="),
        ("threefold run ppo -cd {own} experiment=m", "mine"),  # after "=" the shell keeps what stands before it
        ("threefold sweep ppo.on_trip=", "rollback stop"),
        ("threefold report run=x --comp", "--compare --completion"),
    ],
)
def test_bash_completes_commands_keys_and_choices(line, completed, command_on_path, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").touch()
    typed = ["bash", "-c", TYPED, "bash", line.format(own=tmp_path)]
    done = subprocess.run(typed, capture_output=True, text=True, env=command_on_path)
    assert (" ".join(sorted(done.stdout.split())), done.stderr) == (completed, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_function_of_their_own(shell, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--completion", shell])
    shown = capsys.readouterr().out
    assert {"zsh": "compdef _python_argcomplete threefold", "fish": "complete --command threefold"}[shell] in shown


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
def test_fish_completes_keys(command_on_path):
    asked = "threefold --completion fish | source; complete -C 'threefold run ppo.kl_c'"
    done = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, env=command_on_path)
    assert (done.stdout.split(), done.stderr) == (["ppo.kl_coef=", "ppo.kl_controller="], "")


MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("ppo kl_coef=0.1", 'make ppo ARGS="kl_coef=0.1"'),
        ("sweep ARGS=run=x seed=1,2 ppo.kl_coef=0.1", 'make sweep ARGS="run=x ppo.kl_coef=0.1 seed=1,2"'),
        ("ppo reward@ppo.reward=length", 'make ppo ARGS="reward@ppo.reward=length"'),
        ("help VENV=.venv PYTHON=python3 ARGS=seed=2", None),
    ],
)
def test_make_refuses_overrides_outside_args(typed, answer):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    command = ["make", "-f", MAKEFILE, "--dry-run", *typed.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=outside)
    if answer is None:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2 and f"overrides go into ARGS: {answer}; variables of the env" in done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""


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
