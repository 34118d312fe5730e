"""A run keeps what it was told: later commands start from it, and no command makes another run of it unasked."""

import functools
import json
from pathlib import Path

import pytest
import sweeps
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import threefold
from threefold import chain, cli
from threefold.chain import making
from threefold.config import choices, compose
from threefold.config.compose import check
from threefold.config.overrides import as_typed, parse
from threefold.errors import UserError
from threefold.fileio import read_json, write_json
from threefold.runs import sweep_space, variants
from threefold.schema.config import Config
from threefold.slurm import client, job_records, submission

composed = compose.compose
OWN = {"demo": "demo.txt", "smoke": "smoke.txt", "arithmetic": "arithmetic.txt"}  # the data of the experiments here

BASE = ("runtime.device=cpu", "tracker=none")


@functools.cache
def _of_groups(*overrides):
    config = composed([*BASE, *overrides]).copy()
    OmegaConf.set_readonly(config, False)
    return config


def quickly(overrides):
    """What `compose` gives; groups are composed once, and plain values set on a copy."""
    return _composed_quickly(tuple(overrides))


@functools.cache
def _composed_quickly(overrides):
    groups, values = _split(overrides)
    experiment = chosen_quickly(overrides)["experiment"]
    config = _of_groups(*groups).copy()
    for source in ("text", "replies"):
        config.data[source].path, config.data[source].format = OWN[experiment], "text"
    for text in values:
        OmegaConf.update(config, choices.key_of(text), parse(as_typed(text)).value())
    check(config, Config)
    OmegaConf.set_readonly(config, True)
    return config


def chosen_quickly(overrides):
    """What `chosen` gives, of groups that were composed before."""
    groups = _split(overrides)[0]
    _of_groups(*groups)
    return compose.chosen([*BASE, *groups])


def _split(overrides):
    groups = [
        text for text in overrides if choices.key_of(text) == "experiment" or choices._section(choices.key_of(text))
    ]
    return groups, [text for text in overrides if text not in groups]


