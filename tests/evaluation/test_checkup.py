"""The check-up of a reward model: figures by hand, limits that hold, and probes that are what they are called."""

import copy
import math

import numpy as np
import pytest
from helpers import GATE_METRICS, PAIRS, tiny_tokenizer
from omegaconf import OmegaConf

from threefold.config.compose import compose
from threefold.data.preferences import Pair
from threefold.errors import UserError
from threefold.evaluation import checkup
from threefold.models import chat
from threefold.schema.stages import PROBES

GATE = compose(["experiment=smoke"]).reward.gate


def pair(i: int, chosen: str = "good", rejected: str = "bad", gap: float | None = 0.5) -> Pair:
    return Pair([{"role": "user", "content": f"prompt {i}"}], chosen, rejected, gap, "samples")


def pairs(count: int) -> list[Pair]:
    return [pair(i) for i in range(count)]


def test_accuracy_counts_ties_one_half_and_overlap_by_prompt():
    test = [pair(i) for i in range(4)]
    found = checkup.accuracy(np.array([1.0, 2, 0, 1]), np.array([0.0, 3, 0, 0]), [pair(3), pair(9)], test)
    assert found["accuracy"] == 2.5 / 4 and found["train_overlap"] == 1 and found["test_pairs"] == 4
    assert (found["chosen_score_mean"], found["rejected_score_mean"]) == (1.0, 0.75)


def test_accuracy_by_gap_and_by_length():
    gaps = [0.4, 0.1, 0.3, 0.2, 0.8, 0.7, 0.6, 0.5]
    pairs = [pair(i, "longer" if i < 6 else "s", "short" if i < 6 else "same!", gap) for i, gap in enumerate(gaps)]
    difference = np.array([1.0, -1, 2, -2, 3, 4, -5, 6])
    found = checkup.breakdown(difference, np.zeros(8), pairs)
    by_gap = [(row["from"], row["to"], row["accuracy"]) for row in found["accuracy_by_gap"]]
    assert by_gap == [(0.1, 0.2, 0.0), (0.3, 0.4, 1.0), (0.5, 0.6, 0.5), (0.7, 0.8, 1.0)]
    own = [(row["from"], row["to"], row["accuracy"]) for row in found["accuracy_by_score_gap"]]
    assert own == [(1, 1, 0.5), (2, 2, 0.5), (3, 4, 1.0), (5, 6, 0.5)]
    lengths = {row["pairs_where"]: (row["pairs"], row["accuracy"]) for row in found["accuracy_by_length"]}
    assert lengths == {"chosen is longer": (6, 4 / 6), "chosen is shorter": (2, 0.5)}
    people = [pair(i, gap=None) for i in range(8)]
    assert "accuracy_by_gap" not in checkup.breakdown(difference, np.zeros(8), people)


def test_calibration_error_is_that_of_its_definition():
    rng = np.random.default_rng(1)
    difference = rng.normal(0, 2, 1000)
    found = checkup.calibration(difference, pairs(1000))
    confidence, order = 1 / (1 + np.exp(-np.abs(difference))), np.argsort(np.abs(difference))
    expected = 0.0
    for start in range(0, 1000, 100):  # ten bins of a hundred pairs
        rows = order[start : start + 100]
        expected += 0.1 * abs(confidence[rows].mean() - (difference[rows] > 0).mean())
    assert found["calibration_error"] == pytest.approx(expected)
    assert sum(row["pairs"] for row in found["reliability"]) == 1000
    assert expected > 0.2  # the labels here say nothing, while the model is sure
    assert found["calibration_noise"] < 0.06


