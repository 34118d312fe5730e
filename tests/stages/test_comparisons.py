"""Stage comparisons: given pairs, several policies, earlier pairs, a scorer, and pairs for people to label."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import make_job
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from threefold.config.compose import compose
from threefold.data import preferences
from threefold.data.preferences import Pair
from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.schema.stages import SourceConfig
from threefold.stages import comparisons
from threefold.stages.comparisons import given


@pytest.fixture
def given_pairs(tmp_path, monkeypatch):
    """A function of training rows, test rows and a format: what `given` makes of them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(train, test, kind="preference", noise=0.0):
        for name, rows in (("train", train), ("test", test)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"path": str(tmp_path), "format": kind, "max_unusable_share": 0.5}
        splits = {"train": "train.jsonl", "test": "test.jsonl"}
        source = OmegaConf.merge(OmegaConf.structured(SourceConfig), options, {"splits": splits})
        settings = {"data": {"preferences": source}, "comparisons": {"seed": 1, "label_noise": noise}}
        return given(SimpleNamespace(config=OmegaConf.create(settings)))

    return load


def row(prompt, chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_given_pairs_keep_their_labels_without_a_gap(given_pairs):
    train, test, _ = given_pairs([row(f"train {i}", f"good {i}") for i in range(50)], [row("test")])
    assert test == [Pair([{"role": "user", "content": "test"}], "good", "bad", None, "dataset")]
    assert {p.prompt[0]["content"].split()[0] for p in train} == {"train"}
    assert all(p.chosen == f"good {p.prompt[0]['content'].split()[1]}" and p.rejected == "bad" for p in train)
    assert len(train) > 40  # the validation split is carved from them


def test_given_training_pairs_whose_prompt_is_held_out_are_dropped_and_counted(given_pairs):
    train, test, metrics = given_pairs(
        [row(f"train {i}") for i in range(50)] + [row(f"test {i % 10}", f"good {i}") for i in range(30)],
        [row(f"test {i}") for i in range(10)],
    )
    shared = {p.prompt[0]["content"] for p in train} & {p.prompt[0]["content"] for p in test}
    assert shared == set() and len(test) == 10
    # those of the 30 that are not in the validation part of the training file
    assert 20 <= metrics["dropped_held_out_prompt"] <= 30


def test_labels_of_given_training_pairs_can_be_made_noisy(given_pairs):
    rows = [row(f"train {i}", f"good {i}") for i in range(300)]
    train, test, metrics = given_pairs(rows, [row("test")], noise=0.25)
    wrong = sum(pair.chosen == "bad" for pair in train)
    assert metrics["labels_flipped"] == wrong and 40 < wrong < 110 and test[0].chosen == "good"


def test_given_rows_that_cannot_be_used_are_counted(given_pairs):
    _, _, metrics = given_pairs([row("one"), row("two", "bad")], [row("three"), row("four", "", "bad")])
    assert metrics["unusable"] == {
        "train": {"chosen equals rejected": {"count": 1, "first_line": 2, "file": "train.jsonl"}},
        "test": {"chosen is empty": {"count": 1, "first_line": 2, "file": "test.jsonl"}},
    }


def test_held_out_replies_without_a_partner_of_the_other_label_are_counted(given_pairs):
    rows = [{"prompt": f"test {i}", "completion": f"reply {i}", "label": i < 5} for i in range(105)]
    train = [{"prompt": f"train {i}", "completion": f"reply {i}", "label": i < 5} for i in range(20)]
    _, test, metrics = given_pairs(train, rows, "unpaired")
    assert len(test) == 5
    assert metrics["unusable"]["test"] == {"no reply of the other label is left for it": {"count": 95}}


# Pairs that the stage makes, on the models of the smoke run

FEW = ["comparisons.prompts=12", "comparisons.eval_prompts=8", "comparisons.human_pairs=4", "comparisons.min_gap=0"]


def made(smoke, folder, *overrides: str):
    """The folder and metrics of comparisons made with the models of the smoke run."""
    job = make_job("comparisons", folder, *FEW, "reward@comparisons.judge=length", *overrides)
    job.inputs["sft"] = smoke / "smoke" / "sft"
    return job.out, comparisons.run(job)


def test_another_policy_replies_beside_the_sft_model_under_its_own_name(smoke, tmp_path):
    out, metrics = made(smoke, tmp_path, f"comparisons.policies=[{smoke}/smoke/ppo]", "comparisons.pairing=random")
    pool = read_lines(out / "pool.jsonl")
    names = {row[side] for row in pool for side in ("model_a", "model_b")}
    assert names == {"sft", "smoke/ppo"} and any(row["model_a"] != row["model_b"] for row in pool)
    assert metrics["pool"] == len(pool) == len({row["pair"] for row in pool}) > 10
    labelled = {
        (str(p["prompt"]), *sorted((p["chosen"], p["rejected"])))
        for split in ("train", "test")
        for p in read_lines(out / f"{split}.jsonl")
        if p["source"] == "samples"
    }
    assert labelled == {(str(r["prompt"]), *sorted((r["response_a"], r["response_b"]))) for r in pool}
    prompts = {split: {str(row["prompt"]) for row in pool if row["split"] == split} for split in ("train", "test")}
    assert prompts["train"] and prompts["test"] and not prompts["train"] & prompts["test"]


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A module of judges: one has no score for the longest of the replies it is given at a time, one for none."""
    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "few_scores.py").write_text(
        "left_out = []\n"
        "def shorter(prompts, completions, cap=None, **given):\n"
        "    left_out.append(max(completions, key=len))\n"
        "    return [None if c == left_out[-1] else len(c) for c in completions]\n"
        "def never(prompts, completions, cap=None, **given):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(folder)


@pytest.mark.slow
def test_replies_without_a_score_are_counted_and_take_no_part(smoke, tmp_path, judges):
    out, metrics = made(smoke, tmp_path / "shorter", "comparisons.judge.function=few_scores:shorter")
    _, by_length = made(smoke, tmp_path / "all")
    pairs = [row for split in ("train", "test") for row in read_lines(out / f"{split}.jsonl")]
    left_out = importlib.import_module("few_scores").left_out
    assert pairs and left_out and not {row[side] for row in pairs for side in ("chosen", "rejected")} & set(left_out)
    assert metrics["samples_unscored"] > 0 and metrics["people_unscored"] > 0
    assert by_length["samples_unscored"] == by_length["people_unscored"] == 0


def test_a_judge_without_any_score_is_refused(smoke, tmp_path, judges):
    with pytest.raises(UserError, match=r"comparisons\.judge: gives no score \(None\) to any of \d+ samples; choose"):
        made(smoke, tmp_path, "comparisons.judge.function=few_scores:never")


@pytest.mark.slow
def test_earlier_comparisons_are_added_but_for_prompts_that_are_held_out_now(smoke, tmp_path):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    before, first = made(smoke, tmp_path / "before")
    held_out = preferences.read(before, "test")
    new = Pair([{"role": "user", "content": "an old prompt"}], "good", "bad", None, "samples")
    preferences.write(earlier / "train.jsonl", [new, held_out[0]])
    out, metrics = made(smoke, tmp_path / "after", f"comparisons.earlier=[{earlier}]")
    assert metrics["pairs_from_earlier"] == 1
    assert metrics["dropped_held_out_prompt"] == first["dropped_held_out_prompt"] + 1
    assert preferences.read(out, "train") == [*preferences.read(before, "train"), new]
    assert preferences.read(out, "test") == held_out


def test_pairs_for_people_have_no_label_and_training_on_them_is_refused_until_they_do(smoke, tmp_path):
    out, metrics = made(smoke, tmp_path, "comparisons.label_by=people", "comparisons.pairing=random")
    assert not (out / "train.jsonl").exists() and metrics["pool"] == len(read_lines(out / "pool.jsonl")) > 10
    with pytest.raises(UserError, match="has no labels yet; label its pairs with: make label"):
        preferences.read(out, "train")


def test_by_order_every_chosen_reply_is_of_the_policy_that_is_named_later(smoke, tmp_path):
    order = [f"comparisons.policies=[{smoke}/smoke/dpo,{smoke}/smoke/ppo]", "comparisons.label_by=order"]
    sizes = ["comparisons.prompts=6", "comparisons.eval_prompts=6", "comparisons.pairs_per_prompt=9"]
    out, metrics = made(smoke, tmp_path, *order, *sizes, "comparisons.sft=false")
    pool = {row["pair"]: row for row in read_lines(out / "pool.jsonl")}
    assert {frozenset((row["model_a"], row["model_b"])) for row in pool.values()} == {
        frozenset(("smoke/dpo", "smoke/ppo"))
    }
    replies = {
        model: {row[f"response_{s}"] for row in pool.values() for s in "ab" if row[f"model_{s}"] == model}
        for model in ("smoke/dpo", "smoke/ppo")
    }
    pairs = preferences.read(out, "train") + preferences.read(out, "test")
    assert pairs and all(p.chosen in replies["smoke/ppo"] and p.rejected in replies["smoke/dpo"] for p in pairs)
    assert metrics["pairs_from_people"] == metrics["samples_unscored"] == 0


@pytest.mark.slow
def test_a_scorer_chooses_the_pairs_and_uncertainty_needs_several_models(smoke, tmp_path):
    scorer = f"comparisons.scorer={smoke}/smoke/reward"
    out, _ = made(smoke, tmp_path / "best", scorer, "comparisons.pairs_per_prompt=1")
    by_judge, _ = made(smoke, tmp_path / "judge", "comparisons.pairs_per_prompt=1")
    chosen, usual = ({row["pair"] for row in read_lines(folder / "pool.jsonl")} for folder in (out, by_judge))
    assert chosen != usual
    with pytest.raises(UserError, match=r"comparisons\.scorer=.*: is one model; pairing=uncertain needs"):
        made(smoke, tmp_path / "one", scorer, "comparisons.pairing=uncertain")
    several = tmp_path / "several"
    shutil.copytree(smoke / "smoke" / "reward", several)
    other = several / "members" / "2"
    shutil.copytree(smoke / "smoke" / "reward", other)
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(weights["score.weight"].shape, generator=generator)
    save_file(weights | {"score.weight": noise}, other / "model.safetensors", {"format": "pt"})
    out, _ = made(smoke, tmp_path / "two", f"comparisons.scorer={several}", "comparisons.pairing=uncertain")
    assert read_lines(out / "pool.jsonl")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["comparisons.pairing=uncertain"], "comparisons.pairing=uncertain: needs comparisons.scorer"),
        (["comparisons.pairing=random", "comparisons.scorer=x"], "comparisons.scorer: comparisons.pairing=random"),
        (["comparisons.policies=[a/demo/ppo,b/demo/ppo]"], "comparisons.policies: two are called demo/ppo"),
        (["comparisons.label_by=order"], "comparisons.label_by=order: one policy has no order"),
        (["comparisons.sft=false"], "comparisons.sft=false: nobody replies"),
        (["reward.combine=min"], "reward.combine=min: reward.ensemble=1 has nothing to combine"),
        (["reward.margin_coef=1", "reward.label_smoothing=0.1"], "reward.margin_coef: has no meaning for labels"),
        (["comparisons.label_by=people"], "comparisons.pairing=best_worst: with comparisons.label_by=people"),
        (
            ["comparisons.label_by=people", "comparisons.pairing=random", "comparisons.label_noise=0.1"],
            "comparisons.label_noise: is for labels of the judge",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, key):
    with pytest.raises(UserError, match=key):
        compose(["experiment=smoke", *overrides])
