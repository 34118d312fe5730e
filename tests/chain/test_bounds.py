"""Every part of a stage that takes long has a bar, a key that bounds it and a place in the estimate."""

from dataclasses import replace

import pytest
from helpers import SENTENCES, make_job, numbered_pairs, tiny_policy, tiny_tokenizer, with_comparisons, write_model

from threefold.data import preferences, reading
from threefold.data.reading import Example, Rows
from threefold.errors import UserError
from threefold.evaluation import baselines, contamination
from threefold.execution.job import Job
from threefold.fileio import read_lines
from threefold.models import chat
from threefold.stages import dpo, pretrain, reward, sft
from threefold.training.hf_trainer import load_pairs


class Bar:
    def __init__(self, part: str, total: int):
        self.part, self.total, self.count, self.closed = part, total, 0, False

    def update(self, count: int) -> None:
        self.count += count

    def set_postfix(self, values: dict[str, str], refresh: bool) -> None:
        assert not refresh  # it would write a line for every step where no one watches
        self.values = values

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """The bars of all jobs, in their order."""
    shown: list[Bar] = []

    def progress(self, total, unit, initial=0, part=""):
        shown.append(Bar(part, total))
        return shown[-1]

    monkeypatch.setattr(Job, "progress", progress)
    return shown


def test_the_reward_stage_has_bars_and_bounds(tmp_path, bars):
    options = ["reward.batch_size=4", "reward.pairs=8", "reward.eval_pairs=6", "reward.probe_prompts=3"]
    job = with_comparisons(make_job("reward", tmp_path, *options), numbered_pairs(30), numbered_pairs(40))
    metrics = reward.run(job)
    assert (metrics["pairs"], metrics["test_pairs"]) == (8, 6)
    assert {probe["prompts"] for probe in metrics["probes"].values()} <= {1, 2, 3}
    assert [(bar.part, bar.total) for bar in bars] == [("samples", 6), ("", 8), ("check-up", 2 * 6 + 9 * 3 + 3 * 6)]
    assert all(bar.closed for bar in bars)
    assert [bar.count for bar in bars[:2]] == [6, 8]
    assert bars[2].total - 8 * 3 <= bars[2].count <= bars[2].total  # probes that do not fit are left out


def test_the_dpo_stage_has_bars_and_bounds(tmp_path, bars):
    options = ["dpo.batch_size=4", "dpo.pairs=8", "dpo.eval_pairs=6"]
    job = with_comparisons(make_job("dpo", tmp_path, *options), numbered_pairs(30), numbered_pairs(40))
    metrics = dpo.run(job)
    assert (metrics["pairs"], metrics["test_pairs"]) == (8, 6)
    assert [(bar.part, bar.total, bar.count) for bar in bars] == [
        ("reference", 14, 14), ("", 8, 8), ("held out", 24, 24),
    ]  # fmt: skip
    logged = [row["loss"] for row in read_lines(job.out / "log.jsonl") if "loss" in row]
    assert bars[1].values == {"loss": f"{logged[-1]:.3f}"}
    assert all(bar.closed for bar in bars)


@pytest.mark.slow
def test_sft_and_pretraining_have_bars(tmp_path, bars, monkeypatch):
    examples = [Example(pair.prompt, pair.chosen) for pair in numbered_pairs(8)]
    monkeypatch.setattr(reading, "training_examples", lambda *_: examples)
    monkeypatch.setattr(reading, "prompts", lambda *_: examples)
    job = make_job("sft", tmp_path / "sft", "sft.batch_size=4", "sft.max_length=128")
    job.inputs["pretrain"] = write_model(tiny_policy(), tmp_path / "base")
    sft.run(job)
    full = [("held out", 8, 8), ("", 8, 8), ("held out", 8, 8), ("samples", 8, 8)]
    assert [(bar.part, bar.total, bar.count) for bar in bars] == full
    bars.clear()
    monkeypatch.setattr(reading, "load", lambda *_: Rows([{"text": text} for text in SENTENCES * 40], {}))
    monkeypatch.setattr(baselines, "text_baselines", lambda *_: {})
    options = ["pretrain.tokens=256", "pretrain.context=16", "pretrain.batch_size=4", "pretrain.eval_tokens=200"]
    job = make_job("pretrain", tmp_path / "pretrain", *options)
    job.inputs["tokenizer"] = write_model(tiny_policy(), tmp_path / "tokenizer")
    pretrain.run(job)
    assert [bar.part for bar in bars] == ["", "held out"] and bars[1].total == 200
    assert 0.8 * 200 < bars[1].count <= 200 + len(SENTENCES) * 40  # whole texts, and a token before each