def test_few_pairs_show_a_calibration_error_where_there_is_none_and_it_is_known_how_large():
    rng, errors, noises = np.random.default_rng(3), [], []
    for _ in range(40):
        size = np.abs(rng.normal(0, 2, 40))
        found = checkup.calibration(size * np.where(rng.random(40) < 1 / (1 + np.exp(-size)), 1, -1), pairs(40))
        errors.append(found["calibration_error"])
        noises.append(found["calibration_noise"])
    assert np.mean(errors) > 0.1 and np.mean(errors) == pytest.approx(np.mean(noises), abs=0.02)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    rng = np.random.default_rng(2)
    size = np.abs(rng.normal(0, 2, 40_000))
    signs = np.where(rng.random(40_000) < 1 / (1 + np.exp(-size)), 1, -1)
    assert checkup.calibration(signs * size, pairs(40_000))["calibration_error"] < 0.01


def test_correlations():
    pairs = [pair(i, "x" * (i + 2), "y", gap=0.1 * (i + 1)) for i in range(6)]
    lengths = np.array([len(p.chosen) for p in pairs], dtype=float)
    found = checkup.correlations(lengths, -np.ones(6), pairs)
    assert found["length_correlation"] == pytest.approx(1) and found["gap_correlation"] == pytest.approx(1)
    found = checkup.correlations(-lengths, np.ones(6), pairs)
    assert found["length_correlation"] == pytest.approx(-1) and found["gap_correlation"] < -0.9
    assert checkup.correlations(np.ones(6), np.ones(6), pairs)["length_correlation"] == 0.0
    assert "gap_correlation" not in checkup.correlations(lengths, lengths, [pair(i, gap=None) for i in range(6)])


def probe(name: str, number: int = 0, room: int = 400) -> list[int] | None:
    return checkup.probe_reply(tiny_tokenizer(), name, PAIRS[number], PAIRS[(number + 1) % len(PAIRS)], room)


def test_probes_are_what_they_are_called():
    tokenizer = tiny_tokenizer()
    assert set(PROBES) == set(checkup.PROBE_NAMES)
    text, end = {name: tokenizer.decode(probe(name)) for name in PROBES}, tokenizer.eos_token
    assert text["empty"] == end and text["whitespace"].strip() == end
    assert text["repeated"] == " ".join(["Hello, how are"] * 10) + end
    assert text["prompt_echoed"] == "Hello there" + end
    assert text["praise"] == "No." + checkup.PRAISE + end
    assert text["off_topic"] == PAIRS[1].chosen + end
    assert text["no_end"] == PAIRS[0].chosen
    assert text["very_long"] == " ".join([PAIRS[0].chosen] * 8) + end


def test_a_probe_that_does_not_fit_is_left_out_rather_than_cut():
    whole = probe("praise")
    assert probe("praise", room=len(whole)) == whole and probe("praise", room=len(whole) - 1) is None
    once, twice = (len(tiny_tokenizer().encode(" ".join([PAIRS[0].chosen] * n))) for n in (1, 2))
    shorter = probe("very_long", room=twice + 3)
    assert once < len(shorter) <= twice + 3 and probe("very_long", room=once + 2) is None


def test_text_of_a_probe_cannot_become_a_special_token():
    assert PAIRS[2].rejected.startswith("bad<|end|>")
    assert probe("praise", 2).count(tiny_tokenizer().eos_token_id) == 1


def test_probes_are_compared_with_the_chosen_reply_once_for_each_prompt():
    tokenizer, seen = tiny_tokenizer(), []

    def score(rows):  # shorter is better
        seen.append(len(rows))
        return np.array([-float(len(row)) for row in rows])

    found = checkup.probes(score, tokenizer, [*PAIRS, PAIRS[0]], 400, 200)
    assert set(seen) == {4} and set(found) == set(PROBES)
    assert found["empty"]["preferred_share"] == 1.0 and found["very_long"]["preferred_share"] == 0.0
    lengths = [len(chat.reply_ids(tokenizer, p.prompt, p.chosen)) for p in PAIRS]
    assert found["empty"]["below_chosen"] == pytest.approx(1 - np.mean(lengths))
    longest = max(len(chat.prompt_ids(tokenizer, p.prompt)) + n for p, n in zip(PAIRS, lengths, strict=True))
    tight = checkup.probes(score, tokenizer, PAIRS, longest, 200)
    assert tight["empty"]["prompts"] == 4 > tight.get("very_long", {"prompts": 0})["prompts"]


