"""The loss on held-out rows during training, and the times that stages say they will take."""

import time

import numpy as np
import pytest
import torch
from helpers import PAIRS, SENTENCES, flat, make_job, plain_logprobs, tiny_policy, tiny_reward_model, tiny_tokenizer

from threefold.data import preferences
from threefold.data.reading import Example
from threefold.evaluation import baselines, held_out
from threefold.execution import device
from threefold.execution.device import Work
from threefold.fileio import read_lines
from threefold.stages import dpo, pretrain, reward, sft
from threefold.training import hf_trainer
from threefold.training.packing import PackedRows

STREAM = torch.arange(8 * 64).remainder(50).add(7).numpy().astype("int32")


def pretrained(job):
    held_out = [{"input_ids": list(range(at, at + 16)), "labels": list(range(at, at + 16))} for at in range(7, 16)]
    return pretrain.fit(job, tiny_policy(), PackedRows(STREAM, 16, 10), 5, held_out)


def finetuned(job):
    examples = [Example([{"role": "user", "content": "hello"}], sentence) for sentence in SENTENCES * 4]
    rows = [sft.labelled(*ids) for ids in held_out.reply_pairs(tiny_tokenizer(), examples)]
    return sft.fit(job, tiny_policy(), tiny_tokenizer(), rows[:10], 2, rows[10:15])


def rewarded(job):
    pairs = preferences.tokenised(tiny_tokenizer(), PAIRS * 4, 512)
    return reward.fit(job, tiny_reward_model(), tiny_tokenizer(), pairs, 2, 0, pairs.rows[:5])


def preferred(job):
    pairs = preferences.tokenised(tiny_tokenizer(), PAIRS * 4, 512)
    return dpo.fit(job, tiny_policy(), tiny_tokenizer(), pairs, 2, None, pairs.rows[:5])


STAGES = {
    "pretrain": (pretrained, ["pretrain.context=16"]),
    "sft": (finetuned, []),
    "reward": (rewarded, []),
    "dpo": (preferred, []),
    "dpo with sft": (preferred, ["dpo.loss_weights={sft: 1.0}", "runtime.micro_batch_size=1"]),
}


def run(kind, folder, evaluations):
    """The trained weights, the step log without and with held-out figures, and the random state after it."""
    (fit, options), stage = STAGES[kind], kind.partition(" ")[0]
    job = make_job(stage, folder, f"{stage}.batch_size=2", f"runtime.evaluations={evaluations}", *options)
    torch.manual_seed(1)
    weights = flat(fit(job))
    rows = read_lines(job.out / "log.jsonl")
    held_out = [row for row in rows if "eval_loss" in row]
    return weights, [row for row in rows if row not in held_out], held_out, torch.get_rng_state()


@pytest.mark.parametrize("kind", STAGES)
def test_measuring_the_held_out_loss_changes_nothing(kind, tmp_path):
    never, often = (run(kind, tmp_path / str(times), times) for times in (0, 3))
    assert torch.equal(never[0], often[0]) and never[1] == often[1] and torch.equal(never[3], often[3])
    last = never[1][-1]["step"]
    assert never[2] == [] and [row["step"] for row in often[2]] == sorted(hf_trainer.moments(3, last))
    assert often[2][-1]["step"] == last and all(row["eval_loss"] > 0 for row in often[2])


def test_the_held_out_loss_is_that_of_the_model(tmp_path):
    job = make_job("sft", tmp_path, "sft.batch_size=2", "runtime.evaluations=1")
    model = finetuned(job).eval()
    examples = [Example([{"role": "user", "content": "hello"}], sentence) for sentence in (SENTENCES * 4)[10:15]]
    pairs = held_out.reply_pairs(tiny_tokenizer(), examples)
    losses = [-plain_logprobs(model, prompt, reply).mean().item() for prompt, reply in pairs]
    measured = [row["eval_loss"] for row in read_lines(job.out / "log.jsonl") if "eval_loss" in row]
    assert measured == [pytest.approx(np.mean(losses), rel=1e-4)]


def test_evaluations_are_spread_evenly_and_cost_little(tmp_path):
    assert hf_trainer.moments(4, 100) == {25, 50, 75, 100} and hf_trainer.moments(4, 2) == {1, 2}
    assert hf_trainer.moments(0, 100) == set()
    rows = list(range(1000))
    for evaluations, trained, count in ((4, 1000, 37), (4, 100, 8), (1, 10_000, 256), (2, 1000, 75)):
        job = make_job("sft", tmp_path / f"{evaluations}-{trained}", f"runtime.evaluations={evaluations}")
        before, drawn = torch.get_rng_state(), hf_trainer.held_out_rows(job, rows, trained)
        assert len(set(drawn)) == count and drawn == sorted(drawn) != rows[:count]
        assert hf_trainer.held_out_rows(job, rows, trained) == drawn and torch.equal(torch.get_rng_state(), before)
        other = make_job("sft", tmp_path / f"{evaluations}-{trained}-2", f"runtime.evaluations={evaluations}", "seed=9")
        assert hf_trainer.held_out_rows(other, rows, trained) != drawn
    assert hf_trainer.held_out_rows(make_job("sft", tmp_path / "0", "runtime.evaluations=0"), rows, 10) is None


# Estimates


def fastest(function):
    """The least of three times, s: other work of the machine only ever adds to one."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


@pytest.mark.parametrize("trained", [True, False])
def test_the_estimated_time_is_that_of_the_passes(trained):
    model, (rows, length), count = tiny_policy(), (16, 48), 20
    ids = torch.randint(7, 60, (rows, length))

    def passes():
        for _ in range(count):
            with torch.set_grad_enabled(trained):
                loss = model(input_ids=ids, labels=ids).loss
                if trained:
                    loss.backward()

    model.zero_grad()
    tokens = count * rows * length
    work = Work(tokens, shape=(rows, length)) if trained else Work(scored=tokens, shape=(rows, length))
    estimated = min(device.estimated_seconds(model, work) for _ in range(3))
    assert all(p.grad is None for p in model.parameters())
    assert estimated / 3 < fastest(passes) < 3 * estimated


def test_the_estimated_time_of_the_baselines_is_theirs():
    words = np.random.default_rng(0).choice(["one", "two", "three", "four", "five"], 300_000)
    texts = [" ".join(words[at : at + 100]) for at in range(0, len(words), 100)]
    estimated = min(baselines.estimated_seconds(texts, texts[:20]) for _ in range(3))
    assert estimated / 4 < fastest(lambda: baselines.text_baselines(texts, texts[:20])) < 4 * estimated


def test_the_estimate_reads_no_random_number_and_is_part_of_the_announcement(tmp_path, monkeypatch, capsys):
    job = make_job("dpo", tmp_path)
    monkeypatch.setattr(device, "seconds_per_token", lambda model, shape, trained: 0.001 * (3 if trained else 1))
    job.announce("64 tokens", 100, None, Work(1000, 2000, 3000), more=9.0)
    assert "64 tokens × 100 steps, about 18 s" in capsys.readouterr().out  # 3 + 2 + 3, 1 for the steps, and 9
    monkeypatch.undo()
    model, before = tiny_policy(), torch.get_rng_state()
    device.estimated_seconds(model, Work(10, 10, 10))
    assert torch.equal(torch.get_rng_state(), before)
