"""Sweeps: what is read of overrides, the runs that they make, what they come to, and what fails and is made again."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sweeps
import yaml
from filelock import FileLock
from helpers import make_job
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from threefold import cli
from threefold.artifacts.artifact import stop_file
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import read_json, write_json
from threefold.report import studies
from threefold.report.run import Run
from threefold.runs import sweep_space, sweep_table, trials
from threefold.runs.sweep_space import Dimension

CONF = Path(__file__).parents[2] / "conf"


def test_values_are_read_in_hydras_syntax():
    fixed, space = sweep_space.parse(
        [
            "experiment=smoke", "ppo.kl_coef=0.02,0.05,0.1", "dpo.epochs=range(1,6,2)", "model=choice(tiny,gpt2)",
            "dpo.beta=tag(log,interval(0.01,0.5))", "dpo.batch_size=int(interval(4,32))", "seed=1,2",
            "data.text.path='a,b'",
        ]
    )  # fmt: skip
    assert fixed == ["experiment=smoke", "data.text.path='a,b'"]
    coef, epochs, model, beta, batch = space[:5]
    assert coef == Dimension("ppo.kl_coef", (0.02, 0.05, 0.1)) and model.values == ("tiny", "gpt2")
    assert (epochs.values, epochs.step) == ((1, 3, 5), 2)
    assert (beta.low, beta.high, beta.log, beta.values) == (0.01, 0.5, True, ())
    assert (batch.low, batch.high) == (4, 32) and type(batch.low) is int
    assert [dimension.repeats for dimension in space] == [False] * 5 + [True]
    assert Dimension("dpo.seed", (1, 2)).repeats and not Dimension("dpo.seeds", (1, 2)).repeats


def test_combinations_vary_the_last_key_fastest():
    space = [Dimension("a", (1, 2)), Dimension("b", ("x", "y"))]
    assert sweep_space.combinations(space) == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    assert sweep_space.combinations([]) == [{}]


def test_a_run_is_called_after_its_values_as_far_as_a_folder_can_be():
    made = trials.variant({"dpo.beta": 0.1, "reward@ppo.reward": "length", "seed": 2}, "dpo")
    assert made.name == "variants/dpo.beta=0.1,reward@ppo.reward=length,seed=2"
    assert made.overrides == ("dpo.beta=0.1", "reward@ppo.reward=length", "seed=2")
    config = compose(["experiment=smoke"])
    assert compose(trials.variant({"dpo.beta": 0.1, "seed": 2}, "dpo").arguments(config, [])).run.endswith("0.1,seed=2")
    odd, other = (trials.folder_name(f"data.text.path=my{mark}file") for mark in "/ ")
    assert odd != other and "/" not in odd and " " not in other and len(trials.folder_name("x" * 999)) < 200


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "nothing to sweep"),
        (["dpo.bta=0.1,0.2"], "nearest: dpo.beta"),
        (["dpo.beta=0.1,-1"], "at least 0"),
        (["dpo.beta=0.1,0.10"], "names a value twice"),
        (["dpo.beta=0.1,0.2", "dpo.beta=0.3"], "is given twice"),
        (["dpo.beta=interval(0.1,0.2)"], "say how long"),
        (["dpo.beta=interval(0.2,0.1)"], "lower end must be below"),
        (["dpo.beta=tag(log,interval(0,0.1))"], "begins above 0"),
        (["seed=interval(1,9)"], "seeds are repetitions"),
        (["dpo.beta=glob(*)"], "list the values"),
        (["dpo.beta=["], "dpo.beta=[:"),
        (["seed=1,2", "seeds=2"], "lists its seeds"),
        (["seed=1,2", "sweep.trials=4"], "nothing to search"),
        (["target=dpo,ppo"], "choose one target"),
        (["target=dop", "seed=1,2"], "nearest: dpo"),
        (["target=dpo", "ppo.kl_coef=0.1,0.2"], "make no difference to dpo"),
        (["target=dpo", "seed=1,2", "sweep.metric=ppo.score"], "must be STAGE.METRIC"),
        (["target=dpo", "seed=1,2", "sweep.prune=dpo.loss"], "set sweep.trials"),
        (["target=frontier", "seed=1,2"], "has no main metric"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        sweep_space.read(["experiment=smoke", *overrides])


def test_the_metric_its_kl_and_its_direction_follow_from_the_target():
    def named(*overrides):
        config = compose(["experiment=smoke", *overrides])
        return sweep_space.metric(config), sweep_space.kl_metric(config)

    assert named("target=ppo") == ("ppo.score", "ppo.kl") and named("target=dpo") == ("dpo.accuracy", None)
    assert named("evaluate.models=[sft,dpo]") == ("evaluate.models.dpo.gold_mean", "evaluate.models.dpo.kl")
    assert named("sweep.metric=evaluate.ppo_gold_mean")[1] == "evaluate.models.ppo.kl"
    assert named("sweep.kl=ppo.kl")[1] == "ppo.kl"
    assert sweep_space.direction("dpo.accuracy", None) == "maximize"
    assert {sweep_space.direction(name, None) for name in ("sft.reply_bits_per_byte", "dpo.loss")} == {"minimize"}
    assert sweep_space.direction("dpo.loss", "maximize") == "maximize"


def run_of(setting, value, kl=None, state="complete", seed=1):
    known = {"setting": setting, "repetition": {"seed": seed}, "run": "r", "reason": None}
    return known | {"state": state, "value": value, "kl": kl}


def test_settings_are_compared_by_their_mean_over_seeds():
    values = {(1, 1): 0.5, (1, 2): 0.7, (2, 1): 0.8, (2, 2): 0.6}
    runs = [run_of({"a": a}, value, seed=seed) for (a, seed), value in values.items()]
    runs += [run_of({"a": 3}, 0.9), run_of({"a": 3}, None, state="failed", seed=2)]
    rows = sweep_table.settings(runs, "maximize")
    assert [row["setting"]["a"] for row in rows] == [3, 2, 1] and [row["best"] for row in rows] == [False, True, False]
    assert rows[1]["mean"] == pytest.approx(0.7) and rows[1]["std"] == pytest.approx(0.1 * 2**0.5)
    assert (rows[0]["made"], rows[0]["runs"], rows[0]["state"]) == (1, 2, "failed")
    assert [row["setting"]["a"] for row in sweep_table.settings(runs, "minimize")] == [1, 2, 3]


def test_the_front_holds_what_no_other_beats_in_metric_and_kl():
    points = {"a": (0.5, 1.0), "b": (0.6, 2.0), "c": (0.55, 3.0), "d": (0.9, 4.0), "e": (0.4, 1.0), "f": (1.0, None)}
    rows = sweep_table.settings([run_of({"k": k}, *point) for k, point in points.items()], "maximize")
    assert {row["setting"]["k"] for row in rows if row["front"]} == {"a", "b", "d"}
    rows = sweep_table.settings([run_of({"k": k}, *point) for k, point in points.items()], "minimize")
    assert {row["setting"]["k"] for row in rows if row["front"]} == {"e"}


def test_shares_of_variance_are_those_of_an_analysis_of_variance():
    # a moves the metric by ±1, b by ±1/2, both together by ±1/4, the seed by ±1/10: squares 1, 1/4, 1/16, 1/100
    runs = [
        run_of({"b": b, "a": a}, a + b / 2 + a * b / 4 + seed / 10, seed=seed)
        for a in (-1, 1) for b in (-1, 1) for seed in (-1, 1)
    ]  # fmt: skip
    total = 1 + 1 / 4 + 1 / 16 + 1 / 100
    shares = sweep_table.variance_shares(runs)
    assert list(shares) == ["a", "b", "seeds"]
    assert shares == {k: pytest.approx(v / total) for k, v in {"a": 1, "b": 1 / 4, "seeds": 1 / 100}.items()}
    assert sweep_table.variance_shares(runs[:1]) == {}


def section_of(runs):
    """The sweep in the report of the smoke run below `runs`."""
    return studies.sweep_section(Run("smoke", runs / "smoke", {}, {}))


GRID = ["dpo.beta=0.1,0.02", "dpo.learning_rate=3e-4,3e-3", "dpo.seed=1,2,3", "sweep.kl=dpo.drift.kl"]


def test_a_grid_makes_what_all_share_once_and_finds_the_best(tmp_path, monkeypatch, capsys):
    stages = sweeps.stand_in(monkeypatch)
    found = sweeps.swept(tmp_path, *GRID)
    made = [stage for stage, _ in stages.made]
    assert {stage: made.count(stage) for stage in made} == {
        "tokenizer": 1, "pretrain": 1, "sft": 1, "comparisons": 1, "dpo": 12,
    }  # fmt: skip
    best = found["settings"][0]
    assert best["best"] and best["setting"] == {"dpo.beta": 0.1, "dpo.learning_rate": 3e-4}
    assert (best["mean"], best["std"]) == (pytest.approx(0.9), pytest.approx(0.01)) and best["kl"] == pytest.approx(10)
    assert found["repeated"] == ["dpo.seed"] and set(found["importance"]) == {*found["keys"], "seeds"}
    said = capsys.readouterr().out
    assert "0.9 ± 0.01" in said and "best, front" in said and "Best: dpo.beta 0.1, dpo.learning_rate 0.0003" in said
    with (tmp_path / "smoke/sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24  # of each run accuracy and KL
    accuracies = {row["value"] for row in rows if row["dpo.seed"] == "2" and row["metric"] == "accuracy"}
    assert "0.9" in accuracies and {row["stage"] for row in rows} == {"dpo"}
    section = section_of(tmp_path)
    assert [part.name for part in section.parts] == [
        "sweep", "sweep_by_dpo.beta", "sweep_by_dpo.learning_rate", "sweep_importance", "sweep_by_kl",
    ]  # fmt: skip
    assert section.parts[0].rows[1][:3] == ("0.1", "0.0003", "0.9 ± 0.01") and section.parts[0].data[0]["kl"] == 10
    assert {row["front"] for row in section.parts[4].data} == {True, False}
    assert any(point.startswith("Share of the variance (main effects): dpo.") for point in section.points)
    sweeps.swept(tmp_path, *GRID)
    assert len(stages.made) == 16


def of_two_splits(config) -> dict:
    """Metrics of the evaluation: DPO with beta 0.1 is best on the validation prompts, with 0.3 on the test prompts."""
    by_beta = {0.1: (0.6, 0.5), 0.2: (0.4, 0.3), 0.3: (0.5, 0.9)}  # gold on validation and on test
    validation, test = (gold + 0.01 * (config.dpo.seed - 1) for gold in by_beta[config.dpo.beta])
    found = {"models": {"dpo": {"gold_mean": test, "kl": 1.0, "tasks": {"letters": {"accuracy": test}}}}}
    if config.evaluate.validation_prompts == config.evaluate.prompts:
        found["validation"] = {"models": {"dpo": {"gold_mean": validation}}}
    return found


EVALUATED = ["target=evaluate", "evaluate.models=[sft,dpo]", "dpo.beta=0.1,0.2,0.3"]


@pytest.mark.parametrize("search", [[], ["sweep.trials=6", "sweep.random_trials=6"]])
def test_settings_are_chosen_on_the_validation_prompts_and_reported_on_the_test_prompts(
    search, tmp_path, monkeypatch, capsys
):
    sweeps.stand_in(monkeypatch, evaluation=of_two_splits)
    found = sweeps.swept(tmp_path, *EVALUATED, "dpo.seed=1,2", *search)
    assert found["metric"] == "evaluate.validation.models.dpo.gold_mean"
    assert found["reported"] == "evaluate.models.dpo.gold_mean"
    best = found["settings"][0]
    asked = {row["setting"]["dpo.beta"] for row in found["settings"]}
    assert best["best"] and best["setting"]["dpo.beta"] == (0.1 if 0.1 in asked else 0.3 if 0.3 in asked else 0.2)
    if 0.1 in asked:  # a search draws at random
        assert best["mean"] == pytest.approx(0.605) and best["reported"] == pytest.approx(0.505)
        assert best["reported_std"] == pytest.approx(0.01 / 2**0.5)
        said = " ".join(capsys.readouterr().out.split())
        assert "on the test prompts, which had no part in the choice: 0.505 ± 0.0071." in said
    with (tmp_path / "smoke/sweep.csv").open() as stream:
        of_dpo = [
            row["metric"] for row in csv.DictReader(stream) if (row["stage"], row["model"]) == ("evaluate", "dpo")
        ]
    assert {"validation.gold_mean", "gold_mean", "kl"} <= set(of_dpo)
    heading, first, *_ = section_of(tmp_path).parts[0].rows
    assert first[heading.index("evaluate.models.dpo.gold_mean")].startswith(f"{best['reported']:.4g}")


def test_what_has_no_value_on_validation_prompts_is_said_to_be_too_good(tmp_path, monkeypatch, capsys):
    sweeps.stand_in(monkeypatch, evaluation=of_two_splits)
    task = "evaluate.models.dpo.tasks.letters.accuracy"
    found = sweeps.swept(tmp_path, *EVALUATED, f"sweep.metric={task}")
    assert (found["metric"], found["reported"]) == (task, None) and found["settings"][0]["setting"] == {"dpo.beta": 0.3}
    assert "It was chosen by this very number, which is therefore rather too good" in capsys.readouterr().out


def test_every_figure_of_the_evaluation_has_the_one_that_it_is_chosen_by():
    def chosen_by(metric, *overrides):
        config = compose(["experiment=smoke", "evaluate.prompts=9", f"sweep.metric={metric}", *overrides])
        return sweep_space.objective(config), sweep_space.validation_override(config)

    asked = ["evaluate.validation_prompts=9"]
    assert chosen_by("evaluate.ppo_gold_mean") == ("evaluate.validation.models.ppo.gold_mean", asked)
    assert chosen_by("evaluate.models.dpo.second_judge_mean")[0] == "evaluate.validation.models.dpo.second_judge_mean"
    assert chosen_by("evaluate.validation.models.dpo.kl") == ("evaluate.validation.models.dpo.kl", asked)
    assert chosen_by("evaluate.models.dpo.kl", "evaluate.validation_prompts=4")[1] == []
    for metric in (
        "dpo.accuracy",
        "evaluate.models.dpo.text_bits_per_byte",
        "evaluate.models.dpo.tasks.letters.accuracy",
    ):
        assert chosen_by(metric) == (metric, [])


def test_a_sweep_made_from_other_stages_than_the_run_has_is_not_shown(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    assert section_of(tmp_path) is None
    found = sweeps.swept(tmp_path, "dpo.beta=0.1,0.2", "sft.seed=1")
    assert set(found["made_from"]) == {"tokenizer", "pretrain", "sft", "comparisons"}
    assert section_of(tmp_path).parts
    sweeps.swept(tmp_path, "dpo.beta=0.1,0.2", "sft.seed=2", "run=other")
    (tmp_path / "smoke/sft").unlink()
    (tmp_path / "smoke/sft").symlink_to((tmp_path / "other/sft").resolve())
    assert section_of(tmp_path).lead == (studies.OLD_SWEEP,)


def test_failed_runs_are_listed_and_the_same_command_makes_them_alone(tmp_path, monkeypatch, capsys):
    broken = {(0.02, 3)}

    def breaks(config):
        if (config.dpo.beta, config.dpo.seed) in broken:
            raise RuntimeError("weights lost\nin the sea")

    stages = sweeps.stand_in(monkeypatch, breaks=breaks)
    command = ["sweep", "experiment=smoke", f"runs={tmp_path}", "target=dpo", "dpo.beta=0.1,0.02", "dpo.seed=2,3"]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "1 of 4 runs failed; the same command makes them alone" in said
    assert "  dpo.beta 0.02, dpo.seed 3: weights lost (see " in said and "in the sea" not in said and "1 of 2" in said
    before = len(stages.made)
    broken.clear()
    cli.main(command)
    assert len(stages.made) == before + 1 and "runs failed" not in capsys.readouterr().out
    assert read_json(tmp_path / "smoke/sweep.json")["failed"] == []


def test_an_interrupted_sweep_continues(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def breaks(config):
        if config.dpo.beta == 0.03:
            raise Killed

    stages = sweeps.stand_in(monkeypatch, breaks=breaks)
    with pytest.raises(Killed):
        sweeps.swept(tmp_path, "dpo.beta=0.01,0.02,0.03,0.04")
    assert len(stages.made) == 4 + 2
    stages.breaks = lambda config: None
    assert len(sweeps.swept(tmp_path, "dpo.beta=0.01,0.02,0.03,0.04")["settings"]) == 4
    assert len(stages.made) == 4 + 4


def test_a_metric_that_no_run_has_is_named_with_the_nearest(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    with pytest.raises(UserError, match=r"dpo.acuracy: is not among the numbers of .*nearest: accuracy"):
        sweeps.swept(tmp_path, "dpo.beta=0.1,0.2", "sweep.metric=dpo.acuracy")


def test_a_grid_needs_no_optuna():
    code = "import sys; sys.modules['optuna'] = None; from threefold.runs import sweep, trials"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_sweep_of_a_run_goes_on_at_a_time(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    (tmp_path / "smoke").mkdir()
    with FileLock(tmp_path / "smoke/sweep.lock"), pytest.raises(UserError, match="another sweep"):
        sweeps.swept(tmp_path, "dpo.beta=0.1,0.2")


def test_a_shared_stage_that_fails_fails_the_runs_that_need_it(tmp_path, monkeypatch):
    stages = sweeps.stand_in(monkeypatch)
    made = stages.make

    def make(config, entry, planned, others=None):
        if entry.stage == "comparisons":
            raise UserError("comparisons: too few pairs\nwith more below")
        return made(config, entry, planned, others)

    monkeypatch.setattr(sweeps.chain, "make", make)
    found = sweeps.swept(tmp_path, "dpo.beta=0.1,0.2")
    assert [run["reason"] for run in found["failed"]] == ["comparisons: too few pairs"] * 2


def test_a_kl_that_nobody_asked_for_may_be_missing(tmp_path):
    (tmp_path / "dpo").mkdir()
    write_json(tmp_path / "dpo/metrics.json", {"accuracy": 0.5})
    assert (
        trials.measured(tmp_path, "dpo.kl", needed=False) is None and trials.measured(tmp_path, "dpo.accuracy") == 0.5
    )
    with pytest.raises(UserError, match=r"dpo\.kl: is not among the numbers of"):
        trials.measured(tmp_path, "dpo.kl")


def test_a_stage_ends_at_the_next_step_that_it_logs_when_asked_to(tmp_path):
    job = make_job("dpo", tmp_path)
    job.log(1, {"loss": 1.0})
    for other in ("other", "smoker", "smoke/variants/a"):
        write_json(stop_file(tmp_path), {"run": other, "reason": "not for this run"})
        job.log(1, {"loss": 1.0})
    write_json(stop_file(tmp_path), {"run": "smoke", "reason": "pruned"})
    with pytest.raises(UserError, match="dpo: ended at step 2: pruned"):
        job.log(2, {"loss": 0.5})


@pytest.mark.slow
def test_the_command_makes_what_is_missing_in_processes_of_their_own(borrowed, capsys):
    command = ["sweep", "experiment=smoke", "tracker=none", f"runs={borrowed}", "target=dpo", "dpo.beta=0.1,0.2"]
    cli.main([*command, "launcher.jobs=2"])
    said = capsys.readouterr().out
    assert "1 variants, 1 at a time" in said and "variants/dpo.beta=0.2: done" in said and "Best: dpo.beta" in said
    found = read_json(borrowed / "smoke/sweep.json")
    for row in found["runs"]:
        metrics = read_json(borrowed / row["run"] / "dpo/metrics.json")
        assert row["value"] == metrics["accuracy"] and row["setting"]["dpo.beta"] in (0.1, 0.2)
    assert len([each for each in (borrowed / "artifacts").glob("dpo-*") if each.is_dir()]) == 2
    assert 'id="sweep"' in (borrowed / "smoke/report.html").read_text()
    assert "## Settings by dpo.accuracy" in (borrowed / "smoke/report.md").read_text()
    assert (borrowed / "smoke/report/sweep_by_dpo.beta.csv").is_file()


def test_the_sweep_for_wandb_has_the_shape_that_its_agent_needs(smoke, monkeypatch):
    asked = yaml.safe_load((CONF / "sweep.yaml").read_text())
    assert asked["method"] in ("grid", "random", "bayes") and asked["metric"]["goal"] in ("maximize", "minimize")
    chosen = {key: {"value": (each["min"] * each["max"]) ** 0.5} for key, each in asked["parameters"].items()}
    values = wandb_sweeps.create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = wandb_sweeps.create_sweep_command(list(asked["command"]))
    place = command.index("${args_no_hyphens}")
    assert command[:3] == ["${env}", "threefold", "run"] and place == len(command) - 1
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config = compose([*command[3:place], *values])
    assert config.run == "wandb/abc123" and config.tracker.kinds == ["wandb"]
    for key, each in chosen.items():
        stage, name = key.split(".")
        assert config[stage][name] == pytest.approx(each["value"])
    assert asked["metric"]["name"] in json.loads((smoke / "smoke" / config.target / "metrics.json").read_text())