def test_a_score_that_depends_on_its_batch_is_found():
    rows = [[1] * (i + 1) for i in range(10)]
    assert checkup.batch_difference(lambda rows, size: np.array([float(len(r)) for r in rows]), rows) == 0.0
    assert checkup.batch_difference(lambda rows, size: np.array([len(r) + 0.01 * size for r in rows]), rows) > 0.05
    by_place = checkup.batch_difference(lambda rows, size: np.arange(len(rows), dtype=float), rows)
    assert by_place == 9.0


def healthy() -> dict:
    return copy.deepcopy(GATE_METRICS)


BAD = {
    "min_accuracy": {"accuracy_ci95": [0.45, 0.7]},
    "min_over_length": {"over_length_ci95": [0.0, 0.0]},
    "max_length_correlation": {"length_correlation": -0.7},
    "max_calibration_error": {"calibration_error": 0.2},
    "max_batch_difference": {"batch_difference": 0.1},
    "max_train_overlap": {"train_overlap": 1},
    "probes.empty": {"probes": healthy()["probes"] | {"empty": {"preferred_share": 0.5, "score_mean": 0.0}}},
}


@pytest.mark.parametrize("limit", BAD)
def test_each_limit_is_kept_and_can_be_lifted(limit):
    assert checkup.failures(healthy(), GATE) == []
    (message,) = checkup.failures(healthy() | BAD[limit], GATE)
    assert f"(reward.gate.{limit}=" in message
    lifted = OmegaConf.merge(GATE, {"probes": {"empty": 1.0}} if limit == "probes.empty" else {limit: None})
    assert checkup.failures(healthy() | BAD[limit], lifted) == []


def test_a_figure_that_is_no_number_fails():
    for metrics in (
        {"length_correlation": math.nan},
        {"calibration_error": math.nan},
        {"accuracy_ci95": [math.nan] * 2},
    ):
        assert len(checkup.failures(healthy() | metrics, GATE)) == 1


def test_every_limit_of_the_gate_is_tested():
    assert {limit.partition(".")[0] for limit in BAD} == set(GATE)


def test_a_bad_model_is_refused_on_one_line_that_names_check_figure_and_way_out(tmp_path):
    import json

    metrics = healthy() | BAD["max_length_correlation"] | BAD["min_accuracy"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError) as refused:
        checkup.require(tmp_path, GATE)
    message = str(refused.value)
    assert "correlation of score and length is 0.7 (reward.gate.max_length_correlation=0.6)" in message
    assert "is 0.45 (reward.gate.min_accuracy=0.5)" in message and "ppo.ignore_gate=true" in message
    assert "\n" not in message


def test_the_verdict_says_chance_where_it_is_chance():
    good, bad = checkup.verdict(healthy(), GATE), checkup.verdict(healthy() | BAD["min_accuracy"], GATE)
    assert good[0] == "Passes every limit of reward.gate." and "better than chance" in good[1]
    assert bad[0].startswith("Fails: lower end of the accuracy") and "not distinguishable from chance" in bad[1]
    assert "more than length alone" in good[2] and "not distinguishable from what a bag of words" in good[3]
    worse = checkup.verdict(healthy() | {"accuracy": 0.2, "accuracy_ci95": [0.1, 0.3]}, GATE)
    assert "worse than chance; are the labels exchanged?" in worse[1]
    paying = healthy()
    paying["probes"]["praise"]["preferred_share"] = 0.9
    assert good[-1].endswith("half of the prompts: no probe.")
    assert checkup.verdict(paying, GATE)[-1].endswith("half of the prompts: praise behind the rejected reply (90%).")
