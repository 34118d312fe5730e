"""The order of training rows: what an epoch leaves out, which rows meet in a batch, and in which order batches come.

Wrong orders that trainers have had stand here too, and each must fail: batches from short to long, and an epoch that
leaves out the same rows as the one before.
"""

from dataclasses import replace

import numpy as np
import pytest
from helpers import make_job, numbered_pairs, with_comparisons

from threefold.data import reading
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.ppo import rollouts
from threefold.stages import dpo, reward, sft
from threefold.training import hf_trainer
from threefold.training.packing import PackedRows


def lengths_of(rows: int, seed: int = 0) -> list[int]:
    """Lengths as those of replies: most short, some ten times as long."""
    return np.random.default_rng(seed).lognormal(3, 1, rows).astype(int).clip(1, 512).tolist()


def epochs_of(order: list[int], rows: int, batch_size: int) -> list[list[int]]:
    """The order cut into epochs of as many whole batches as `rows` fill."""
    size = rows // batch_size * batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches_of(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# What must hold of an order, as functions so that wrong orders can be put to them


def other_rows_are_left_out_of_each_epoch(in_order):
    """500 rows in batches of 32: 20 stay out of an epoch, and after three epochs no row was seen less than twice."""
    for rows, batch_size in ((500, 32), (60, 32), (35, 8), (33, 32)):
        for seed in range(5):
            epochs = epochs_of(in_order(lengths_of(rows), batch_size, 3, seed), rows, batch_size)
            assert len(epochs) == 3 and all(len(set(epoch)) == len(epoch) for epoch in epochs)
            left_out = [set(range(rows)) - set(epoch) for epoch in epochs]
            assert [len(rest) for rest in left_out] == [rows % batch_size] * 3
            assert not left_out[0] & left_out[1] and not left_out[1] & left_out[2]


def batches_come_in_any_order_of_length(in_order):
    """Over 40 seeds the place of a batch in the epoch and the length of its rows do not correlate.

    A correlation of 16 places has a standard deviation of 1/sqrt(15), and the mean of 40 one of 0.041.
    """
    rows, batch_size = 128, 8
    lengths = np.array(lengths_of(rows))
    correlations = []
    for seed in range(40):
        batches = batches_of(in_order(lengths.tolist(), batch_size, 1, seed), batch_size)
        means = [lengths[batch].mean() for batch in batches]
        correlations.append(np.corrcoef(range(len(batches)), np.argsort(np.argsort(means)))[0, 1])
    assert abs(np.mean(correlations)) < 0.2 and np.std(correlations) > 0.1


CLAIMS = [other_rows_are_left_out_of_each_epoch, batches_come_in_any_order_of_length]


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_order_of_training(claim):
    claim(hf_trainer.in_order)


def from_short_to_long(lengths, batch_size, epochs, seed):
    """A wrong order: the right batches of each epoch, sorted by length."""
    order, size = hf_trainer.in_order(lengths, batch_size, epochs, seed), len(lengths) // batch_size * batch_size
    batches = [sorted(batches_of(epoch, batch_size), key=lambda batch: sum(lengths[i] for i in batch))
               for epoch in (order[start : start + size] for start in range(0, len(order), size))]  # fmt: skip
    return [row for epoch in batches for batch in epoch for row in batch]


def the_same_left_out(lengths, batch_size, epochs, seed):
    """A wrong order: every epoch holds the rows of the first."""
    return hf_trainer.in_order(lengths, batch_size, 1, seed) * epochs


def the_longest_left_out(lengths, batch_size, epochs, seed):
    """A wrong order: rows are sorted before the incomplete batch is left out."""
    generator, order = np.random.default_rng(seed), []
    for _ in range(epochs):
        by_length = np.argsort(lengths, kind="stable")
        batches = [batch for batch in batches_of(by_length.tolist(), batch_size) if len(batch) == batch_size]
        order += [row for i in generator.permutation(len(batches)) for row in batches[i]]
    return order


@pytest.mark.parametrize(
    ("claim", "mutant"),
    [(CLAIMS[1], from_short_to_long), (CLAIMS[0], the_same_left_out), (CLAIMS[0], the_longest_left_out)],
)
def test_a_wrong_order_is_noticed(claim, mutant):
    with pytest.raises(AssertionError):
        claim(mutant)


def test_which_rows_are_left_out_does_not_depend_on_their_length():
    """35 rows in batches of 8: each is among the 3 left out in 3 of 35 seeds, the long ones no oftener than others."""
    rows, seeds = 35, 700
    lengths, counts = lengths_of(rows), np.zeros(rows)
    for seed in range(seeds):
        counts[list(set(range(rows)) - set(hf_trainer.in_order(lengths, 8, 1, seed)))] += 1
    assert counts.sum() == 3 * seeds
    deviation = (counts - seeds * 3 / rows) / np.sqrt(seeds * 3 / rows * (1 - 3 / rows))
    assert np.abs(deviation).max() < 4  # of 35 rows; a fair draw passes 4 deviations in 0.2 %
    assert abs(np.corrcoef(counts, np.argsort(np.argsort(lengths)))[0, 1]) < 0.5


def test_no_tokens_are_lost_for_good():
    """The case of the report: 500 rows, batches of 32, three epochs; 11.6 % of the tokens were in rows never seen."""
    lengths = lengths_of(500)
    unseen = set(range(500)) - set(hf_trainer.in_order(lengths, 32, 3, 1))
    assert sum(lengths[row] for row in unseen) == 0
    one_epoch = set(range(500)) - set(hf_trainer.in_order(lengths, 32, 1, 1))
    assert sum(lengths[row] for row in one_epoch) < 0.08 * sum(lengths)  # 4 % of the rows


