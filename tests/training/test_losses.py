"""The losses that stages train on, TRL's with our arguments and PPO's own, against one unpadded row at a time."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    PAIRS,
    SENTENCES,
    make_job,
    perturb,
    plain_logprobs,
    plain_score,
    tiny_policy,
    tiny_reward_model,
    tiny_tokenizer,
)

from threefold.config.compose import compose
from threefold.data import preferences
from threefold.data.reading import Example
from threefold.errors import UserError
from threefold.evaluation import held_out
from threefold.fileio import read_lines
from threefold.models import chat, loading
from threefold.sampling import sampler
from threefold.stages import dpo, reward, sft
from threefold.stages import tokenizer as tokenizer_stage
from threefold.training import hf_trainer

# eight prompts and replies of different lengths
EXAMPLES = [
    Example([{"role": "user", "content": SENTENCES[i % 5][: 4 + 7 * i]}], SENTENCES[(i + 1) % 5][: 1 + 53 * i % 40])
    for i in range(8)
]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.fixture
def trainer_of(monkeypatch):
    """The trainer that a stage's `fit` is about to train with."""

    def build(fit, *arguments):
        built = []
        monkeypatch.setattr(hf_trainer, "train", lambda trainer, *_: built.append(trainer))
        fit(*arguments)
        return built[0]

    return build


def first_step(job, fit, *arguments) -> dict[str, float]:
    """What the Trainer logs of its only optimiser step."""
    fit(job, *arguments)
    return read_lines(job.out / "log.jsonl")[0]


# Supervised fine-tuning


def sft_rows() -> list[dict[str, list[int]]]:
    return [sft.labelled(*ids) for ids in held_out.reply_pairs(tiny_tokenizer(), EXAMPLES)]


def test_sft_trains_on_the_reply_and_its_end_token_only(tmp_path, trainer_of):
    tokenizer, job = tiny_tokenizer(), make_job("sft", tmp_path, "sft.batch_size=8")
    batch = next(iter(trainer_of(sft.fit, job, tiny_policy(), tokenizer, sft_rows(), 8).get_train_dataloader()))
    found = set()
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (labels[length:] == -100).all() and (ids[length:] == tokenizer.pad_token_id).all()
        trained_on = labels != -100
        assert torch.equal(labels[trained_on], ids[trained_on])
        assert labels[length - 1] == tokenizer.eos_token_id != tokenizer.pad_token_id
        found.add((tuple(ids[:length][~trained_on[:length]].tolist()), tuple(labels[trained_on].tolist())))
    prompts_and_replies = held_out.reply_pairs(tokenizer, EXAMPLES)
    assert found == {(tuple(prompt), tuple(reply)) for prompt, reply in prompts_and_replies}
    assert all(prompt.count(tokenizer.bos_token_id) == 1 for prompt, _ in prompts_and_replies)


