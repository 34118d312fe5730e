"""Stage evaluate on the smoke run's models: ways to decode, other runs' models, the arena, what alignment cost."""

import json
import math

import numpy as np
import pytest
from helpers import make_job, tiny_policy, write_model

from threefold.chain import checks
from threefold.config.compose import compose
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation.tasks import Problem, Task
from threefold.fileio import read_json, read_lines
from threefold.models.ensemble import load
from threefold.report import evaluation, in_order
from threefold.stages import evaluate

STAGES = ("pretrain", "sft", "comparisons", "reward")
PLAYERS = ["base", "sft", "best_of_2", "best_of_4", "base_best_of_4", "sft_majority_4", "smoke/ppo"]


@pytest.fixture(scope="module")
def evaluated(smoke, tmp_path_factory):
    """Metrics and samples of base, SFT, best-of-n, majority vote, and another run's PPO."""
    folder = tmp_path_factory.mktemp("evaluated")
    models = f"evaluate.models=[{','.join(PLAYERS[:-1])}]", f"evaluate.earlier=[{smoke}/smoke/ppo]"
    job = make_job("evaluate", folder, *models, "evaluate.prompts=12", "evaluate.greedy=false")
    job.inputs |= {name: smoke / "smoke" / name for name in STAGES}
    return evaluate.run(job), read_lines(job.out / "samples.jsonl")


def test_best_of_n_is_the_sample_that_the_reward_model_scores_highest(evaluated, smoke):
    metrics, rows = evaluated
    best, sft = metrics["models"]["best_of_4"], metrics["models"]["sft"]
    assert best["proxy_mean"] > sft["proxy_mean"]
    assert best["kl"] == pytest.approx(math.log(4) - 3 / 4)
    scores = [row["best_of_4"]["reward_model"] for row in rows]
    assert best["proxy_mean"] == pytest.approx(np.mean(scores)) and len(load(smoke / "smoke" / "reward").members) == 1


def test_the_players_of_one_model_choose_among_the_same_samples(evaluated):
    _, rows = evaluated
    for row in rows:
        one, two, four = (row[name]["reward_model"] for name in ("sft", "best_of_2", "best_of_4"))
        assert one <= two <= four
        for name in ("best_of_2", "best_of_4", "sft_majority_4"):
            same = row[name]["reply"] == row["sft"]["reply"]
            assert same or row[name]["reward_model"] != row["sft"]["reward_model"]
    assert any(row["best_of_4"]["reply"] != row["sft"]["reply"] for row in rows)


def test_what_is_known_of_a_model_alone_is_not_claimed_of_its_ways_to_decode(evaluated):
    metrics, _ = evaluated
    by_itself = {"kl", "reply_bits_per_byte", "text_bits_per_byte"}
    for name in ("base", "sft", "smoke/ppo"):
        assert by_itself <= set(metrics["models"][name]), name
    for name, known in (("best_of_4", {"kl"}), ("base_best_of_4", set()), ("sft_majority_4", set())):
        assert by_itself & set(metrics["models"][name]) == known, name
        assert {"gold_ci95", "proxy_mean", "length", "ended_share"} <= set(metrics["models"][name])


def test_a_policy_of_another_run_is_measured_as_one_of_this_run(evaluated, smoke):
    metrics, rows = evaluated
    here = read_json(smoke / "smoke" / "evaluate" / "metrics.json")["models"]["ppo"]
    there = metrics["models"]["smoke/ppo"]
    assert there["text_bits_per_byte"] == pytest.approx(here["text_bits_per_byte"]) and there["kl"] > 0
    own = {row["prompt"][-1]["content"]: row["ppo"]["reply"] for row in samples_of(smoke)}
    assert [row["smoke/ppo"]["reply"] for row in rows] == [own[row["prompt"][-1]["content"]] for row in rows]


def samples_of(smoke):
    return read_lines(smoke / "smoke" / "evaluate" / "samples.jsonl")


def test_a_policy_with_another_tokenizer_is_refused_in_one_line(smoke, tmp_path):
    other = write_model(tiny_policy(), tmp_path / "first" / "ppo")
    job = make_job("evaluate", tmp_path, "evaluate.models=[sft]", f"evaluate.earlier=[{other}]")
    job.inputs |= {name: smoke / "smoke" / name for name in STAGES}
    with pytest.raises(UserError, match=r"^first/ppo and pretrain differ in tokenizer or chat template"):
        evaluate.run(job)