def made_at_once(config, entry, planned, others=None):
    """Stands in for `making.make`: an artifact that knows its configuration."""
    artifact = entry.artifact
    artifact.open()
    OmegaConf.save(chain.view(config, entry.stage), artifact.out / "config.yaml")
    write_json(
        artifact.out / "metrics.json", {"bytes_per_token": 3.25, "bits_per_byte": 2.0, "fingerprint": entry.fingerprint}
    )
    manifest = {"stage": entry.stage, "fingerprint": entry.fingerprint, "parts": entry.parts, "parents": {}}
    artifact.finish(manifest | {"created": "2026-11-29T12:00:00"})
    return True


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Commands that compose and make in milliseconds, in a folder with a file of data for each experiment."""
    stand_in(monkeypatch, tmp_path)
    return tmp_path


def stand_in(monkeypatch, folder):
    monkeypatch.chdir(folder)
    for name in (*OWN.values(), "a.txt", "b.txt"):
        Path(name).write_text(f"text of {name}\n")
    for module in (choices, compose, variants, sweep_space):
        monkeypatch.setattr(module, "compose", quickly)
    monkeypatch.setattr(choices, "chosen", chosen_quickly)
    for module in (chain, making):
        monkeypatch.setattr(module, "make", made_at_once)
        monkeypatch.setattr(module, "check", lambda config, planned: None)
    for module in (making, submission.chain):
        for name in ("check_sources", "check_rewards"):
            monkeypatch.setattr(module, name, lambda config, planned: None)
    monkeypatch.setattr(variants, "_run", sweeps.run_here)
    for name in ("write_report", "print_table"):
        monkeypatch.setattr(f"threefold.report.{name}", lambda *_: Path())
    jobs = {}
    monkeypatch.setattr(client, "require", lambda: None)
    monkeypatch.setattr(
        client, "send", lambda work, *_: jobs.setdefault(str(101 + len(jobs)), work) and str(100 + len(jobs))
    )
    monkeypatch.setattr(client, "states", lambda asked: {job: client.state("PENDING", "") for job in asked})
    return jobs


def threefold_(*arguments):
    """Exit status of a command."""
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        return ended.code
    return 0


def told(run="mine"):
    return read_json(Path("runs") / run / "choices.json")


def config_of(*overrides):
    return choices.compose_run(overrides)[0]


MINE = ["run", "run=mine", "target=tokenizer", "data.text.path=a.txt"]


def test_another_experiment_does_not_take_the_place_of_a_run(quick, capsys):
    assert threefold_(*MINE) == 0
    before = (told(), Path("runs/mine/tokenizer").readlink())
    for other in ("experiment=smoke", "data.text.path=b.txt", "data=arithmetic", "model=gpt2"):
        capsys.readouterr()
        for command in ("run", "submit", "status", "config", "report", "chat", "label", "frontier"):
            assert threefold_(command, "run=mine", other) == 2
        [line] = set(capsys.readouterr().err.splitlines())
        key, _, value = other.partition("=")
        assert f"run=mine: would become another run: {key} " in line and f"→ {value}" in line
        assert "takeover=true" in line
        assert (told(), Path("runs/mine/tokenizer").readlink()) == before


def test_commands_start_from_what_the_run_was_told_and_say_what_is_new(quick, capsys):
    threefold_(*MINE, "ppo.kl_coef=0.2", "evaluate.prompts=7")
    capsys.readouterr()
    assert threefold_("run", "run=mine", "target=tokenizer", "reward@ppo.reward=length", "ppo.kl_coef=0.3") == 0
    assert capsys.readouterr().err == (
        "run mine keeps data.text.path=a.txt, evaluate.prompts=7; reward@ppo.reward=length, ppo.kl_coef 0.2 → 0.3\n"
    )
    config = config_of("run=mine")
    assert (config.data.text.path, config.ppo.kl_coef, config.evaluate.prompts) == ("a.txt", 0.3, 7)
    assert config.ppo.reward.function == "rewards.length:length" and config.run == "mine"
    assert threefold.compose("run=mine") == config
    assert told()["overrides"] == [
        "data.text.path=a.txt", "evaluate.prompts=7", "reward@ppo.reward=length", "ppo.kl_coef=0.3",
    ]  # fmt: skip


def test_commands_that_make_nothing_store_nothing(quick, capsys):
    threefold_(*MINE)
    before = told()
    for command in ("status", "config", "report"):
        threefold_(command, "run=mine", "ppo.kl_coef=0.5")
    threefold.status("run=mine", "ppo.kl_coef=0.5")
    assert told() == before and config_of("run=mine").ppo.kl_coef == 0.05
    capsys.readouterr()
    threefold_("status", "run=mine", "ppo.kl_coef=0.5")
    assert capsys.readouterr().err == "run mine keeps data.text.path=a.txt; for this command: ppo.kl_coef=0.5\n"


def test_a_run_that_has_no_name_typed_is_the_experiments(quick):
    threefold_("run", "target=tokenizer", "ppo.kl_coef=0.1")
    threefold_("run", "experiment=smoke", "target=tokenizer", "ppo.kl_coef=0.2")
    assert config_of().ppo.kl_coef == 0.1 and config_of("experiment=smoke").ppo.kl_coef == 0.2
    assert config_of("experiment=smoke", "run=smoke").run == "smoke"
    threefold_("run", "target=tokenizer", "ppo.kl_coef=0.05")  # taken back
    assert config_of().ppo.kl_coef == 0.05


def test_what_says_how_a_command_runs_holds_for_that_command(quick):
    passing = ["seeds=null", "dependents=false", "launch.main_port=2000", "launcher.jobs=1"]
    threefold_(*MINE, *passing, "resources.minutes=77", "tracker.tags=[x]")
    assert told()["overrides"] == ["data.text.path=a.txt", "resources.minutes=77", "tracker.tags=[x]"]


def test_another_choice_of_a_group_leaves_out_what_the_last_one_was_given(quick, capsys):
    threefold_(*MINE, "reward@ppo.reward=composed", "ppo.reward.parts.repetition.weight=2")
    assert config_of("run=mine", "reward@ppo.reward=composed").ppo.reward.parts.repetition.weight == 2
    capsys.readouterr()
    assert threefold_("run", "run=mine", "target=tokenizer", "reward@ppo.reward=length") == 0
    assert (
        "reward@ppo.reward composed → length, without ppo.reward.parts.repetition.weight=2" in capsys.readouterr().err
    )
    assert told()["overrides"] == ["data.text.path=a.txt", "reward@ppo.reward=length"]


def test_a_key_that_was_added_is_given_other_values_without_the_plus(tmp_path):
    own = ["experiment=smoke", f"runs={tmp_path}"]
    choices.keep(*choices.compose_run([*own, "+comparisons.judge.args.more=3"]))
    config, overrides = choices.compose_run([*own, "comparisons.judge.args.more=4"])
    assert config.comparisons.judge.args.more == 4 and "+comparisons.judge.args.more=4" in overrides
    assert "more" not in choices.compose_run([*own, "~comparisons.judge.args.more"])[0].comparisons.judge.args


def test_the_last_value_of_a_key_stays_and_mappings_add_up():
    last = choices.last_of_each
    assert last(["a=1", "b=2", "a=3"]) == ["b=2", "a=3"]
    assert last(["+a.b=1", "a.b=2"]) == ["+a.b=2"] and last(["+a.b=1", "~a.b"]) == [] and last(["a=1", "~a"]) == ["~a"]
    assert last(["c.args={x: 1}", "c.args.x=3", "c.args={y: 2}"]) == ["c.args={x: 1}", "c.args.x=3", "c.args={y: 2}"]
    assert last(["c.args={x: 1}", "c.args={x: 2}", "c.args={x: 1}"]) == ["c.args={x: 2}", "c.args={x: 1}"]
    assert last(["c.args={x: 1}", "c.args.y=1", "c.args={}", "c.args={z: 2}"]) == ["c.args={}", "c.args={z: 2}"]
    paths = ["hydra.searchpath=['file:///a']", "hydra.searchpath=['file:///b']"]
    assert last([*paths, "a=1", paths[0]]) == [paths[1], "a=1", paths[0]]


def test_an_empty_mapping_takes_the_place_of_what_a_run_keeps_and_others_add_to_it(tmp_path, capsys):
    own = ["experiment=smoke", f"runs={tmp_path}"]
    choices.keep(*choices.compose_run([*own, "dpo.loss_weights={sft: 0.1}"]))
    config, overrides = choices.compose_run([*own, "dpo.loss_weights={sigmoid: 1}"])
    assert config.dpo.loss_weights == {"sft": 0.1, "sigmoid": 1.0}
    assert "keeps dpo.loss_weights={sft: 0.1}; dpo.loss_weights={sigmoid: 1}\n" in capsys.readouterr().err
    config, overrides = choices.compose_run([*own, "dpo.loss_weights={ }"])
    assert config.dpo.loss_weights == {} and "dpo.loss_weights={sft: 0.1}" not in overrides
    assert "dpo.loss_weights {sft: 0.1} → { }" in capsys.readouterr().err
    assert choices.compose_run([*own, "dpo.loss_weights={}", "dpo.loss_weights={sft: 2}"])[0].dpo.loss_weights.sft == 2
    assert composed(["experiment=smoke", "evaluate.tasks={}"]).evaluate.tasks == {}


def test_what_is_stored_composes_to_the_same():
    typed = [
        "experiment=smoke",
        "run=x",
        "+comparisons.judge.args.more=3",
        "evaluate.tasks={n: {path: 'task:letters', ",
    ]
    typed[-1] += "format: prompt_completion, check: exact}}"
    typed += [
        "evaluate.tasks.n.problems=5",
        "tracker.tags=['a, b',c]",
        "data.text.path=~/a=b.jsonl",
        "seed=1",
        "seed=2",
    ]
    again = [*choices.last_of_each(typed[:5]), "comparisons.judge.args.more=4", *typed[5:]]
    one, two = composed(typed), composed(choices.last_of_each(again))
    assert two.comparisons.judge.args.more == 4
    OmegaConf.set_readonly(two, False)
    two.comparisons.judge.args.more = 3
    assert one == two and one.seed == 2


def test_a_run_that_is_not_there_is_said_with_the_nearest(quick, capsys):
    threefold_(*MINE)
    threefold_("run", "run=group/other", "target=tokenizer")
    for command in ("status", "report", "chat", "label", "cancel"):
        capsys.readouterr()
        assert threefold_(command, "run=mien") == 2
        assert capsys.readouterr().err == (
            "error: run=mien: there is no such run (nearest: mine); `threefold runs` lists them\n"
        )
    with pytest.raises(UserError, match=r"there is no such run \(nearest: group/other\)"):
        threefold.status("run=group/othr")
    assert not Path("runs/mien").exists() and threefold_("config", "run=new") == 0


def test_votes_on_the_runs_own_replies_are_no_other_data(quick):
    threefold_(*MINE)
    votes = ["data.preferences.path=b.txt", "data.preferences.format=arena"]
    assert threefold_("run", "run=mine", "target=tokenizer", *votes) == 0
    assert config_of("run=mine").data.preferences.path == "b.txt"
    assert threefold_("run", "run=mine", "target=tokenizer", "data.preferences.path=a.txt") == 2


def test_paths_begin_where_the_run_was_told_of_them(quick, monkeypatch, capsys):
    threefold_(*MINE, "data.replies.path=b.txt")
    (quick / "elsewhere").mkdir()
    monkeypatch.chdir(quick / "elsewhere")
    Path("a.txt").write_text("other data of the same name\n")
    runs = f"runs={quick}/runs"
    assert config_of("run=mine", runs).data.text.path == f"{quick}/a.txt"
    assert threefold_("run", "run=mine", "target=tokenizer", runs, "data.text.path=a.txt") == 2
    assert f"data.text.path {quick}/a.txt → {quick}/elsewhere/a.txt" in capsys.readouterr().err
    assert config_of("run=mine", runs, "data.text.path=../a.txt").data.text.path == "../a.txt"


def test_so_do_those_in_lists_and_mappings(tmp_path, monkeypatch):
    for place in ("elsewhere", "old/dpo", "more"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "x.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    task = "evaluate.tasks={n: {path: x.jsonl, format: prompt_completion, check: exact}}"
    own = ["experiment=smoke", f"runs={tmp_path}/runs"]
    choices.keep(*choices.compose_run([*own, "evaluate.earlier=[old/dpo,gone]", task, "tracker.tags=[more]"]))
    monkeypatch.chdir("elsewhere")
    config = choices.compose_run(own)[0]
    assert config.evaluate.earlier == [f"{tmp_path}/old/dpo", "gone"] and config.tracker.tags == ["more"]
    assert config.evaluate.tasks.n.path == f"{tmp_path}/x.jsonl" and config.evaluate.tasks.n.check == "exact"


def test_a_run_made_before_choices_were_stored_keeps_its_data(quick, capsys):
    threefold_(*MINE)
    Path("runs/mine/choices.json").unlink()
    assert threefold_("run", "run=mine", "target=tokenizer") == 2
    assert "data.text.path a.txt → demo.txt" in capsys.readouterr().err
    assert threefold_(*MINE, "seed=3") == 0 and "seed=3" in told()["overrides"]


def test_a_takeover_begins_anew(quick, capsys):
    threefold_(*MINE, "ppo.kl_coef=0.2")
    threefold_("run", "run=mine", "target=pretrain")
    assert threefold_("run", "run=mine", "experiment=smoke", "target=tokenizer", "takeover=true") == 0
    assert told()["groups"]["experiment"] == "smoke" and told()["overrides"] == []
    assert not Path("runs/mine/pretrain").is_symlink() and Path("runs/mine/tokenizer/manifest.json").is_file()
    assert len(list(Path("runs/artifacts").glob("*/manifest.json"))) == 3  # nothing that was made is lost


def test_a_takeover_that_fails_leaves_jobs_with_the_run(quick, monkeypatch):
    def unreadable(config, planned):
        raise UserError("data.text.path: cannot be read")

    assert threefold_("submit", *MINE[1:]) == 0
    assert {tuple(record.runs) for _, record in job_records.all_of(Path("runs")).values()} == {("mine",)}
    with monkeypatch.context() as patched:
        patched.setattr(chain, "check_sources", unreadable)
        assert threefold_("run", "run=mine", "experiment=smoke", "target=tokenizer", "takeover=true") == 2
    assert {tuple(record.runs) for _, record in job_records.all_of(Path("runs")).values()} == {("mine",)}
    assert threefold_("run", "run=mine", "experiment=smoke", "target=tokenizer", "takeover=true") == 0
    assert {tuple(record.runs) for _, record in job_records.all_of(Path("runs")).values()} == {()}


def test_a_target_before_dpo_leaves_out_the_rounds_that_a_run_keeps(quick, capsys):
    threefold_(*MINE)
    kept = told() | {"overrides": [*told()["overrides"], "rounds=2"]}
    write_json(Path("runs/mine/choices.json"), kept)
    assert threefold_("run", "run=mine", "target=pretrain") == 0 and Path("runs/mine/pretrain").is_symlink()
    assert told() == kept and config_of("run=mine").rounds == 2
    capsys.readouterr()
    assert threefold_("run", "run=mine", "target=pretrain", "rounds=2") == 2
    assert "are rounds of dpo, which target=pretrain does not need" in capsys.readouterr().err
    assert threefold_("submit", "run=mine") == 2
    assert "where the run keeps it write rounds=null" in capsys.readouterr().err
    with pytest.raises(UserError, match="runs/mine/round-1/dpo is no finished stage") as caught:
        threefold.status("run=mine")
    assert threefold_("status", "run=mine") == 2 and str(caught.value) in capsys.readouterr().err  # both of one mind


def test_variants_keep_what_they_were_told_and_their_run_what_all_share(quick):
    threefold_(*MINE, "ppo.kl_coef=0.2")
    assert threefold_("run", "run=mine", "target=pretrain", "seeds=2", "pretrain.context=64") == 0
    variant = "mine/variants/pretrain.seed-2"
    assert told(variant)["overrides"][-1] == "pretrain.seed=2" and "pretrain.seed=2" not in told()["overrides"]
    config = config_of(f"run={variant}")
    assert (config.pretrain.seed, config.ppo.kl_coef, config.pretrain.context) == (2, 0.2, 64)
    states = threefold.status(f"run={variant}").set_index("stage").state
    assert states["pretrain"] == "fresh" and config_of("run=mine").pretrain.context == 64


def test_a_sweep_starts_from_what_its_run_was_told(quick):
    threefold_(*MINE, "ppo.kl_coef=0.2", "pretrain.seed=5", "reward@ppo.reward=length", "ppo.reward.args={}")
    typed = ["run=mine", "target=pretrain", "pretrain.context=32,64", "pretrain.seed=1,2"]
    config, fixed, space = sweep_space.read(typed)
    assert config.data.text.path == "a.txt" and "ppo.kl_coef=0.2" in fixed and "pretrain.seed=5" not in fixed
    assert [dimension.key for dimension in space] == ["pretrain.context", "pretrain.seed"]
    assert threefold_("sweep", *typed) == 0
    assert len(list(Path("runs/mine/variants").glob("*/choices.json"))) == 4
    assert "ppo.kl_coef=0.2" in told()["overrides"] and not any("context" in text for text in told()["overrides"])


def test_passwords_and_values_of_the_environment_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", "dbPLANTEDsecret")
    runs = f"runs={tmp_path}"
    typed = [runs, "run=mine", "data.text.config_name=https://joe:PLANTEDword@host/rows", "seed=3"]
    typed += ["comparisons.judge.args={key: '${oc.env:PLANTED}'}"]
    choices.keep(*choices.compose_run(typed))
    stored = (tmp_path / "mine/choices.json").read_text()
    assert "PLANTEDword" not in stored and "PLANTEDsecret" not in stored and "${oc.env:PLANTED}" in stored
    with pytest.raises(UserError, match=r"data.text.config_name https://host/rows → None"):
        choices.compose_run([runs, "run=mine"])
    config, _ = choices.compose_run([runs, "run=mine", typed[2]])
    assert config.data.text.config_name == "https://joe:PLANTEDword@host/rows" and config.seed == 3


def test_what_is_stored_and_no_key_any_more_is_said(quick, capsys):
    threefold_(*MINE)
    write_json(Path("runs/mine/choices.json"), told() | {"overrides": ["ppo.kl_coef=-1"]})
    assert threefold_("status", "run=mine") == 2
    assert "(from runs/mine/choices.json, what this run was told; give another value)" in capsys.readouterr().err
    Path("runs/mine/choices.json").write_text("{}]")
    assert threefold_("status", "run=mine") == 2
    assert "choices.json: is damaged" in capsys.readouterr().err


def test_runs_are_listed_with_their_main_figures(quick, capsys):
    assert threefold_("runs") == 0
    assert capsys.readouterr().out == "no run in runs\n"
    threefold_(*MINE)
    threefold_("run", "run=deep/er", "experiment=smoke", "target=pretrain", "seeds=2")
    capsys.readouterr()
    assert threefold_("runs") == 0
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["run", "experiment", "made", "tokenizer", "bytes_per_token", "pretrain", "bits_per_byte"]
    assert sorted(rows) == [
        ["deep/er", "smoke", "2026-11-29T12:00:00", "3.25", "2"],
        ["mine", "demo", "2026-11-29T12:00:00", "3.25"],
    ]


COMMANDS = st.fixed_dictionaries(
    {
        "command": st.sampled_from(["run", "run", "submit", "seeds", "sweep", "status", "config", "report", "finish"]),
        "run": st.sampled_from(["one", "two", None]),
        "experiment": st.sampled_from([None, None, "smoke", "arithmetic"]),
        "path": st.sampled_from([None, None, "a.txt", "b.txt"]),
        "kl": st.sampled_from([None, 0.1, 0.3]),
        "takeover": st.sampled_from([False, False, False, True]),
    }
)


def spelt(step):
    """The arguments of a command."""
    keys = {"run": "run", "experiment": "experiment", "path": "data.text.path", "kl": "ppo.kl_coef"}
    arguments = [f"{key}={step[name]}" for name, key in keys.items() if step[name] is not None]
    arguments += ["takeover=true"] * step["takeover"]
    if step["command"] == "seeds":
        return ["run", "target=pretrain", "seeds=2", *arguments]
    if step["command"] == "sweep":
        return ["sweep", "target=pretrain", "pretrain.context=16,32", "sweep.metric=pretrain.bits_per_byte", *arguments]
    return [step["command"], "target=tokenizer", *arguments]


def expected(before, step):
    """What a run is told after a command, by a plain rule; None where the command is to be refused."""
    typed = {name: step[name] for name in ("experiment", "path", "kl") if step[name] is not None}
    if before is None or step["takeover"]:
        experiment = typed.get("experiment", "demo")
        return {"experiment": experiment, "path": OWN[experiment], "kl": None} | typed
    other = any(name in typed and typed[name] != before[name] for name in ("experiment", "path"))
    return None if other else before | typed


def seen_by(link):
    return _data_of((link / "config.yaml").resolve())


@functools.cache
def _data_of(file):
    return OmegaConf.load(file).data.text.path


def finish_jobs(jobs):
    """Slurm makes what is queued."""
    for work in list(jobs.values()):
        artifact = job_records.Artifact(Path(work.runs), work.stage, work.fingerprint)
        config = quickly(work.overrides)
        if not artifact.finished:
            made_at_once(config, chain.plan(config, [work.stage])[work.stage], {})
        work._sign_off(artifact)
    jobs.clear()


MAKING = ("run", "submit", "seeds", "sweep")


def replaced(command, **more):
    return dict.fromkeys(("run", "experiment", "path", "kl")) | {"command": command, "takeover": False} | more


@settings(
    derandomize=True, max_examples=6, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@example([replaced("run", run="one", path="a.txt"), replaced("run", run="one", experiment="smoke")])
@example([replaced("submit", run="one", path="a.txt"), replaced("run", run="one", takeover=True), replaced("finish")])
@given(st.lists(COMMANDS, min_size=10, max_size=10))
def test_no_order_of_commands_replaces_a_run(tmp_path_factory, steps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        jobs, runs = stand_in(monkeypatch, tmp_path_factory.mktemp("any")), {}
        for step in steps:
            if step["command"] == "finish":
                finish_jobs(jobs)
            else:
                name = step["run"] or step["experiment"] or "demo"
                now, before = expected(runs.get(name), step), snapshot()
                status = threefold_(*spelt(step))
                if step["command"] not in MAKING or now is None:
                    assert snapshot() == before
                    assert now is not None or status == 2
                else:
                    assert status == 0
                    runs[name] = now
            for name, now in runs.items() if step is steps[-1] else ():
                config = config_of(f"run={name}")
                assert (config.data.text.path, config.ppo.kl_coef) == (now["path"], now["kl"] or default_kl(now))
            for name, now in runs.items():
                links = Path("runs", name).glob("*/config.yaml")
                assert {seen_by(link.parent) for link in links} <= {now["path"]}


def default_kl(now):
    return _of_groups(f"experiment={now['experiment']}").ppo.kl_coef


def snapshot():
    """What of the runs is on disk."""
    links = {str(link): link.readlink() for link in Path("runs").glob("*/*") if link.is_symlink()}
    return links, {str(file): json.loads(file.read_text()) for file in Path("runs").glob("*/choices.json")}