def test_sft_loss_is_the_mean_over_reply_tokens(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_policy()
    logprobs = [plain_logprobs(model, prompt, reply) for prompt, reply in held_out.reply_pairs(tokenizer, EXAMPLES)]
    step = first_step(make_job("sft", tmp_path, "sft.batch_size=8"), sft.fit, model, tokenizer, sft_rows(), 8)
    assert step["loss"] == pytest.approx(-torch.cat(logprobs).mean().item(), abs=1e-4)


# Gradient accumulation


def tokenised(pairs: list[preferences.Pair]) -> preferences.TokenisedPairs:
    return preferences.tokenised(tiny_tokenizer(), pairs, 512)


@pytest.mark.parametrize(
    ("stage", "fit", "model", "rows"),
    [
        ("sft", sft.fit, tiny_policy, lambda: (sft_rows(), len(EXAMPLES))),
        ("reward", reward.fit, tiny_reward_model, lambda: (tokenised(PAIRS * 2), 8)),
        ("dpo", dpo.fit, tiny_policy, lambda: (tokenised(PAIRS * 2), 8)),
    ],
)
def test_loss_and_gradient_do_not_depend_on_accumulation(tmp_path, stage, fit, model, rows):
    steps = []
    for micro in ("null", "2"):
        job = make_job(stage, tmp_path / micro, f"{stage}.batch_size=8", f"runtime.micro_batch_size={micro}")
        steps.append(first_step(job, fit, model(), tiny_tokenizer(), *rows()))
    whole, split = steps
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    assert whole["grad_norm"] > 0.01


# Reward model


@pytest.fixture
def reward_trainer(tmp_path, trainer_of):
    return made_reward_trainer(tmp_path, trainer_of)


def made_reward_trainer(folder, trainer_of, *overrides: str, pairs: list[preferences.Pair] = PAIRS):
    job = make_job("reward", folder, f"reward.batch_size={len(PAIRS)}", *overrides)
    return trainer_of(reward.fit, job, tiny_reward_model(), tiny_tokenizer(), tokenised(pairs), len(pairs))


def scores_by_hand(model) -> list[tuple[float, float]]:
    """Scores of (chosen, rejected) of each pair, one row at a time."""
    tokenizer, found = tiny_tokenizer(), []
    for pair in PAIRS:
        prompt, replies = chat.row_ids(tokenizer, pair.prompt, pair.chosen, pair.rejected)
        found.append(tuple(plain_score(model, prompt + reply) for reply in replies))
    return found


def test_reward_loss_is_bradley_terry_with_centring(reward_trainer):
    batch = next(iter(reward_trainer.get_train_dataloader()))
    scores = scores_by_hand(reward_trainer.model)
    bradley_terry = sum(-log_sigmoid(c - r) for c, r in scores) / len(scores)
    centring = sum((c + r) ** 2 for c, r in scores) / len(scores)
    assert 0.01 * centring > 1e-3  # large enough to be missed
    loss = reward_trainer.compute_loss(reward_trainer.model, batch).item()
    assert loss == pytest.approx(bradley_terry + 0.01 * centring, abs=1e-5)


def test_the_score_head_starts_small_and_the_body_is_the_sft_model(tmp_path):
    job = make_job("reward", tmp_path)
    policy = tiny_policy()
    loading.save(policy, tiny_tokenizer(), tmp_path / "sft")
    job.inputs["sft"] = tmp_path / "sft"
    model = reward.with_score_head(job, tiny_tokenizer(), 1)
    width = model.config.hidden_size
    assert model.score.weight.shape == (1, width) and model.score.bias is None
    assert 0.3 < model.score.weight.std().item() * (width + 1) ** 0.5 < 2
    body = policy.base_model.state_dict()
    assert all(torch.equal(body[name], value) for name, value in model.base_model.state_dict().items())


def test_stored_normalisation_gives_mean_0_and_deviation_1(tmp_path):
    job = make_job("reward", tmp_path, "sampling.max_new_tokens=6")
    loading.save(tiny_policy(), tiny_tokenizer(), tmp_path / "sft")
    job.inputs["sft"], model = tmp_path / "sft", tiny_reward_model()
    reward.normalise(model, tiny_tokenizer(), reward.sft_samples(job, tiny_tokenizer(), PAIRS))
    policy = loading.load_policy(tmp_path / "sft")
    prompts = [chat.prompt_ids(tiny_tokenizer(), pair.prompt) for pair in PAIRS]
    numbers = sampler.random_numbers(job.config.reward.seed, len(prompts), job.config.sampling)
    replies = sampler.sample(policy, prompts, job.config.sampling, tiny_tokenizer(), numbers)
    raw = [plain_score(model, prompt + reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
    scores = torch.tensor([(score - model.config.score_mean) / model.config.score_std for score in raw])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-4)


def test_the_gap_of_a_pair_is_its_margin_in_the_reward_loss(tmp_path, trainer_of):
    gaps = [0.25, 1.0, 0.05, 0.0]
    pairs = [replace(pair, gap=gap) for pair, gap in zip(PAIRS, gaps, strict=True)]
    trainer = made_reward_trainer(tmp_path, trainer_of, "reward.margin_coef=2.0", pairs=pairs)
    scores, margins = scores_by_hand(trainer.model), [2.0 * gap for gap in gaps]
    expected = sum(-log_sigmoid(c - r - m) + 0.01 * (c + r) ** 2 for (c, r), m in zip(scores, margins, strict=True)) / 4
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_a_margin_needs_gaps():
    config = compose(["experiment=smoke", "reward.margin_coef=1"]).reward
    with pytest.raises(UserError, match=r"reward\.margin_coef=1: 1 pairs have no gap"):
        reward.require_margins(config, tokenised(PAIRS))


def test_label_smoothing_is_the_expected_loss_under_that_share_of_wrong_labels(tmp_path, trainer_of):
    trainer = made_reward_trainer(tmp_path, trainer_of, "reward.label_smoothing=0.3", "reward.center_coef=0")
    scores = scores_by_hand(trainer.model)
    assert max(abs(c - r) for c, r in scores) > 0.1  # where all are equal, smoothing changes nothing
    expected = sum(-0.7 * log_sigmoid(c - r) - 0.3 * log_sigmoid(r - c) for c, r in scores) / len(scores)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_both_replies_of_a_reward_batch_end_with_the_end_token(reward_trainer):
    batch = next(iter(reward_trainer.get_train_dataloader()))
    last = batch["attention_mask"].sum(1) - 1
    assert batch["input_ids"][range(8), last].tolist() == [tiny_tokenizer().eos_token_id] * 8


# DPO


@pytest.fixture
def dpo_trainer(tmp_path, trainer_of):
    job = make_job("dpo", tmp_path, f"dpo.batch_size={len(PAIRS)}", "dpo.beta=0.1")
    return trainer_of(dpo.fit, job, tiny_policy(), tiny_tokenizer(), tokenised(PAIRS), len(PAIRS))


def implicit_rewards(model, reference, beta: float) -> list[tuple[float, float]]:
    """beta times the change of summed log-probability, of (chosen, rejected) of each pair."""
    tokenizer, found = tiny_tokenizer(), []
    for pair in PAIRS:
        prompt, replies = chat.row_ids(tokenizer, pair.prompt, pair.chosen, pair.rejected)
        change = [plain_logprobs(model, prompt, r).sum() - plain_logprobs(reference, prompt, r).sum() for r in replies]
        found.append(tuple(beta * c.item() for c in change))
    return found


def logged(trainer) -> dict[str, list[float]]:
    """What TRL has noted of each batch for its log."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def test_dpo_starts_at_ln_2_with_no_reward(dpo_trainer):
    batch = next(iter(dpo_trainer.get_train_dataloader()))
    loss = dpo_trainer.compute_loss(dpo_trainer.model, batch).item()
    assert loss == pytest.approx(math.log(2), abs=1e-5)
    metrics = logged(dpo_trainer)
    for name in ("rewards/chosen", "rewards/rejected"):
        assert metrics[name] == [pytest.approx(0, abs=1e-5)]
    assert metrics["logps/chosen"] != metrics["logps/rejected"]


def test_dpo_loss_of_a_changed_model_is_minus_log_sigmoid(dpo_trainer):
    perturb(dpo_trainer.model, 0.1)
    rewards = implicit_rewards(dpo_trainer.model, tiny_policy(), 0.1)
    expected = sum(-log_sigmoid(chosen - rejected) for chosen, rejected in rewards) / len(rewards)
    assert abs(expected - math.log(2)) > 0.01
    loss = dpo_trainer.compute_loss(dpo_trainer.model, next(iter(dpo_trainer.get_train_dataloader()))).item()
    assert loss == pytest.approx(expected, abs=1e-4)
    for name, side in zip(("rewards/chosen", "rewards/rejected"), zip(*rewards, strict=True), strict=True):
        assert logged(dpo_trainer)[name] == [pytest.approx(sum(side) / len(side), abs=1e-4)]


def dpo_loss(kind: str, chosen: float, rejected: float, pair: preferences.Pair, beta: float, noise: float) -> float:
    """One pair's loss from its two rewards, beta times the change of log-probability."""
    delta = chosen - rejected
    if kind == "hinge":
        return max(0.0, 1 - delta)
    if kind == "robust":
        return (-(1 - noise) * log_sigmoid(delta) + noise * log_sigmoid(-delta)) / (1 - 2 * noise)
    lengths = [len(chat.reply_ids(tiny_tokenizer(), pair.prompt, reply)) for reply in (pair.chosen, pair.rejected)]
    return (chosen / beta / lengths[0] - rejected / beta / lengths[1] - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize(("kind", "noise"), [("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1)])
def test_dpo_losses_of_other_kinds(tmp_path, trainer_of, kind, noise):
    options = [f"dpo.batch_size={len(PAIRS)}", "dpo.beta=0.1", f"dpo.loss_type={kind}", f"dpo.label_smoothing={noise}"]
    job = make_job("dpo", tmp_path, *options)
    trainer = trainer_of(dpo.fit, job, tiny_policy(), tiny_tokenizer(), tokenised(PAIRS), len(PAIRS))
    perturb(trainer.model, 0.1)
    rewards = implicit_rewards(trainer.model, tiny_policy(), 0.1)
    expected = sum(dpo_loss(kind, *r, pair, 0.1, noise) for r, pair in zip(rewards, PAIRS, strict=True)) / len(PAIRS)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()
    assert loss == pytest.approx(expected, rel=1e-3)


def test_dpo_trains_on_the_tokens_of_the_other_stages_whatever_the_template_writes_behind_them(tmp_path, trainer_of):
    """Qwen's, Gemma's and other templates write a line break after the end of turn, which no reply has."""
    tokenizer = tokenizer_stage.train(SENTENCES, 300)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\n'")
    job, pairs = make_job("dpo", tmp_path, f"dpo.batch_size={len(PAIRS)}"), preferences.tokenised(tokenizer, PAIRS, 512)
    trainer = trainer_of(dpo.fit, job, tiny_policy(), tokenizer, pairs, len(PAIRS))
    trained = [{name: row[name] for name in pairs.rows[0]} for row in trainer.train_dataset]
    assert trained == pairs.rows and all(row["chosen_ids"][-1] == tokenizer.eos_token_id for row in trained)


def test_dpo_tokens_are_those_of_the_other_stages(dpo_trainer):
    rows = tokenised(PAIRS).rows
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert [{name: row[name] for name in names} for row in dpo_trainer.train_dataset] == rows


def test_cached_reference_logprobs_are_the_live_ones(dpo_trainer):
    for row in dpo_trainer.train_dataset:
        for side in ("chosen", "rejected"):
            live = plain_logprobs(dpo_trainer.model, row["prompt_ids"], row[f"{side}_ids"]).sum().item()
            assert row[f"ref_{side}_logps"] == pytest.approx(live, abs=1e-3)
