"""Searches with Optuna: their course, what a kill leaves, trials that fail or do badly."""

import os
import signal
import subprocess
import sys
import time

import optuna
import pytest
import sweeps
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.report import studies
from threefold.runs import sweep_search, sweep_space, variants
from threefold.runs.sweep_space import Dimension

SPACE = ["dpo.beta=tag(log,interval(0.01,1.0))", "dpo.learning_rate=tag(log,interval(1e-5,1e-2))"]
SEARCH = [*SPACE, "sweep.trials=12", "sweep.batch=3", "sweep.kl=dpo.drift.kl"]


class Killed(BaseException):
    pass


def params(found):
    return [run["setting"] for run in found["runs"]]


def studied(runs):
    """The trials in the journal of a search, whatever its name."""
    file = str(runs / "smoke/sweep.journal")
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(file))).trials


def test_a_search_does_better_than_chance_and_says_what_mattered(tmp_path, monkeypatch, capsys):
    stages = sweeps.stand_in(monkeypatch)
    found = sweeps.swept(tmp_path, *SPACE, "sweep.trials=20", "sweep.random_trials=6")
    means = [mean for _, mean in sorted((row["trial"], row["mean"]) for row in found["settings"])]
    assert sum(means[6:]) / 14 > sum(means[:6]) / 6 and found["settings"][0]["mean"] == max(means) > 0.87
    assert sum(found["importance"].values()) == pytest.approx(1) and set(found["importance"]) == set(found["keys"])
    assert [stage for stage, _ in stages.made].count("dpo") == 20
    assert "trial 20: dpo.beta" in capsys.readouterr().out
    by_key, *_, course = studies.drawn(found)
    assert by_key.drawing["layout"]["xaxis"]["type"] == "log"
    assert by_key.drawing["layout"]["xaxis"]["ticktext"][:4] == ["0.01", "0.02", "0.05", "0.1"]
    assert studies.log_ticks([2e-5, 0.5]) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    best = next(trace for trace in course.drawing["data"] if trace["name"] == "best so far")
    assert best["x"] == list(range(1, 21)) and best["y"] == [max(means[: i + 1]) for i in range(20)]


@pytest.mark.slow
def test_a_search_killed_in_the_middle_comes_to_the_same_as_one_that_was_not(tmp_path, monkeypatch):
    whole = sweeps.stand_in(monkeypatch)
    expected = sweeps.swept(tmp_path / "whole", *SEARCH)
    left = {"dpo": 5}

    def breaks(config):
        left["dpo"] -= 1
        if left["dpo"] < 0:
            raise Killed

    stages = sweeps.stand_in(monkeypatch, breaks=breaks)
    with pytest.raises(Killed):
        sweeps.swept(tmp_path / "killed", *SEARCH)
    partial = read_json(tmp_path / "killed/smoke/sweep.json")
    assert len(partial["settings"]) == 3  # one whole batch; of the second two runs were made
    stages.breaks = lambda config: None
    found = sweeps.swept(tmp_path / "killed", *SEARCH)
    assert params(found) == params(expected) and found["settings"] == expected["settings"]
    assert [row["trial"] for row in found["runs"]] == list(range(1, 13))
    assert len(stages.made) == len(whole.made) == 4 + 12  # nothing was made twice


