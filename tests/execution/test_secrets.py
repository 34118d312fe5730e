"""Secrets of the environment and passwords in URLs: used as they are, in no file that a run leaves and in no error."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from threefold import chain, rewards
from threefold.chain import making
from threefold.chain.plans import Member
from threefold.config.compose import compose
from threefold.errors import UserError, public, public_traceback
from threefold.execution import launch
from threefold.fileio import write_json
from threefold.slurm import submission
from threefold.stages import STAGES

SECRET, OTHER, PASSWORD = "dbPLANTEDsecret", "PLANTEDpass-other", "PLANTEDpass/word"
URL = f"https://joe:{PASSWORD}@host/rows"
JUDGE = """
seen = []

def score(prompts, completions, key=None, cap=None, **columns):
    seen.append(key if isinstance(key, str) else key[0])  # ppo's is a list
    return [1.0] * len(prompts)
"""
SECRET_KEYS = ["comparisons.judge.function=keyed:score", "comparisons.judge.args={key: ${oc.env:PLANTED}}"]
SECRET_KEYS += ["ppo.reward.function=keyed:score", "ppo.reward.args={key: ['${oc.env:PLANTED}', 1]}"]
SECRET_KEYS += ["tracker.entity=${oc.env:PLANTED}", "evaluate.judge_model.revision=${oc.env:PLANTED_TOO}"]


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    (tmp_path / "keyed.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keyed", raising=False)
    monkeypatch.setenv("PLANTED", SECRET)
    monkeypatch.setenv("PLANTED_TOO", OTHER)


def holding(folder: Path) -> list[str]:
    """Files below `folder` that hold one of the secrets."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".py"]
    return [str(file) for file in files if any(word in file.read_bytes() for word in (SECRET.encode(), b"PLANTEDpass"))]


def stages_that(monkeypatch, does):
    """Every stage does `does` with its job instead of its own work."""
    for stage in STAGES:
        monkeypatch.setattr(importlib.import_module(f"threefold.stages.{stage}"), "run", does)


def options(tmp_path, *more):
    return [
        "experiment=smoke",
        "runtime.device=cpu",
        f"runs={tmp_path}/runs",
        f"data.text.config_name={URL}",
        *SECRET_KEYS,
        *more,
    ]


def test_a_run_leaves_no_secret_in_any_file_and_functions_get_it(tmp_path, monkeypatch):
    def judge(job):
        if job.stage == "comparisons":
            rewards.load(job.config.comparisons.judge)(["a"], ["b"], answer=["c"])
        assert (
            job.config.get("data", {}).get("text", {"config_name": URL}).config_name == URL
            if job.stage == "tokenizer"
            else True
        )
        write_json(job.out / "config.json", {})  # a model's: the card is written beside it
        return {"pairs": 1}

    stages_that(monkeypatch, judge)
    monkeypatch.setattr(chain, "check_sources", lambda config, planned: None)  # reads all data
    monkeypatch.setattr("threefold.chain.preflight.check", lambda *_: None)  # no model is made here
    for target in ("comparisons", "ppo"):
        chain.bring_up_to_date(compose(options(tmp_path, "tracker=tensorboard", f"target={target}")))
    assert set(sys.modules["keyed"].seen) == {SECRET}
    assert holding(tmp_path) == []
    saved = OmegaConf.load(tmp_path / "runs/smoke/comparisons/config.yaml")
    assert OmegaConf.to_container(saved)["comparisons"]["judge"]["args"]["key"] == "${oc.env:PLANTED}"
    parts = json.loads((tmp_path / "runs/smoke/comparisons/manifest.json").read_text())["parts"]
    assert parts["comparisons.judge.args.key"] == "${oc.env:PLANTED}"
    assert parts.get("comparisons.judge.args.key.value") is None


def test_a_failing_stage_leaves_none_in_its_failure_and_traceback(tmp_path, monkeypatch):
    def fail(job):
        raise RuntimeError(f"cannot reach {URL} through http://me:{PASSWORD}@proxy:80 with key {SECRET}")

    stages_that(monkeypatch, fail)
    with pytest.raises(RuntimeError) as caught:
        chain.bring_up_to_date(compose(options(tmp_path, "tracker=none", "target=tokenizer")))
    assert holding(tmp_path) == []
    (work,) = (tmp_path / "runs/artifacts").glob("*.work")
    said = "cannot reach https://host/rows through http://proxy:80 with key ${oc.env:PLANTED}"
    assert (work / "failed.txt").read_text() == f"{said}\n" and said in (work / "traceback.txt").read_text()
    assert SECRET not in public_traceback(caught.value) and PASSWORD not in public_traceback(caught.value)


