"""Making what is stale and nothing else: each artifact once, waiting for others, and saying what became of it."""

import subprocess
import sys
import threading
import types

import pytest
from helpers import composed

from threefold import chain, stages
from threefold.errors import UserError
from threefold.fileio import read_json, read_lines
from threefold.stages import Stage

# a chain of stages that only count how often they run:  first ─▶ second ─▶ third
#                                                         └────▶ side ◀───────┘  (side needs first; third needs side)
FAKES = {
    "first": Stage((), ("ppo.kl_coef",), metric="value"),
    "side": Stage(("first",), ("sft.seed",), metric="value"),
    "second": Stage(("first",), ("dpo.beta",), metric="value"),
    "third": Stage(("second", "side"), ("reward.epochs",), metric="value"),
}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The fakes in place of the chain; `ran` lists their executions, `run[name]` may be replaced."""
    world = types.SimpleNamespace(ran=[], run={}, runs=tmp_path / "runs")
    for module in (stages, chain.checks, chain.making, chain.plans):
        monkeypatch.setattr(module, "STAGES", FAKES)

    def stage(name):
        def run(job):
            world.ran.append(name)
            return world.run[name](job) if name in world.run else {"value": 1.5}

        return types.SimpleNamespace(run=run)

    for name in FAKES:
        monkeypatch.setitem(sys.modules, f"threefold.stages.{name}", stage(name))

    def config(*overrides):
        changed = composed("run=demo", "tracker=none", "runtime.threads=1", "runtime.device=cpu")
        changed.merge_with_dotlist([f"runs={world.runs}", *overrides])
        return changed

    world.config = config
    world.up_to_date = lambda *overrides: chain.bring_up_to_date(config(*overrides))
    world.rows = lambda *overrides: {row["stage"]: row for row in chain.status(config(*overrides))}
    return world


def test_each_stage_runs_once_and_then_is_skipped(fake):
    assert fake.up_to_date() == ["first", "side", "second", "third"]
    assert fake.up_to_date() == []
    assert fake.ran == ["first", "side", "second", "third"]


def test_a_stage_gets_its_parents_and_leaves_metrics_and_a_manifest(fake):
    def third(job):
        job.log(10, {"loss": 2.0})
        return {"value": len(job.inputs), "second": read_json(job.inputs["second"] / "metrics.json")["value"]}

    fake.run["third"] = third
    fake.up_to_date()
    folder = fake.runs / "demo/third"
    metrics, manifest = read_json(folder / "metrics.json"), read_json(folder / "manifest.json")
    assert (metrics["value"], metrics["second"]) == (2, 1.5)
    assert read_lines(folder / "log.jsonl") == [{"step": 10, "loss": 2.0}]
    assert manifest["parts"]["reward.epochs"] == 1
    parents = {name: read_json(fake.runs / f"demo/{name}/manifest.json")["fingerprint"] for name in ("second", "side")}
    assert manifest["parents"] == parents


def test_a_run_with_the_same_values_shares_the_artifacts(fake):
    fake.up_to_date()
    assert fake.up_to_date("run=other") == []
    assert (fake.runs / "other/third").resolve() == (fake.runs / "demo/third").resolve()


def test_going_back_to_earlier_values_runs_nothing(fake):
    fake.up_to_date()
    assert fake.up_to_date("dpo.beta=0.5") == ["second", "third"]
    assert fake.up_to_date() == []


def test_a_target_brings_what_it_needs_and_the_dependents_that_the_run_has(fake):
    assert fake.up_to_date("target=second") == ["first", "second"]
    assert fake.up_to_date("target=first", "ppo.kl_coef=0.5") == ["first", "second"]
    fake.up_to_date("ppo.kl_coef=0.5")
    assert fake.up_to_date("target=second", "ppo.kl_coef=0.7") == ["first", "side", "second", "third"]


def test_without_dependents_a_target_brings_only_what_it_needs(fake):
    fake.up_to_date()
    before = (fake.runs / "demo/third").resolve()
    assert fake.up_to_date("target=second", "ppo.kl_coef=0.5", "dependents=false") == ["first", "second"]
    assert (fake.runs / "demo/third").resolve() == before


def test_an_unknown_target_is_refused_with_the_stages_there_are(fake):
    with pytest.raises(UserError, match="target=secnd: must be one of first, side, second, third"):
        fake.up_to_date("target=secnd")
    assert fake.ran == []


def test_a_failed_stage_leaves_one_line_and_the_next_attempt_starts_clean(fake):
    def fail(job):
        (job.checkpoints / "step").write_text("10")
        raise RuntimeError("out of memory\nat line 3")

    fake.run["second"] = fail
    with pytest.raises(RuntimeError):
        fake.up_to_date()
    artifact = chain.plan(fake.config())["second"].artifact
    assert (artifact.work / "failed.txt").read_text() == "out of memory\n"
    assert "at line 3" in (artifact.work / "traceback.txt").read_text()
    assert not artifact.finished and not artifact.running

    fake.run["second"] = lambda job: {"value": int((job.checkpoints / "step").read_text())}
    assert fake.up_to_date() == ["second", "third"]
    assert read_json(artifact.folder / "metrics.json")["value"] == 10
    assert not artifact.work.exists()


def test_an_error_without_words_is_named_by_its_type(fake):
    def fail(job):
        raise ZeroDivisionError

    fake.run["first"] = fail
    with pytest.raises(ZeroDivisionError):
        fake.up_to_date()
    assert fake.rows()["first"]["reason"] == "ZeroDivisionError"


def test_of_two_that_want_one_artifact_the_second_waits_and_uses_it(fake, capsys):
    entered, go_on, made = threading.Event(), threading.Event(), {}

    def slow(job):
        entered.set()
        assert go_on.wait(30)
        return {"value": 1}

    fake.run["first"] = slow
    config = fake.config()
    planned = chain.plan(config)

    def make(who):
        made[who] = chain.make(config, planned["first"], planned)

    one, two = (threading.Thread(target=make, args=(who,)) for who in ("one", "two"))
    one.start()
    assert entered.wait(60)
    two.start()
    two.join(0.5)
    assert two.is_alive() and made == {}
    go_on.set()
    one.join(30)
    two.join(30)
    assert made == {"one": True, "two": False}
    assert fake.ran == ["first"]
    assert "first: another process is making it; waiting for that" in capsys.readouterr().out


def test_status_tells_missing_fresh_and_stale_with_the_reason(fake):
    assert {row["state"] for row in fake.rows().values()} == {"missing"}
    fake.up_to_date("target=second")
    rows = fake.rows()
    assert [rows[name]["state"] for name in FAKES] == ["fresh", "missing", "fresh", "missing"]
    assert rows["first"]["metric"] == "value 1.5" and len(rows["first"]["fingerprint"]) == 12
    rows = fake.rows("ppo.kl_coef=0.2")
    assert rows["first"]["state"] == "stale" and rows["first"]["reason"] == "ppo.kl_coef 0.05 → 0.2"
    assert rows["second"]["state"] == "stale" and rows["second"]["reason"] == "first is stale"
    assert fake.ran == ["first", "second"]


def test_status_shows_a_metric_that_is_zero(fake):
    fake.run["first"] = lambda job: {"value": 0.0}
    fake.up_to_date("target=first")
    assert fake.rows()["first"]["metric"] == "value 0"


def test_status_tells_failed_interrupted_and_running(fake):
    planned = chain.plan(fake.config())
    for name in ("first", "second"):
        planned[name].artifact.open()
    (planned["first"].artifact.work / "failed.txt").write_text("out of memory\n")
    rows = fake.rows()
    assert (rows["first"]["state"], rows["first"]["reason"]) == ("failed", "out of memory")
    assert rows["second"]["state"] == "interrupted"

    lock = planned["second"].artifact.lock().lock_file
    code = f"import filelock, time\nwith filelock.FileLock({lock!r}): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert fake.rows()["second"]["state"] == "running"
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    assert fake.rows()["second"]["state"] == "interrupted"


def test_status_writes_nothing(fake):
    fake.rows()
    assert not fake.runs.exists()


@pytest.mark.parametrize("code", [0, None, 3])
def test_a_stage_that_ends_python_has_failed(fake, code):
    fake.run["second"] = lambda job: sys.exit(code)
    with pytest.raises(UserError, match=rf"^second: something that it called ended with sys\.exit\({code}\)$"):
        fake.up_to_date()
    assert fake.rows()["second"]["state"] == "failed" and fake.ran[-1] != "third"