def test_pairs_are_drawn_by_the_seed():
    pairs = numbered_pairs(20)
    first, again, other = (preferences.drawn(pairs, 5, seed) for seed in (1, 1, 2))
    assert first == again != other and sorted(map(str, first)) == sorted(map(str, pairs))
    assert preferences.drawn(pairs, None, 1) == pairs


def test_no_more_pairs_are_tokenised_than_it_takes(tmp_path, bars, monkeypatch):
    """Of 40 pairs every other one is too long for the limit: about 20 are tokenised for the 10 that are asked for."""
    pairs = [replace(pair, chosen="yes " * (200 if i % 2 else 1)) for i, pair in enumerate(numbered_pairs(40))]
    options = ["dpo.pairs=10", "dpo.eval_pairs=3", "dpo.max_length=100", "data.preferences.max_unusable_share=0.9"]
    job = with_comparisons(make_job("dpo", tmp_path, *options), pairs, numbered_pairs(40))
    tokenised, original = [], chat.row_ids
    monkeypatch.setattr(chat, "row_ids", lambda *given: tokenised.extend(given[2:]) or original(*given))
    monkeypatch.setattr("threefold.training.hf_trainer.LONG", 12)
    train, test = load_pairs(job, tiny_tokenizer())
    assert len(train.rows) == len({str(pair) for pair in train.pairs}) == 10 and len(test.rows) == 3
    assert len(tokenised) == 2 * (10 + train.dropped + 3 + test.dropped) < 2 * 40
    assert [(bar.part, bar.total, bar.count, bar.closed) for bar in bars] == [("tokens", 13, 13, True)]


def test_held_out_examples_of_sft_are_tokenised_once(tmp_path, monkeypatch):
    examples = [Example(pair.prompt, pair.chosen) for pair in numbered_pairs(8)]
    monkeypatch.setattr(reading, "training_examples", lambda *_: examples[:4])
    monkeypatch.setattr(reading, "prompts", lambda *_: examples[4:])
    tokenised, original = [], chat._tokens
    monkeypatch.setattr(chat, "_tokens", lambda *given: tokenised.extend(given[1]) or original(*given))
    job = make_job("sft", tmp_path / "sft", "sft.batch_size=4", "sft.max_length=128")
    job.inputs["pretrain"] = write_model(tiny_policy(), tmp_path / "base")
    sft.run(job)
    end = tiny_tokenizer().eos_token
    assert sorted(turn.completion for turn in tokenised) == sorted(example.reply + end for example in examples)


@pytest.mark.parametrize("stage", [reward, dpo])
def test_the_estimate_grows_with_what_is_measured(tmp_path, monkeypatch, stage):
    """Twenty times as many held-out pairs: the work announced grows by at least as much as scoring them twice takes."""

    class Announced(Exception):
        pass

    def announce(self, batch, steps, model, work):
        raise Announced(work.scored)

    name, announced = stage.__name__.rpartition(".")[2], []
    monkeypatch.setattr(Job, "announce", announce)
    for held_out in (2, 40):
        folder = tmp_path / str(held_out)
        job = make_job(name, folder, f"{name}.batch_size=4")
        job = with_comparisons(job, numbered_pairs(8), numbered_pairs(held_out))
        with pytest.raises(Announced) as stopped:
            stage.run(job)
        announced.append(stopped.value.args[0])
    tokens = preferences.tokenised(tiny_tokenizer(), numbered_pairs(40)[2:], 512).tokens()
    assert announced[1] - announced[0] > 0.95 * 2 * tokens  # of both replies of a pair, prompts included


def test_what_the_reward_stage_refuses_it_refuses_before_it_samples(tmp_path, bars):
    pairs = [*numbered_pairs(8)]
    unlabelled = [pair.__class__(pair.prompt, pair.chosen, pair.rejected, None, "people") for pair in pairs]
    job = with_comparisons(make_job("reward", tmp_path, "reward.margin_coef=1"), unlabelled, pairs)
    with pytest.raises(UserError, match="8 pairs have no gap"):
        reward.run(job)
    job = with_comparisons(make_job("reward", tmp_path / "one"), pairs, pairs[:1])
    with pytest.raises(UserError, match="samples for held-out prompts, and there is one"):
        reward.run(job)
    assert not bars


def test_the_search_for_copies_counts_what_it_has_read():
    bar = Bar("copies", 5)
    trained = {"pretrain": [*SENTENCES[:3]], "sft": [*SENTENCES[3:]]}
    found = contamination.against({"prompts": [SENTENCES[0]], "tasks.sums": ["1 + 1"]}, trained, bar=bar)
    assert bar.count == bar.total == 5
    assert found["prompts"][0]["pretrain"]["copies"] == 1 and found["prompts"][0]["sft"]["copies"] == 0