def test_rows_of_similar_length_share_a_batch():
    lengths = np.array(lengths_of(500))
    order = hf_trainer.in_order(lengths.tolist(), 32, 1, 0)

    def padded(rows):
        return sum(lengths[batch].max() * len(batch) for batch in batches_of(rows, 32))

    assert padded(order) < 0.6 * padded(np.random.default_rng(0).permutation(order).tolist())


def test_the_seed_decides_the_order():
    lengths = lengths_of(100)
    assert hf_trainer.in_order(lengths, 16, 2, 3) == hf_trainer.in_order(lengths, 16, 2, 3)
    assert hf_trainer.in_order(lengths, 16, 2, 3) != hf_trainer.in_order(lengths, 16, 2, 4)
    first, second = epochs_of(hf_trainer.in_order(lengths, 16, 2, 3), 100, 16)
    assert first != second


@pytest.mark.parametrize(("rows", "left_out"), [(1, 0), (5, 0), (8, 0), (16, 0), (17, 1)])
def test_rows_that_fill_no_batch_together_are_one(rows, left_out):
    order = hf_trainer.in_order(lengths_of(rows), 8, 2, 0)
    assert len(order) == 2 * (rows - left_out)
    assert {order.count(row) for row in range(rows)} <= ({2} if not left_out else {1, 2})


# Pretraining and PPO go over their rows in turn


def test_pretraining_goes_over_its_text_again_and_every_batch_is_full():
    """Seven rows of five tokens, of which the last two do not fill one more, in five batches of three."""
    rows = PackedRows(np.arange(37, dtype=np.uint16), 5, count=15)
    firsts = [rows[i]["input_ids"][0].item() for i in range(len(rows))]
    assert firsts == [0, 5, 10, 15, 20, 25, 30, 0, 5, 10, 15, 20, 25, 30, 0]
    with pytest.raises(UserError, match="4 tokens, which do not fill a row of 5; give more text"):
        PackedRows(np.arange(4, dtype=np.uint16), 5)


def test_every_prompt_has_its_turn():
    """Rollouts of 6 replies, 2 to each prompt: after seven of them each of seven prompts was replied to six times."""
    seen = [prompt for number in range(7) for prompt in rollouts.batch_of(list("abcdefg"), number, 6, 2)]
    assert {prompt: seen.count(prompt) for prompt in seen} == dict.fromkeys("abcdefg", 6)


# What stages count


class Trained(Exception):
    """Raised in place of training, with what was to be trained on."""


def stop_before_training(*arguments):
    raise Trained(arguments)


@pytest.mark.parametrize(("epochs", "trained"), [(1, 16), (2, 19)])
def test_metrics_count_what_is_trained_on(tmp_path, monkeypatch, capsys, epochs, trained):
    """19 rows in batches of 8: 3 are left out of each epoch, others in the second."""
    counted = {}

    def counts(job, *arguments):
        counted[job.stage] = original(job, *arguments)
        return counted[job.stage]

    original = hf_trainer.trained_on
    monkeypatch.setattr(hf_trainer, "trained_on", counts)
    stages = {"reward": (reward, "member"), "dpo": (dpo, "fit"), "sft": (sft, "fit")}
    monkeypatch.setattr(reward, "sft_samples", lambda *_: [])
    examples = [Example(pair.prompt, pair.chosen) for pair in numbered_pairs(19)]
    monkeypatch.setattr(reading, "training_examples", lambda *_: examples)
    monkeypatch.setattr(reading, "prompts", lambda *_: examples)
    for name, (module, training_of) in stages.items():
        options = [f"{name}.epochs={epochs}", f"{name}.batch_size=8"]
        job = with_comparisons(make_job(name, tmp_path / name, *options), numbered_pairs(19), numbered_pairs(4))
        job.inputs["pretrain"] = job.inputs["sft"]
        monkeypatch.setattr(module, training_of, stop_before_training)
        with pytest.raises(Trained):
            module.run(job)
        unit = "examples" if name == "sft" else "pairs"
        assert counted[name] == {unit: trained, "left_out_per_epoch": 3}
        assert f"3 of 19 {unit} fill no batch and are left out of an epoch" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "unpaired"), [("sft", False), ("dpo", False), ("reward", False), ("reward", True)])
def test_rows_that_fill_no_batch_are_one_in_each_epoch(tmp_path, monkeypatch, name, unpaired):
    """5 rows in batches of 8 and passes of 4 for 3 epochs: three steps, and in each of them every row once."""
    options = [f"{name}.epochs=3", f"{name}.batch_size=8", "runtime.micro_batch_size=4"]
    pairs = [replace(p, rejected_prompt=p.prompt if unpaired else None) for p in numbered_pairs(5)]
    job = with_comparisons(make_job(name, tmp_path, *options), pairs, numbered_pairs(4))
    job.inputs["pretrain"] = job.inputs["sft"]
    examples = [Example(pair.prompt, pair.chosen) for pair in pairs]
    monkeypatch.setattr(reading, "training_examples", lambda *_: examples)
    monkeypatch.setattr(reading, "prompts", lambda *_: examples)
    monkeypatch.setattr(reward, "sft_samples", lambda *_: [])
    monkeypatch.setattr(hf_trainer, "train", stop_before_training)
    with pytest.raises(Trained) as stopped:
        {"sft": sft, "dpo": dpo, "reward": reward}[name].run(job)
    trainer, _, per_step, *_ = stopped.value.args[0]
    arguments, rows = trainer.args, list(trainer.train_dataset)
    size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert arguments.max_steps == 3 and per_step == 5 and size == (10 if unpaired else 5) and len(rows) == 3 * size
    for epoch in batches_of(rows, size):
        assert len({str(row) for row in epoch}) == (10 if unpaired else 5)