def test_processes_of_a_stage_are_told_the_name_and_find_the_secret_themselves(tmp_path, monkeypatch):
    found = []

    def take_part(file, rank, trouble):
        found.append(holding(file.parent))
        told = OmegaConf.create(launch.read(file).config)
        found.append((told.ppo.reward.args.key[0], told.data.text.config_name))
        try:
            raise RuntimeError(f"no {SECRET} at {URL}")
        except RuntimeError as error:
            launch.report(error, file.parent)
        return 1

    monkeypatch.setattr(launch, "take_part", take_part)
    config = compose(options(tmp_path, "launch=ddp", "launch.processes=2", "tracker=none"))
    entry = chain.plan(config)["ppo"]
    entry.artifact.open()
    with pytest.raises(RuntimeError, match=r"no \$\{oc\.env:PLANTED\} at https://host/rows"):
        making._execute(config, entry, {}, None)
    assert found == [[], (SECRET, URL)] and holding(tmp_path) == []


def test_what_refers_to_a_value_of_the_environment_stays_that_interpolation(monkeypatch):
    config = compose(
        [
            "data.preferences.path=${oc.env:PLANTED}/${run}/x", "data.replies.path=${data.preferences.path}",
            "data.text.path=${..replies.path}", "run=a", "+comparisons.judge.args.key=prefix-${oc.env:PLANTED}",
            "+evaluate.judge.args.key=${comparisons.judge.args.key}", "+evaluate.judge.args.run=${run}",
        ]
    )  # fmt: skip
    written = OmegaConf.to_container(config)
    for source in ("preferences", "replies", "text"):
        assert (
            config.data[source].path == f"{SECRET}/a/x" and written["data"][source]["path"] == "${oc.env:PLANTED}/a/x"
        )
    assert written["evaluate"]["judge"]["args"]["key"] == "prefix-${oc.env:PLANTED}"
    assert config.evaluate.judge.args.key == f"prefix-{SECRET}" and written["evaluate"]["judge"]["args"]["run"] == "a"
    assert SECRET not in OmegaConf.to_yaml(config)
    monkeypatch.setenv("KL", "0.25")
    typed = compose(["ppo.kl_coef=${oc.env:KL}"])
    assert typed.ppo.kl_coef == 0.25 and OmegaConf.to_container(typed)["ppo"]["kl_coef"] == "${oc.env:KL}"


OUTSIDE_ARGS = {
    "data.text.path=https://h/?t=${oc.env:PLANTED}&x=a.jsonl": "https://h/?t=${oc.env:PLANTED}&x=a.jsonl: no such file",
    "data.text.path=/nope/${oc.env:PLANTED}.jsonl": "/nope/${oc.env:PLANTED}.jsonl: no such file or folder",
    "evaluate.judge_model.path=./x${oc.env:PLANTED}": "evaluate.judge_model.path: ./x${oc.env:PLANTED} is no folder",
    "data.text.split=${oc.env:PLANTED}": "data.text.split is not a configuration key",
    "seed=${oc.env:PLANTED}": "${oc.env:PLANTED}",
}


@pytest.mark.parametrize(("override", "shown"), OUTSIDE_ARGS.items())
def test_what_the_environment_gives_is_in_no_error_wherever_it_stands(override, shown):
    with pytest.raises(UserError) as caught:
        chain.plan(compose(["experiment=smoke", override]))
    assert shown in str(caught.value) and SECRET not in str(caught.value)


def test_a_folder_that_the_environment_gives_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path))
    compose(["data.text.path=${oc.env:PLANTED}/x.jsonl", "runs=${oc.env:PLANTED}"])
    assert public(f"{tmp_path}/runs") == f"{tmp_path}/runs"


OTHER_WAYS = [
    "data.text.revision=${oc.select:tracker.entity}",
    "data.text.revision=${tracker[entity]}",
    "comparisons.judge.args={key: '${oc.create:{a: ${oc.env:PLANTED}}}'}",
]


