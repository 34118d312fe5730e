"""Losses, weights and scores that are not finite stop a stage with one line, whatever trains it."""

import math

import pytest
import torch
from helpers import PAIRS, PROMPTS, SENTENCES, make_job, make_ppo, tiny_policy, tiny_reward_model, tiny_tokenizer

from threefold.data import preferences
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import held_out
from threefold.fileio import read_lines
from threefold.models import ensemble, loading
from threefold.stages import dpo, ppo, pretrain, reward, sft
from threefold.training.packing import PackedRows

LOST = r"^{}: [\w/]+ is (nan|inf) at step \d+; lower {}$"


def sft_rows():
    examples = [Example([{"role": "user", "content": "hello"}], sentence) for sentence in SENTENCES * 4]
    return [sft.labelled(*ids) for ids in held_out.reply_pairs(tiny_tokenizer(), examples)]


def tokenised(pairs):
    return preferences.tokenised(tiny_tokenizer(), pairs, 512)


def unpaired():
    rows = [(pair.prompt, reply, label) for pair in PAIRS for reply, label in ((pair.chosen, 1), (pair.rejected, 0))]
    return tokenised(preferences.matched(rows * 4, 0, False))


STAGES = {
    "pretrain": lambda job: pretrain.fit(
        job, tiny_policy(), PackedRows(torch.arange(8 * 64).remainder(50).numpy().astype("int32"), 16), 5
    ),
    "sft": lambda job: sft.fit(job, tiny_policy(), tiny_tokenizer(), sft_rows(), 2),
    "reward": lambda job: reward.fit(job, tiny_reward_model(), tiny_tokenizer(), tokenised(PAIRS * 4), 2),
    "reward unpaired": lambda job: reward.fit(job, tiny_reward_model(), tiny_tokenizer(), unpaired(), 2),
    "reward with LoRA": lambda job: reward.fit(job, tiny_reward_model(), tiny_tokenizer(), tokenised(PAIRS * 4), 2, 1),
    "dpo": lambda job: dpo.fit(job, tiny_policy(), tiny_tokenizer(), tokenised(PAIRS * 4), 2),
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_learning_rate_that_loses_the_weights_is_named(tmp_path, kind):
    stage = kind.partition(" ")[0]
    options = [f"{stage}.batch_size=2", f"{stage}.learning_rate=1e30", f"{stage}.warmup=0"]
    options += ["pretrain.context=16", "pretrain.matrix_learning_rate=1e30"] if stage == "pretrain" else []
    options += ["reward.lora_rank=4"] if "LoRA" in kind else []
    job = make_job(stage, tmp_path, *options)
    rates = f"{stage}.learning_rate"
    rates = f"pretrain.matrix_learning_rate or {rates}" if stage == "pretrain" else rates
    with pytest.raises(UserError, match=LOST.format(stage, rates)):
        STAGES[kind](job)
    steps = read_lines(job.out / "log.jsonl")
    assert all(math.isfinite(value) for step in steps for value in step.values())


@pytest.mark.parametrize("rate", ["learning_rate", "critic_learning_rate"])
def test_ppo_names_a_learning_rate_that_loses_the_weights(tmp_path, rate):
    made = make_ppo(tmp_path, 4, "ppo.episodes=36", f"ppo.{rate}=1e30")
    with pytest.raises(UserError, match=r"^ppo: \w+ is (nan|-?inf) at rollout \d+; lower ppo\.learning_rate or ppo\."):
        ppo.train(made, PROMPTS)
    steps = read_lines(made.job.out / "log.jsonl") if (made.job.out / "log.jsonl").exists() else []
    assert all(math.isfinite(value) for step in steps for value in step.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ppo_stops_at_a_reward_that_is_not_finite(tmp_path, value):
    made = make_ppo(tmp_path, 4, "ppo.episodes=24", "ppo.missing_end_penalty=null")
    made.reward = lambda prompts, completions, **columns: [value] * len(completions)
    with pytest.raises(UserError, match=r"^ppo: \w+ is (nan|-?inf) at rollout 1; lower ppo\.learning_rate or ppo\."):
        ppo.train(made, PROMPTS)


def test_weights_that_are_lost_in_the_last_step_are_not_saved(tmp_path):
    for model in (tiny_policy(), tiny_reward_model()):
        for value in (math.nan, math.inf, -math.inf):
            name, parameter = list(model.named_parameters())[-1]
            parameter.data.flatten()[-1] = value
            with pytest.raises(UserError, match=f"^{name}: has weights that are no finite numbers; lower"):
                loading.save(model, tiny_tokenizer(), tmp_path / "model")
            parameter.data.flatten()[-1] = 0.0
    assert not (tmp_path / "model").exists()


def test_scores_that_are_lost_do_not_normalise_a_reward_model():
    scores = torch.tensor([1.0, 3.0, 5.0])
    assert ensemble.mean_and_deviation(scores) == (3.0, 2.0)
    assert ensemble.mean_and_deviation(torch.ones(3)) == (1.0, 1e-6)
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"^reward: the scores of the SFT model's samples are not finite; lower"):
            ensemble.mean_and_deviation(torch.cat([scores, torch.tensor([value])]))
