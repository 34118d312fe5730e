"""What each tracker keeps can be read back: W&B's runs of the smoke run, trackio's database, TensorBoard's events."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import documented
from omegaconf import OmegaConf
from tracking_helpers import OFFLINE, about

from threefold.fileio import read_json, read_lines
from threefold.stages import STAGES
from threefold.tracking.trackers import Histogram, Table

AXIS = {"pretrain": "pretrain/tokens", "ppo": "ppo/rollout"}


def inspected(folder):
    """The records of an offline W&B run, as `wandb leet inspect --json` prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def runs(smoke):
    """Stage → records of its W&B run; other tests of the session may have added runs of other names."""
    found = {}
    for folder in (smoke / "artifacts/wandb/wandb").glob("offline-run-*"):
        records = inspected(folder)
        run = next(record["run"] for record in records if record["type"] == "run")
        if run["run_group"] == "smoke":
            found[run["job_type"]] = records
    return found


def test_every_stage_has_a_run_with_group_job_type_tags_and_lineage(smoke, runs):
    assert set(runs) >= set(STAGES) - {"frontier"}
    for stage, records in runs.items():
        run = next(record["run"] for record in records if record["type"] == "run")
        assert (run["display_name"], run["run_group"], run["project"]) == (f"smoke/{stage}", "smoke", "threefold")
        assert run["tags"][:2] == ["smoke", stage]
        manifest = read_json(smoke / "smoke" / stage / "manifest.json")
        lineage = run["config"]["update"]["lineage"]
        assert lineage == {key: manifest[key] for key in ("fingerprint", "parents")}
        assert next(record["exit"] for record in records if record["type"] == "exit")["exit_code"] == 0
        assert any(record["type"] == "stats" for record in records), "no system metrics"


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_every_documented_step_metric_is_tracked_over_the_stages_axis(stage, smoke, runs):
    items = [record["history"]["item"] for record in runs[stage] if record["type"] == "history"]
    assert {f"{stage}/{name}" for name in documented(f"{stage} steps")} <= {name for item in items for name in item}
    axis = AXIS.get(stage, f"{stage}/optimiser_step")
    globs = [
        record["metric"] for record in runs[stage] if record["type"] == "metric" and "glob_name" in record["metric"]
    ]
    assert [(found["glob_name"], found["step_metric"]) for found in globs] == [(f"{stage}/*", axis)]
    logged = read_lines(smoke / "smoke" / stage / "log.jsonl")
    name = "policy_loss" if stage == "ppo" else "loss"
    kept = {item["_step"]: item[f"{stage}/{name}"] for item in items if f"{stage}/{name}" in item}
    assert kept == pytest.approx({row["step"]: row[name] for row in logged if name in row})


def test_ppo_has_a_table_and_three_histograms_of_every_rollout(runs, smoke):
    items = [record["history"]["item"] for record in runs["ppo"] if record["type"] == "history"]
    assert len(items) == 4
    for item in items:
        for name, count in (("scores", 16), ("advantages", None), ("ratios", None)):
            assert item[f"ppo/{name}._type"] == "histogram"
            counted = sum(item[f"ppo/{name}.values"])
            assert counted == count if count else counted > 0
        assert (item["ppo/samples._type"], item["ppo/samples.nrows"]) == ("table-file", 2)
    (file, *_) = sorted(smoke.glob(f"artifacts/wandb/wandb/*/files/{items[0]['ppo/samples.path']}"))
    table = read_json(file)
    assert table["columns"] == ["rollout", "prompt", "reply", "score", "kl", "tokens"]
    for rollout, prompt, reply, score, kl, tokens in table["data"]:
        assert (rollout, type(prompt), type(reply)) == (1, str, str)
        assert abs(kl) < 0.01 and 1 <= tokens <= 32 and np.isfinite(score)


def test_the_reward_models_check_up_has_its_plots_and_tables(runs):
    (item,) = [r["history"]["item"] for r in runs["reward"] if r["type"] == "history" and probes(r["history"]["item"])]
    for name in ("reliability", "accuracy_by_gap"):
        assert item[f"reward/{name}._type"] == "plotly-file"
    assert item["reward/probes.nrows"] == 8 and item["reward/reliability_table.nrows"] == 10


def probes(item):
    return "reward/probes._type" in item


VALUES = {
    "ppo/rollout": 3,
    "ppo/kl": 0.5,
    "ppo/samples": Table(("prompt", "score"), [("a|b", 1.5)]),
    "ppo/scores": Histogram.of(np.arange(10.0)),
}


def test_trackio_is_read_back(tmp_path):
    pytest.importorskip("trackio")
    code = f"""
import sys
sys.path += {[str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]!r}
from pathlib import Path
from omegaconf import OmegaConf
from plotly import graph_objects
from threefold.tracking.trackers import Trackers
from test_trackers import OFFLINE, VALUES, about
folder = Path(sys.argv[1])
for known in (-1, 3):
    trackers = Trackers(OmegaConf.create(OFFLINE | {{"kinds": ["trackio"]}}), about(folder), known)
    for step in (3, 4):
        trackers.log(step, {{name.removeprefix("ppo/"): value for name, value in VALUES.items()}}, {{}})
        if step == 3 and known == -1:
            break
    trackers.show({{"figure": graph_objects.Figure()}})
    trackers.alert("PPO stopped", "kl is high")
    trackers.finish({{"score": 0.5, "of": {{"x": 1}}}}, folder)
    trackers.close()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    with sqlite3.connect(tmp_path / "artifacts/trackio/threefold.db") as database:
        rows = [(run, step, json.loads(values)) for run, step, values in database.execute(
            "select run_id, step, metrics from metrics where run_name = 'demo/variants/a/ppo' order by id"
        )]  # fmt: skip
        (config,) = {text for (text,) in database.execute("select config from configs")}
        alerts = database.execute("select title, text from alerts").fetchall()
    assert len({run for run, *_ in rows}) == 1
    assert [(step, values["ppo/kl"]) for _, step, values in rows if "ppo/kl" in values] == [(3, 0.5), (4, 0.5)]
    first = rows[0][2]
    assert first["ppo/samples"]["_value"] == [{"prompt": "a|b", "score": 1.5}]
    assert sum(first["ppo/scores"]["values"]) == 10
    assert json.loads(config)["lineage"]["parents"] == {"sft": "123"} and json.loads(config)["job_type"] == "ppo"
    assert alerts[0] == ("PPO stopped", "kl is high")
    (results, *_) = [values["ppo/results"]["_value"] for _, _, values in rows if "ppo/results" in values]
    assert results == [{"result": "score", "value": 0.5}, {"result": "of.x", "value": 1}]


def test_tensorboard_is_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from threefold.tracking.local_runs import TensorboardRun

    run = TensorboardRun(OmegaConf.create(OFFLINE), about(tmp_path))
    run.log(3, VALUES)
    run.alert("PPO stopped", "kl is high")
    run.finish({"score": 0.5}, tmp_path)
    run.close()
    events = EventAccumulator(str(tmp_path / "artifacts/tensorboard/demo/variants/a/ppo-abc")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("ppo/kl")] == [(3, 0.5)]
    (histogram,) = events.Histograms("ppo/scores")
    assert histogram.histogram_value.num == 10 and histogram.histogram_value.max == 9
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "a\\|b" in texts["ppo/samples/text_summary"] and "| score | 0.5 |" in texts["ppo/results/text_summary"]
    assert "kl is high" in texts["ppo/alerts/text_summary"] and "| sft | 123 |" in texts["ppo/lineage/text_summary"]