@pytest.mark.parametrize("override", OTHER_WAYS)
def test_a_secret_that_would_be_saved_is_refused(override):
    with pytest.raises(UserError, match=r"would be saved with the value of \$\{oc\.env:PLANTED\}; write") as caught:
        compose(["tracker.entity=${oc.env:PLANTED}", override])
    assert SECRET not in str(caught.value)


def test_spaces_in_an_interpolation_change_nothing():
    config = compose(["tracker.entity=${ oc.env:PLANTED}", "run=dbPLANTEDsecret-typed"])
    assert config.tracker.entity == SECRET and "${ oc.env:PLANTED}" in OmegaConf.to_yaml(config.tracker)
    assert config.run == "dbPLANTEDsecret-typed"  # nothing that is typed is a secret


def test_the_longest_secret_is_taken_out_first(monkeypatch):
    monkeypatch.setattr("threefold.errors.SECRETS", {"abcdef": "${A}", "abcdefgh": "${B}"})
    assert public("abcdefgh abcdef") == "${B} ${A}"


def test_another_password_or_token_of_an_address_makes_nothing_stale(monkeypatch):
    def parts(password, token):
        monkeypatch.setenv("PLANTED", token)
        overrides = [f"model.revision=https://joe:{password}@host/rows"]
        overrides += ["model.checkpoint=https://h/?t=${oc.env:PLANTED}"]
        return chain.fingerprint_parts(compose([*overrides, "experiment=smoke"]), "tokenizer")

    one = parts("PLANTEDpass", "token-one")
    assert one == parts("elsewhere", "token-two") and not [key for key in one if key.endswith(".value")]
    monkeypatch.setenv("NAME", "name-one")
    named = [
        chain.fingerprint_parts(compose(["model.checkpoint=org/${oc.env:NAME}", "experiment=smoke"]), "tokenizer")
        for name in ("one", "two")
        if monkeypatch.setenv("NAME", name) is None
    ]
    assert named[0] != named[1]  # another model is another tokenizer


URLS = {
    "//joe:PLANTED@host/db": "//host/db",
    "/a//b@c//d": "/a//b@c//d",
    f"see https://joe:{PASSWORD}@host/x": "see https://host/x",
    "https://tok@h/x and ssh://git:pw@h:22/y": "https://h/x and ssh://h:22/y",
    "http://u:p@ss@h": "http://h",
    "http://u:p#a?b@h/x": "http://h/x",
    "http://h:8080/a@b http://h/a@b": "http://h:8080/a@b http://h/a@b",
    "postgres://u:@h": "postgres://h",
    "someone@example.com": "someone@example.com",
    "(http://u:p@h)": "(http://h)",
    '"http://u:p@h","x@y"': '"http://h","x@y"',
}


@pytest.mark.parametrize(("text", "shown"), URLS.items())
def test_urls_lose_their_user(text, shown):
    assert public(text) == shown
    assert str(UserError(text)) == shown


def test_a_password_in_an_override_is_in_no_error(tmp_path):
    with pytest.raises(UserError) as caught:
        compose([f"data.text.pth={URL}"])
    assert "PLANTEDpass" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        chain.plan(compose([f"data.text.path={URL}.jsonl", "experiment=smoke"]))
    assert str(caught.value).startswith("https://host/rows.jsonl: no such file or folder")


def test_a_command_that_fails_unexpectedly_shows_none(tmp_path):
    code = "from threefold import cli\nfrom threefold.config import compose\n"
    code += f"def fail(overrides): raise RuntimeError('at {URL}')\n"
    code += "compose.compose = fail\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}cli.main(['config'])"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (
        done.returncode == 1
        and "RuntimeError: at https://host/rows" in done.stderr
        and "PLANTEDpass" not in done.stderr
    )


def test_a_password_is_not_sent_to_slurm(tmp_path):
    overrides = options(tmp_path)
    with pytest.raises(UserError, match=r"^data\.text\.config_name: files of jobs would hold its password"):
        submission.check([Member(compose(overrides), overrides)], {})


def test_a_model_card_shows_the_place_of_data_without_what_the_environment_gives():
    told = OmegaConf.create({"data": {"text": {"path": "${oc.env:GONE}/hh"}, "replies": {"path": "org/name"}}})
    assert making.data_names({"sft": told}) == {"hh": False, "org/name": True}
    assert (
        making.base_model({"pretrain": OmegaConf.create({"model": {"checkpoint": "${oc.env:GONE}"}})})
        == "${oc.env:GONE}"
    )