def test_every_judge_has_an_arena_of_the_models_that_it_scores(evaluated):
    metrics, rows = evaluated
    assert set(metrics["arena"]) == {"gold", "second", "reward_model"}
    for judge, found in metrics["arena"].items():
        players = {*PLAYERS} | (set() if judge == "reward_model" else {"human"})
        assert {row["model"] for row in found["standings"]} == players
        anchor = next(row for row in found["standings"] if row["model"] == "sft")
        assert anchor["elo"] == 1000 and list(anchor["ci95"]) == [1000, 1000]
        assert all(row["votes"] == 12 * (len(players) - 1) for row in found["standings"])
        won = [row["best_of_4"][judge] > row["sft"][judge] for row in rows]
        tied = [row["best_of_4"][judge] == row["sft"][judge] for row in rows]
        assert found["win_rates"]["best_of_4"]["sft"] == pytest.approx(np.mean(won) + 0.5 * np.mean(tied))
    assert found["win_rates"]["best_of_4"]["sft"] >= 0.5  # it has the SFT model's own reply to choose


def test_paired_differences_are_those_of_the_samples(evaluated):
    metrics, rows = evaluated
    others = [name for name in PLAYERS if name != "sft"]
    compared = {(judge, model, "sft") for judge in ("gold", "second") for model in others}
    assert {(row["judge"], row["model"], row["against"]) for row in metrics["paired"]} == compared
    for found in metrics["paired"]:
        differences = [row[found["model"]][found["judge"]] - row["sft"][found["judge"]] for row in rows]
        assert found["difference"] == pytest.approx(np.mean(differences)) and found["prompts"] == 12
        assert (found["ci95"] is None) == (np.ptp(differences) < 1e-12) and found["p"] <= found["p_holm"] <= 1
        if found["ci95"]:
            assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
    assert "dpo_drift" not in metrics and "judge_model" not in metrics


def test_the_drift_of_dpo_is_measured_on_its_replies(smoke):
    found = read_json(smoke / "smoke" / "evaluate" / "metrics.json")["dpo_drift"]
    rows = read_lines(smoke / "smoke" / "evaluate" / "samples.jsonl")
    longer = [len(row["dpo"]["reply"]) - len(row["sft"]["reply"]) for row in rows]
    stage = read_json(smoke / "smoke" / "dpo" / "metrics.json")
    assert found["length_change"] == pytest.approx(np.mean(longer))
    assert found["chosen_logprob_change"] == stage["chosen_logprob_change"]
    grows = found["length_change_ci95"] is not None and found["length_change_ci95"][0] > 0
    assert found["alarm"] == (stage["chosen_falls"] and grows)
    page = (smoke / "smoke" / "report.html").read_text()
    assert "Is one better than the other?" in page and "Most changed prompts" in page


def test_base_text_is_measured_as_pretraining_measures_it(evaluated, smoke):
    metrics, _ = evaluated
    pretrain = read_json(smoke / "smoke" / "pretrain" / "metrics.json")["bits_per_byte"]
    base, sft = (metrics["models"][name]["text_bits_per_byte"] for name in ("base", "sft"))
    assert base == pytest.approx(pretrain, rel=0.1) and sft != base  # on fewer texts here
    assert "text_bits_per_byte" not in metrics["models"]["human"]
    assert all(0 <= model["repetition"] <= 1 for model in metrics["models"].values())


@pytest.mark.slow
def test_copies_in_training_are_counted_and_left_out_where_asked_for(evaluated, smoke, tmp_path):
    metrics, _ = evaluated
    counted = metrics["contamination"]
    assert set(counted) == {"prompts", "base_text", "tasks.letters", "held_out_pairs"}
    assert all(set(found) == {"pretrain", "sft", "comparisons"} for found in counted.values())
    assert all(sum(found.values()) == 12 for found in counted["prompts"].values())
    pairs = len(read_lines(smoke / "smoke/comparisons/test.jsonl"))
    assert all(sum(found.values()) == pairs for found in counted["held_out_pairs"].values())
    job = make_job("evaluate", tmp_path, "evaluate.prompts=12", "evaluate.remove_contaminated=true")
    folder = tmp_path / "comparisons"
    folder.mkdir()
    job.inputs["comparisons"] = folder
    words = ["amber birch cedar dune", "fjord gale heath isle", "kelp loam moss nook", "pine quay reed silt"]
    examples = [Example([{"role": "user", "content": said}], f"{said} ever and ever") for said in words]
    copied = {"prompt": examples[2].prompt, "chosen": examples[2].reply.upper(), "rejected": "no"}
    (folder / "train.jsonl").write_text(json.dumps(copied) + "\n")
    (folder / "test.jsonl").write_text(json.dumps(copied) + "\n")
    problems = [Problem([{"role": "user", "content": f"{said} {said} ever?"}], "another reply") for said in words]
    suite = Task("exact", problems, {}, 1, {})
    texts = [f"{said} {said} and on" for said in words]
    drawn = {"prompts": examples, "validation_prompts": examples[1:]}
    kept, kept_texts, found = evaluate.checked_for_copies(job, drawn, texts, {"words": suite})
    assert kept == {"prompts": [*examples[:2], examples[3]], "validation_prompts": [examples[1], examples[3]]}
    assert found["validation_prompts"]["comparisons"]["copies"] == found["validation_prompts"]["removed"] == 1
    assert suite.problems == [*problems[:2], problems[3]]
    assert kept_texts == texts  # a third of the words of one is trained on
    one = {"copies": 1, "near_copies": 0, "clean": 3, "too_short": 0}
    assert found["prompts"]["comparisons"] == found["tasks.words"]["comparisons"] == one
    assert [found[name].get("removed") for name in ("prompts", "tasks.words", "base_text")] == [1, 1, 0]
    assert found["held_out_pairs"]["comparisons"]["copies"] == 1 and "removed" not in found["held_out_pairs"]
    said = evaluation.contamination_sentence(found)
    assert said.startswith(
        "Some test items occur in training text: 1 of 4 held-out prompts whole and 0 nearly in comparisons;"
    )
    removed = "1 of held-out prompts, 1 of validation prompts, 0 of held-out base text, 1 of problems of words"
    assert said.endswith(f"left out: {removed}.")


