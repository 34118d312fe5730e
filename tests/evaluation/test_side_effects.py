"""Side effects: diversity of replies, DPO's drift and alarm, and the prompts that alignment changed most."""

import numpy as np
import pytest
import torch
from helpers import random_ids, tiny_policy, tiny_tokenizer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from threefold.evaluation import statistics
from threefold.fileio import write_lines
from threefold.report import evaluation as findings
from threefold.report.run import Run
from threefold.stages import dpo

SAID = ["the weather is nice today", "the weather is bad today", "I like to read", "no", "we go to the park"]


def test_self_bleu_is_one_for_equal_replies_and_small_for_different_ones():
    assert statistics.self_bleu(["yes it is"] * 5, 1) == statistics.self_bleu(["no"] * 3, 1) == 1.0
    different = [" ".join(f"w{i}{j}" for j in range(8)) for i in range(6)]
    assert statistics.self_bleu(different, 1) == 0.0
    assert 0 < statistics.self_bleu(SAID, 1) < statistics.self_bleu(SAID + SAID[:2], 1) < 1
    assert statistics.self_bleu(["", " ", "hello"], 1) == 1.0  # fewer than two replies with words


def test_self_bleu_is_the_mean_over_replies_of_which_so_many_are_drawn(monkeypatch):
    words = [text.lower().split() for text in SAID]
    smoothing = SmoothingFunction().method1
    expected = [
        sentence_bleu([w for w in words if w is not said], said, smoothing_function=smoothing, auto_reweigh=True)
        for said in words
    ]
    assert statistics.self_bleu(SAID, 1) == pytest.approx(np.mean(expected))
    monkeypatch.setattr(statistics, "REPLIES", 20)
    rng = np.random.default_rng(1)
    many = [" ".join(rng.choice([f"w{i}" for i in range(200)], 6)) for _ in range(40)]
    found = [statistics.self_bleu(many, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_distinct_n_counts_different_n_grams():
    texts = ["a b a b", "A b"]
    assert [statistics.distinct_n(texts, n) for n in (1, 2, 3)] == [2 / 6, 2 / 4, 1.0]


def test_drift_is_of_summed_log_probabilities_and_says_when_chosen_replies_fall():
    policy, reference = tiny_policy(seed=1), tiny_policy(seed=1)
    prompts, chosen, rejected = (random_ids([3, 5, 2, 4, 6, 3], seed=seed) for seed in (1, 2, 3))
    rows = [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": [*r, 7]}
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    pad = tiny_tokenizer().pad_token_id
    still = dpo.metrics(policy, reference, pad, rows, 0.1)
    assert still["chosen_logprob_change"] == pytest.approx(0, abs=1e-5) and still["chosen_falls"] is False
    assert still["chosen_tokens"] == np.mean([3, 5, 2, 4, 6, 3])
    assert still["rejected_tokens"] == pytest.approx(still["chosen_tokens"] + 1)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(3)  # far surer of what it says: other texts become unlikely
    moved = dpo.metrics(policy, reference, pad, rows, 0.1)
    low, high = moved["chosen_logprob_change_ci95"]
    assert low < moved["chosen_logprob_change"] < high < 0 and moved["chosen_falls"] is True


FALLEN = {
    "chosen_logprob_change": -3.0, "chosen_logprob_change_ci95": [-4.0, -2.0], "rejected_logprob_change": -9.0,
    "chosen_falls": True,
}  # fmt: skip


def test_the_alarm_needs_falling_chosen_replies_and_growing_ones():
    short, long = ["abc"] * 20, ["abcdef" + "g" * (i % 3) for i in range(20)]
    found = statistics.alarm(FALLEN, long, short)
    assert (
        found["alarm"] and found["length_change"] == pytest.approx(3.95) and "ALARM" in statistics.alarm_in_words(found)
    )
    assert not statistics.alarm(FALLEN, short, long)["alarm"]
    alike = statistics.alarm(FALLEN, ["abcd"] * 9, ["abc"] * 9)  # nothing is known of how much lengths differ
    assert (
        not alike["alarm"]
        and alike["length_change_ci95"] is None
        and "+1 characters [–]" in statistics.alarm_in_words(alike)
    )
    assert not statistics.alarm(FALLEN, long[:10] + short[:10], short[:10] + long[:10])["alarm"]
    risen = statistics.alarm(FALLEN | {"chosen_falls": False}, long, short)
    assert not risen["alarm"] and "ALARM" not in statistics.alarm_in_words(risen)


def sample(sft: tuple[str, float | None], ppo: tuple[str, float | None]) -> dict:
    said = {name: {"reply": reply, "gold": gold} for name, (reply, gold) in {"sft": sft, "ppo": ppo}.items()}
    return {"prompt": [{"role": "user", "content": "hi"}], **said}


def test_the_most_changed_prompts_are_those_with_the_largest_change_of_score(tmp_path):
    rows = [
        sample(("a b c d", 0.0), ("a b c x", 0.5)),
        sample(("a b c d", 0.0), ("w x y z", 0.5)),  # as much gained, more of the text changed
        sample(("a b", 0.0), ("c d", 0.9)),
        sample(("same", 0.1), ("same", 0.9)),
        sample(("a", None), ("b", 1.0)),
        sample(("good", 0.8), ("bad", -0.2)),
        sample(("fine", 0.3), ("other", 0.3)),
    ]
    found = statistics.most_changed(rows, "ppo", count=2)
    assert [(row["change"], row["reply"]) for row in found] == [(0.9, "c d"), (0.5, "w x y z"), (-1.0, "bad")]
    assert [row["text_change"] for row in found] == [1.0, 1.0, 1.0]
    assert statistics.most_changed(rows, "ppo")[2]["text_change"] == pytest.approx(0.25)
    assert statistics.most_changed(rows, "dpo") == []
    drift = statistics.alarm(FALLEN, ["abcd" + "e" * (i % 2) for i in range(9)], ["abc"] * 9)
    tested = {"model": "ppo", "against": "sft", "judge": "gold", "difference": 0.2, "ci95": [0.1, 0.3], "p": 0.01}
    evaluate = {"judge": "vader", "second_judge": "textblob", "dpo_drift": drift}
    evaluate |= {"paired": [tested | {"p_holm": 0.02, "prompts": 9}], "models": {"sft": {}, "dpo": {}, "ppo": {}}}
    (tmp_path / "evaluate").mkdir()
    write_lines(tmp_path / "evaluate" / "samples.jsonl", rows)
    shown = findings.paired_section(Run("run", tmp_path, {"evaluate": evaluate}, {}))
    assert [part.name for part in shown.folded] == ["paired", "changed_ppo"] and len(shown.folded[1].data) == 4
    assert shown.verdict[0] is False and "ALARM" in shown.verdict[1]
    assert shown.folded[0].rows[1] == ("vader", "ppo − sft", "+0.200", "[+0.100, +0.300]", "0.0100", "0.0200", "9")
    of_old = findings.paired_section(
        Run("run", tmp_path, {"evaluate": {"judge": "vader", "second_judge": "textblob"}}, {})
    )
    assert of_old.parts == of_old.folded == () and of_old.verdict is None