def test_a_draw_that_cannot_be_made_fails_alone(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    uneven = ["dpo.batch_size=int(interval(4,16))", "runtime.micro_batch_size=2", "sweep.trials=8", "sweep.batch=4"]
    found = sweeps.swept(tmp_path, *uneven)
    good = [run["setting"]["dpo.batch_size"] % 2 == 0 for run in found["runs"]]
    assert len(good) == 8 and 0 < sum(good) < 8
    assert [run["state"] for run in found["runs"]] == [("failed", "complete")[each] for each in good]
    assert all("micro_batch_size" in run["reason"] for run in found["failed"])


@pytest.mark.parametrize("other", ["sweep.prune=dpo.loss", "sweep.prune_direction=minimize", "sweep.kl=dpo.drift.kl"])
def test_what_trials_are_compared_by_makes_another_search(other, monkeypatch):
    sweeps.stand_in(monkeypatch)
    given = ["target=dpo", *SPACE, "sweep.trials=12"]
    names = {
        sweep_search.identity(config, space) for config, _, space in map(sweep_space.read, (given, [*given, other]))
    }
    assert len(names) == 2


def test_what_a_kill_leaves_in_the_journal_is_mended(tmp_path):
    file = tmp_path / "sweep.journal"
    file.write_bytes(b'{"a": 1}\n{"b": ')
    (tmp_path / "sweep.journal.lock").touch()
    sweep_search.mend(file)
    assert file.read_bytes() == b'{"a": 1}\n' and not (tmp_path / "sweep.journal.lock").exists()


def test_a_longer_search_goes_on_from_a_shorter_one(tmp_path, monkeypatch):
    stages = sweeps.stand_in(monkeypatch)
    short = sweeps.swept(tmp_path, *SPACE, "sweep.trials=3", "sweep.batch=3")
    made = len(stages.made)
    assert sweeps.swept(tmp_path, *SPACE, "sweep.trials=3", "sweep.batch=3")["runs"] == short["runs"]
    assert len(stages.made) == made
    longer = sweeps.swept(tmp_path, *SPACE, "sweep.trials=6", "sweep.batch=3")
    assert longer["runs"][:3] == short["runs"] and len(longer["runs"]) == 6 and len(stages.made) == made + 3


def test_failed_trials_are_made_again_alone_with_the_values_that_they_had(tmp_path, monkeypatch, capsys):
    broken = []

    def breaks(config):
        broken.append(config.dpo.beta)
        if len(broken) == 2:
            raise RuntimeError("weights lost\nin the sea")

    stages = sweeps.stand_in(monkeypatch, breaks=breaks)
    first = sweeps.swept(tmp_path, *SPACE, "sweep.trials=4")
    assert [row["state"] for row in first["runs"]] == ["complete", "failed", "complete", "complete"]
    failed = first["failed"][0]
    assert failed["reason"].startswith("weights lost (see ") and failed["setting"]["dpo.beta"] == broken[1]
    made = len(stages.made)
    again = sweeps.swept(tmp_path, *SPACE, "sweep.trials=4")
    assert len(stages.made) == made + 1 and again["failed"] == [] and len(again["runs"]) == 4
    assert sorted(map(str, params(again))) == sorted(map(str, params(first)))


def test_values_that_are_wrong_only_together_fail_their_trial(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    quick = variants.compose

    def compose(overrides):
        config = quick(overrides)
        if config.dpo.loss_type == "ipo" and config.dpo.epochs > 1:
            raise UserError("dpo.epochs: not with ipo")
        return config

    monkeypatch.setattr(variants, "compose", compose)
    found = sweeps.swept(tmp_path, "dpo.loss_type=sigmoid,ipo", "dpo.epochs=1,2", "sweep.trials=8")
    wrong = [run for run in found["runs"] if run["setting"] == {"dpo.loss_type": "ipo", "dpo.epochs": 2}]
    assert wrong and all(run["reason"] == "dpo.epochs: not with ipo" for run in wrong)
    assert {run["state"] for run in found["runs"] if run not in wrong} == {"complete"}


def test_a_trial_is_the_mean_over_its_seeds(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch)
    found = sweeps.swept(tmp_path, *SPACE, "dpo.seed=1,2,3", "sweep.trials=4")
    assert len(found["runs"]) == 12 and all(row["made"] == 3 for row in found["settings"])
    assert all(row["std"] == pytest.approx(0.01) for row in found["settings"])
    told = sorted(trial.value for trial in studied(tmp_path))
    assert told == pytest.approx(sorted(row["mean"] for row in found["settings"]))


PRUNED = ["dpo.beta=0.1,0.12,1.0,0.11", "sweep.trials=4", "sweep.batch=2", "sweep.prune_after_trials=2"]


def begun(runs, *overrides):
    """The overrides of a search whose trials are given: two that do well, one that does badly, one that does well."""
    config, _, space = sweep_space.read(["experiment=smoke", f"runs={runs}", "target=dpo", *PRUNED, *overrides])
    (runs / "smoke").mkdir()
    study = sweep_search.opened(config, space)
    for beta in space[0].values:
        study.enqueue_trial({"dpo.beta": beta})
    return [*PRUNED, *overrides]


def test_trials_that_do_badly_are_ended_while_they_train(tmp_path, monkeypatch, capsys):
    stages = sweeps.stand_in(monkeypatch, steps=3, patience=20.0)
    monkeypatch.setattr(sweep_search, "PAUSE", 0.01)
    search = begun(tmp_path, "sweep.prune=dpo.rewards/accuracies")
    found = sweeps.swept(tmp_path, *search)
    assert [row["state"] for row in found["runs"]] == ["complete", "complete", "pruned", "complete"]
    assert found["runs"][2]["reason"] == "pruned at step 1, rewards/accuracies 0.69" and found["failed"] == []
    told = studied(tmp_path)
    assert told[2].state == TrialState.PRUNED and told[2].intermediate_values == {1: pytest.approx(0.69)}
    assert set(told[0].intermediate_values) == {1, 2, 3}
    assert "pruned" in capsys.readouterr().out
    made = len(stages.made)
    assert sweeps.swept(tmp_path, *search)["runs"] == found["runs"] and len(stages.made) == made
    kept = list((tmp_path / "artifacts").glob("dpo-*.work"))
    assert len(kept) == 1 and (kept[0] / "out/log.jsonl").is_file()  # a run with these values goes on from there


def test_a_trial_that_was_to_be_ended_but_failed_by_itself_is_a_failed_one():
    study = optuna.create_study()
    run = {"run": "r", "state": "failed", "value": None, "kl": None}
    for reason in ("weights lost", "dpo failed: dpo: ended at step 2: pruned at step 1"):
        sweep_search.tell(study, study.ask(), [run | {"reason": reason}], "pruned at step 1")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.PRUNED]


def test_of_a_metric_to_minimize_high_values_are_bad(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch, steps=2, patience=0.3)
    monkeypatch.setattr(sweep_search, "PAUSE", 0.01)
    search = begun(tmp_path, "sweep.prune=dpo.rewards/accuracies", "sweep.prune_direction=minimize")
    assert {row["state"] for row in sweeps.swept(tmp_path, *search)["runs"]} == {"complete"}
    assert studied(tmp_path)[2].intermediate_values == {step: pytest.approx(-0.69) for step in (1, 2)}


def test_a_metric_that_no_step_logs_is_named_with_the_nearest(tmp_path, monkeypatch):
    sweeps.stand_in(monkeypatch, steps=2)
    with pytest.raises(UserError, match=r"dpo logs no accuracies \(nearest: rewards/accuracies\)"):
        sweeps.swept(tmp_path, *PRUNED, "sweep.prune=dpo.accuracies")


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        (Dimension("a", ("x", "y")), optuna.distributions.CategoricalDistribution(("x", "y"))),
        (Dimension("a", (1, 3, 5), step=2), optuna.distributions.IntDistribution(1, 5, step=2)),
        (Dimension("a", (0.5, 0.25), step=-0.25), optuna.distributions.FloatDistribution(0.25, 0.5, step=0.25)),
        (Dimension("a", low=4, high=32), optuna.distributions.IntDistribution(4, 32)),
        (Dimension("a", low=0.1, high=1.0, log=True), optuna.distributions.FloatDistribution(0.1, 1.0, log=True)),
    ],
)
def test_optuna_is_given_the_same_values(dimension, expected):
    assert sweep_search.distribution(dimension) == expected