def test_ways_to_decode_stand_behind_the_model_that_they_sample_from_and_other_runs_last():
    names = ["first/ppo", "ppo_majority_4", "ppo", "best_of_16", "human", "dpo_best_of_4", "dpo", "sft", "base"]
    of_ppo = ["ppo", "ppo_majority_4", "first/ppo"]
    assert in_order(names) == ["human", "base", "sft", "best_of_16", "dpo", "dpo_best_of_4", *of_ppo]


@pytest.mark.slow
def test_replies_that_the_judge_gives_no_score_are_counted_and_validation_prompts_are_others(
    smoke, tmp_path, monkeypatch, capsys
):
    (tmp_path / "every_third.py").write_text(
        "def none(prompts, completions, **given):\n"
        "    return [None if i % 3 == 0 else 0.5 + 0.01 * i for i in range(len(prompts))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    few = ["evaluate.models=[sft]", "evaluate.prompts=12", "evaluate.validation_prompts=6", "evaluate.greedy=false"]
    job = make_job("evaluate", tmp_path / "job", *few, "evaluate.judge.function=every_third:none")
    job.inputs |= {name: smoke / "smoke" / name for name in ("sft", "comparisons")}
    metrics = evaluate.run(job)
    sft = metrics["models"]["sft"]
    assert (sft["gold_unscored"], sft["second_judge_unscored"]) == (4, 0)
    assert sft["gold_mean"] == pytest.approx(np.mean([0.5 + 0.01 * i for i in range(12) if i % 3]))
    assert "the gold judge gives no score to some of 12 replies each" in capsys.readouterr().out
    validation = metrics["validation"]
    assert validation["prompts"] == 6 and validation["models"]["sft"]["gold_unscored"] == 2
    tokenizer, model = (
        load(job.inputs["sft"]) for load in (evaluate.chat.load_tokenizer, evaluate.loading.load_policy)
    )
    _, unusable = evaluate.held_out.prompts(job, tokenizer, model, 6, job.config.evaluate.seed, "validation")
    assert validation["unusable"] == unusable != metrics["unusable"]
    assert sum(metrics["contamination"]["validation_prompts"]["sft"].values()) == 6
    without = {"text_bits_per_byte", "tasks"}
    assert set(validation["models"]["sft"]) == set(sft) - without
    assert validation["models"]["sft"]["reply_bits_per_byte"] != sft["reply_bits_per_byte"]  # other prompts


def test_a_bad_validation_split_is_found_before_any_model_replies(smoke, tmp_path, monkeypatch):
    def no_prompts(job, tokenizer, model, count, seed, split="test"):
        if split == "validation":
            raise UserError("every prompt of its validation split is one of training")
        return [Example([{"role": "user", "content": "hello"}], "yes")], {}

    monkeypatch.setattr(evaluate.held_out, "prompts", no_prompts)
    monkeypatch.setattr(evaluate.measuring, "of_model", lambda *_: pytest.fail("a model has replied"))
    job = make_job("evaluate", tmp_path, "evaluate.models=[sft]", "evaluate.validation_prompts=6")
    job.inputs["sft"] = smoke / "smoke" / "sft"
    with pytest.raises(UserError, match=r"^every prompt of its validation split is one of training$"):
        evaluate.run(job)


def test_the_validation_split_is_read_before_the_first_stage_where_it_is_asked_for():
    for prompts, splits in ((0, {"test"}), (6, {"test", "validation"})):
        config = compose(["experiment=smoke", f"evaluate.validation_prompts={prompts}"])
        assert checks._splits_of_replies({"evaluate"}, config) == splits
