"""Replies that were labelled one by one: matched into pairs, a classifier trained on them, and its check-up."""

import json
import math
from collections import Counter

import pytest
import torch
from data_helpers import everything, lines, source
from documents import documented
from helpers import make_job, plain_score, tiny_reward_model, tiny_tokenizer
from torch import nn

from threefold import chain
from threefold.config.compose import compose
from threefold.data import preferences, reading
from threefold.errors import UserError
from threefold.fileio import read_json, read_lines
from threefold.stages import dpo, reward
from threefold.training import hf_trainer

GOOD = ["I like the rain and the sea.", "we are happy to see you", "it is nice to be here today"]
BAD = ["no", "go away now", "bad bad bad", "why do you ask", "nothing"]


def said(text):
    return [{"role": "user", "content": text}]


def rows(good: int = 40, bad: int = 60) -> list[dict]:
    labelled = [(GOOD[i % 3], True) for i in range(good)] + [(BAD[i % 5], False) for i in range(bad)]
    return [
        {"prompt": f"question {i}", "completion": f"{text} {i}", "label": label}
        for i, (text, label) in enumerate(labelled)
    ]


def test_every_reply_is_in_a_pair_and_no_label_changes_sides():
    labelled = [(said(str(i)), f"reply {i}", i < 3) for i in range(10)]
    pairs = preferences.matched(labelled, seed=1)
    good, bad = Counter(p.chosen for p in pairs), Counter(p.rejected for p in pairs)
    assert set(good) == {f"reply {i}" for i in range(3)} and set(bad) == {f"reply {i}" for i in range(3, 10)}
    assert len(pairs) == 7 and max(good.values()) - min(good.values()) <= 1 and set(bad.values()) == {1}
    assert all(p.prompt == said(p.chosen[6:]) and p.rejected_prompt == said(p.rejected[6:]) for p in pairs)
    assert pairs == preferences.matched(labelled, seed=1) != preferences.matched(labelled, seed=2)
    assert preferences.matched(labelled[:3], seed=1) == []
    once = preferences.matched(labelled, seed=1, once=True)  # held-out pairs are independent
    assert len(once) == len({p.chosen for p in once}) == len({p.rejected for p in once}) == 3


def test_an_exchanged_label_takes_its_prompt_along():
    (pair,) = preferences.matched([(said("one"), "good", True), (said("two"), "bad", False)], 1)
    other = pair.exchanged()
    assert (other.chosen, other.prompt, other.rejected, other.rejected_prompt) == (
        "bad",
        said("two"),
        "good",
        said("one"),
    )
    assert other.exchanged() == pair


@pytest.mark.parametrize(("label", "good"), [(True, True), (1, True), ("false", False), (0, False)])
def test_labels_in_every_spelling(tmp_path, label, good):
    file = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "label": label}])
    (row,) = everything(source(file, "unpaired"))
    assert (row["prompt"], row["reply"], row["label"]) == (said("q"), "a", good)
    assert reading.texts([row]) == ["q\na" if good else "q"]  # a bad reply is nothing to learn to say


@pytest.mark.parametrize("label", ["perhaps", None, 2])
def test_other_labels_are_refused(tmp_path, label):
    file = lines(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "label": label}])
    with pytest.raises(UserError, match=r"label is neither true nor false \(first in a\.jsonl, line 1\)"):
        everything(source(file, "unpaired"))


def test_the_loss_is_the_cross_entropy_of_single_replies(tmp_path, monkeypatch):
    labelled = [(said(f"q {i}"), (GOOD + BAD)[i], i < 3) for i in range(8)]
    pairs = preferences.tokenised(tiny_tokenizer(), preferences.matched(labelled, 1), 512)
    built = []
    monkeypatch.setattr(hf_trainer, "train", lambda trainer, *_: built.append(trainer))
    job = make_job("reward", tmp_path, "reward.batch_size=5", "reward.label_smoothing=0.1")
    reward.fit(job, tiny_reward_model(), tiny_tokenizer(), pairs, 5)
    (trainer,) = built
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[pytest.approx(0.9)], [pytest.approx(0.1)]] * 5
    losses = []
    for row in pairs.rows:
        for ids, target in zip(preferences.sequences(row), (0.9, 0.1), strict=True):
            score = plain_score(trainer.model, ids)
            losses.append(-target * log_sigmoid(score) - (1 - target) * log_sigmoid(-score))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert isinstance(trainer.model, nn.Module) and len(losses) == 10


def test_loss_and_gradient_of_the_classifier_do_not_depend_on_accumulation(tmp_path):
    labelled = [(said(f"q {i}"), (GOOD + BAD)[i % 8], i % 2 == 0) for i in range(16)]
    pairs, steps = preferences.tokenised(tiny_tokenizer(), preferences.matched(labelled, 1), 512), []
    for micro in ("null", "2"):
        job = make_job("reward", tmp_path / micro, "reward.batch_size=8", f"runtime.micro_batch_size={micro}")
        reward.fit(job, tiny_reward_model(), tiny_tokenizer(), pairs, 8)
        steps.append(read_lines(job.out / "log.jsonl")[0])
    assert steps[1]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-4)
    assert steps[1]["grad_norm"] == pytest.approx(steps[0]["grad_norm"], rel=1e-3) and steps[0]["grad_norm"] > 0.01


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# metrics of pairs, which single replies have not
OF_PAIRS = {
    "rewards/accuracies", "mean_token_accuracy", "eval_loss", "eval_rewards/accuracies", "eval_mean_token_accuracy",
}  # fmt: skip


def test_a_classifier_and_kto_learn_from_labels_and_dpo_refuses_them(smoke, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(200, 300)))
    given = [f"data.preferences.path={file}", "data.preferences.format=unpaired"]
    base = ["experiment=smoke", f"runs={smoke}", "tracker=none", "dependents=false", "run=labels", *given]
    chain.bring_up_to_date(compose([*base, "target=reward", "reward.epochs=3", "reward.learning_rate=0.01"]))
    metrics = read_json(smoke / "labels" / "reward" / "metrics.json")
    assert metrics["accuracy"] > 0.9 and metrics["train_overlap"] == 0
    pairs = read_lines(smoke / "labels" / "comparisons" / "train.jsonl")
    assert {pair["source"] for pair in pairs} == {"labels"}
    job = make_job("dpo", tmp_path)
    job.inputs |= {"sft": smoke / "smoke" / "sft", "comparisons": smoke / "labels" / "comparisons"}
    with pytest.raises(UserError, match="dpo: replies that were labelled one by one"):
        dpo.run(job)
    chain.bring_up_to_date(compose([*base, "target=dpo", "dpo.loss_type=kto", "dpo.learning_rate=0.003"]))
    metrics = read_json(smoke / "labels" / "dpo" / "metrics.json")
    assert metrics["replies"] + metrics["left_out_per_epoch"] == len({pair["chosen"] for pair in pairs}) + len(
        {pair["rejected"] for pair in pairs}
    )
    logged = {key for row in read_lines(smoke / "labels" / "dpo" / "log.jsonl") for key in row} - {"step", "kl"}
    assert logged == documented("dpo steps") - OF_PAIRS
    assert metrics["accuracy"] > 0.9 and metrics["chosen_logprob_change"] > metrics["rejected_logprob_change"] + 1
