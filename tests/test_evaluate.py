"""Stage evaluate on the smoke run's models: best-of-n, the arena of every judge, and what alignment cost."""

import json
import math

import numpy as np
import pytest
from helpers import make_job

from pipeline.artifact import read_json, read_lines
from pipeline.data import Example
from pipeline.ensemble import load
from pipeline.report import in_order
from pipeline.suites import Suite
from pipeline.verifiable import Problem
from stages import evaluate

STAGES = {"pretrain": "pretrain", "sft": "sft", "comparisons": "comparisons", "reward": "reward"}


@pytest.fixture(scope="module")
def evaluated(smoke, tmp_path_factory):
    """Metrics and samples of base, SFT and best-of-n."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = ["evaluate.models=[base,sft]", "evaluate.best_of=4", "evaluate.prompts=12", "evaluate.greedy=false"]
    job = make_job("evaluate", folder, *settings)
    job.inputs |= {name: smoke / "smoke" / name for name in STAGES}
    return evaluate.run(job), read_lines(job.out / "samples.jsonl")


def test_best_of_n_is_the_sample_that_the_reward_model_scores_highest(evaluated, smoke):
    metrics, rows = evaluated
    best, sft = metrics["models"]["best_of_4"], metrics["models"]["sft"]
    assert best["proxy_mean"] > sft["proxy_mean"] + 0.3
    assert best["kl"] == pytest.approx(math.log(4) - 3 / 4)
    scores = [row["best_of_4"]["reward_model"] for row in rows]
    assert best["proxy_mean"] == pytest.approx(np.mean(scores)) and len(load(smoke / "smoke" / "reward").members) == 1


def test_every_judge_has_an_arena_of_the_models_that_it_scores(evaluated):
    metrics, rows = evaluated
    assert set(metrics["arena"]) == {"gold", "second", "reward_model"}
    for judge, found in metrics["arena"].items():
        players = {"base", "sft", "best_of_4"} | (set() if judge == "reward_model" else {"human"})
        assert {row["model"] for row in found["standings"]} == players
        anchor = next(row for row in found["standings"] if row["model"] == "sft")
        assert anchor["elo"] == 1000 and list(anchor["ci95"]) == [1000, 1000]
        assert all(row["votes"] == 12 * (len(players) - 1) for row in found["standings"])
        won = [row["best_of_4"][judge] > row["sft"][judge] for row in rows]
        tied = [row["best_of_4"][judge] == row["sft"][judge] for row in rows]
        assert found["win_rates"]["best_of_4"]["sft"] == pytest.approx(np.mean(won) + 0.5 * np.mean(tied))
    assert metrics["arena"]["reward_model"]["standings"][0]["model"] == "best_of_4"


def test_base_text_is_measured_as_pretraining_measures_it(evaluated, smoke):
    metrics, _ = evaluated
    pretrain = read_json(smoke / "smoke" / "pretrain" / "metrics.json")["bits_per_byte"]
    base, sft = (metrics["models"][name]["text_bits_per_byte"] for name in ("base", "sft"))
    assert base == pytest.approx(pretrain, rel=0.1) and sft != base  # on fewer texts here
    assert "text_bits_per_byte" not in metrics["models"]["human"]
    assert all(0 <= model["repetition"] <= 1 for model in metrics["models"].values())


def test_copies_in_training_are_counted_and_left_out_where_asked_for(evaluated, smoke, tmp_path):
    metrics, _ = evaluated
    assert set(metrics["contamination"]) == {"pretrain", "sft", "comparisons"}
    assert all(sum(found.values()) == 12 for found in metrics["contamination"].values())
    job = make_job("evaluate", tmp_path, "evaluate.prompts=12", "evaluate.remove_contaminated=true")
    folder = tmp_path / "comparisons"
    folder.mkdir()
    job.inputs["comparisons"] = folder
    words = ["amber birch cedar dune", "fjord gale heath isle", "kelp loam moss nook", "pine quay reed silt"]
    examples = [Example([{"role": "user", "content": said}], f"{said} ever and ever") for said in words]
    copied = {"prompt": examples[2].prompt, "chosen": examples[2].reply.upper(), "rejected": "no"}
    (folder / "train.jsonl").write_text(json.dumps(copied) + "\n")
    problems = [Problem([{"role": "user", "content": f"{said} {said} ever?"}], "another reply") for said in words]
    suite = Suite("exact", problems, {}, 1, {})
    kept, found, in_tasks = evaluate.checked_for_copies(job, examples, {"words": suite})
    assert kept == [*examples[:2], examples[3]] and found["removed"] == 1
    assert found["comparisons"] == {"copies": 1, "near_copies": 0, "clean": 3, "too_short": 0}
    assert suite.problems == [*problems[:2], problems[3]] and in_tasks["words"]["removed"] == 1
    assert in_tasks["words"]["comparisons"] == {"copies": 1, "near_copies": 0, "clean": 3, "too_short": 0}


def test_best_of_n_stands_behind_the_model_that_it_samples_from():
    assert in_order(["ppo", "best_of_16", "human", "sft", "base"]) == ["human", "base", "sft", "best_of_16", "ppo"]