def wait_for(condition, process, seconds=300):
    """Wait until `condition` holds, while `process` runs."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_search_of_twelve_trials_is_killed_in_the_middle_and_continued(borrowed):
    command = [sys.executable, "-m", "threefold", "sweep", "experiment=smoke", "tracker=none", f"runs={borrowed}"]
    command += ["target=dpo", "dpo.beta=tag(log,interval(0.02,0.5))", "dpo.learning_rate=tag(log,interval(1e-4,1e-2))"]
    command += ["sweep.trials=12", "sweep.batch=4", "launcher.jobs=2"]
    file = borrowed / "smoke/sweep.json"
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: file.is_file() and len(read_json(file)["settings"]) == 4, driver)
    finished = {each.name for each in (borrowed / "artifacts").glob("dpo-*") if (each / "manifest.json").is_file()}
    wait_for(lambda: list((borrowed / "artifacts").glob("dpo-*.work")), driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    made = {each: (borrowed / "artifacts" / each / "manifest.json").stat().st_mtime for each in finished}
    before = read_json(file)["runs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_json(file)
    assert len(found["runs"]) == 12 and {row["state"] for row in found["runs"]} == {"complete"}
    assert found["runs"][:4] == before and "Best: dpo.beta" in done.stdout
    assert 'id="sweep"' in (borrowed / "smoke/report.html").read_text()
    for figure in ("sweep_course", "sweep_importance", "sweep_by_dpo.beta", "sweep_by_dpo.learning_rate"):
        assert (borrowed / f"smoke/report/{figure}.csv").is_file(), figure
    assert made == {each: (borrowed / "artifacts" / each / "manifest.json").stat().st_mtime for each in finished}
    assert set(found["importance"]) == {"dpo.beta", "dpo.learning_rate"}
