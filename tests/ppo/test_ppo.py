"""PPO's stage with tiny models: what a rollout holds, what a step does, and each variant against plain arithmetic."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PROMPTS,
    flat,
    make_job,
    make_ppo,
    perturb,
    plain_logprobs,
    plain_score,
    tiny_policy,
    tiny_reward_model,
    tiny_tokenizer,
    write_model,
)

from threefold.errors import UserError
from threefold.models import chat
from threefold.ppo import rollouts
from threefold.ppo.advantages import estimate
from threefold.stages import ppo


@pytest.mark.parametrize("micro", [2, 5])
def test_ppo_step_does_not_depend_on_the_micro_batch(tmp_path, micro):
    whole, split = make_ppo(tmp_path / "whole", 12), make_ppo(tmp_path / "split", micro)
    rollout = ppo.roll_out(whole, PROMPTS, 0)
    advantages, returns, _ = estimate(rollout, 0.05, whole.config)
    rows = torch.tensor([7, 0, 3, 11, 4, 8, 2, 10])
    found = []
    for made in (whole, split):
        for model in (made.actors.policy, made.actors.critic):
            perturb(model, 0.02)  # ratios other than 1, so that clipping takes effect
        before = [flat(made.actors.policy), flat(made.actors.critic)]
        metrics = ppo.minibatch_step(made, rollout, advantages, returns, rows, 0)
        found.append((metrics, flat(made.actors.policy) - before[0], flat(made.actors.critic) - before[1]))
        assert all(p.grad is None or not p.grad.any() for p in made.actors.policy.parameters())
    (metrics, *gradients), (split_metrics, *split_gradients) = found
    assert metrics["clip_share"] > 0 and metrics["value_clip_share"] > 0
    assert split_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    for ours, theirs in zip(gradients, split_gradients, strict=True):
        assert ours.norm() > 0.01
        assert (ours - theirs).norm() < 1e-4 * ours.norm()


def test_ppo_loss_is_the_mean_over_the_minibatchs_tokens(tmp_path):
    made = make_ppo(tmp_path, 3)
    perturb(made.actors.reference, 0.1, seed=5)  # the ratio is to the policy that sampled, not to the reference
    rollout = ppo.roll_out(made, PROMPTS, 0)
    advantages, returns, _ = estimate(rollout, 0.05, made.config)
    perturb(made.actors.policy, 0.02)
    rows = [7, 0, 3, 11, 4]
    objective, tokens = 0.0, 0
    for row in rows:
        reply = rollout.reply[row][rollout.mask[row].bool()].tolist()
        new = plain_logprobs(made.actors.policy, PROMPTS[row].ids, reply, made.job.config.sampling.temperature)
        for t in range(len(reply)):
            ratio, advantage = math.exp(new[t] - rollout.logprobs[row, t]), advantages[row, t].item()
            objective += min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            tokens += 1
    metrics = ppo.minibatch_step(made, rollout, advantages, returns, torch.tensor(rows), 0)
    assert metrics["policy_loss"] == pytest.approx(-objective / tokens, abs=1e-4)


def test_ppo_reward_is_the_score_less_the_kl_penalty(tmp_path):
    made = make_ppo(tmp_path, 12)
    perturb(made.actors.reference, 0.1, seed=5)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    advantages, returns, metrics = estimate(rollout, 0.05, made.config)
    assert metrics["kl"] > 0.1 and metrics["kl_k3"] > 0.1
    assert metrics["reward"] == pytest.approx(metrics["score"] - 0.05 * metrics["kl"], abs=1e-5)
    for row in range(len(PROMPTS)):
        t = int(rollout.mask[row].sum()) - 1  # at the last token the return is the reward itself
        penalty = 0.05 * (rollout.logprobs[row, t] - rollout.reference_logprobs[row, t])
        assert returns[row, t].item() == pytest.approx((rollout.scores[row] - penalty).item(), abs=1e-5)
    real = advantages[rollout.mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-5) and real.std().item() == pytest.approx(1, abs=1e-4)


def test_ppo_starts_at_the_reference_with_ratio_one(tmp_path):
    made = make_ppo(tmp_path, 4)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    advantages, returns, metrics = estimate(rollout, 0.05, made.config)
    assert rollout.mask.sum(1).unique().numel() > 2  # lengths differ
    assert (rollout.logprobs - rollout.reference_logprobs).abs().max() < 1e-4
    assert abs(metrics["kl"]) < 1e-4 and 0 <= metrics["kl_k3"] < 1e-6
    updated = ppo.update(made, rollout, advantages, returns, 0)
    assert updated["first_ratio_error"] < 1e-4 < updated["ratio_error"]


def test_in_bf16_the_first_ratios_are_those_of_one_forward_pass(tmp_path):
    def first(folder, bf16: bool) -> tuple[float, float]:
        made = make_ppo(folder, 5, "ppo.max_first_ratio_error=null")
        made.accelerator = SimpleNamespace(
            autocast=lambda: torch.autocast("cpu", torch.bfloat16), num_processes=1, process_index=0, device="cpu"
        )
        made.job.device = replace(made.job.device, bf16=bf16)
        rollout = ppo.roll_out(made, PROMPTS, 0)
        advantages, returns, metrics = estimate(rollout, 0.05, made.config)
        assert (metrics.get("engine_ratio_mean", 0.0) > 0) == bf16  # of the sampler, which rounds otherwise
        assert metrics.get("engine_ratio_mean", 0.0) < made.config.max_engine_ratio
        return abs(metrics["kl"]), ppo.update(made, rollout, advantages, returns, 0)["first_ratio_error"]

    kl, error = first(tmp_path / "again", True)
    assert kl < 1e-6 and error < 5e-3
    assert first(tmp_path / "recorded", False)[1] > 2 * error  # what the sampler recorded is rounded otherwise


def test_rollout_does_not_depend_on_the_micro_batch_and_is_that_of_single_rows(tmp_path):
    made, other = make_ppo(tmp_path / "made", 12), make_ppo(tmp_path / "other", 5)
    perturb(made.actors.policy, 0.02)
    perturb(other.actors.policy, 0.02)
    rollout, split = ppo.roll_out(made, PROMPTS, 3), ppo.roll_out(other, PROMPTS, 3)
    assert torch.equal(rollout.reply, split.reply)
    for name in ("logprobs", "reference_logprobs", "values", "scores"):
        torch.testing.assert_close(getattr(rollout, name), getattr(split, name), atol=1e-4, rtol=1e-4)
    assert set(rollout.ended.tolist()) == {0.0, 1.0}
    for row, prompt in enumerate(PROMPTS):
        reply = rollout.reply[row][rollout.mask[row].bool()].tolist()
        for model, logprobs in (
            (made.actors.policy, rollout.logprobs),
            (made.actors.reference, rollout.reference_logprobs),
        ):
            expected = plain_logprobs(model, prompt.ids, reply, made.job.config.sampling.temperature)
            torch.testing.assert_close(logprobs[row, : len(reply)], expected, atol=1e-4, rtol=1e-4)
        score = (plain_score(tiny_reward_model(), prompt.ids + reply) - 0.3) / 1.7
        expected = score if rollout.ended[row] else min(score, -1.0)
        assert rollout.scores[row].item() == pytest.approx(expected, abs=1e-4)


def test_critic_warm_up_leaves_the_policy_alone(tmp_path):
    made = make_ppo(tmp_path, 12, "ppo.critic_warmup=2")
    last, first = 2 * made.config.epochs * made.config.minibatches - 1, 2 * made.config.epochs * made.config.minibatches
    rollout = ppo.roll_out(made, PROMPTS, 0)
    advantages, returns, _ = estimate(rollout, 0.05, made.config)
    before = [flat(made.actors.policy), flat(made.actors.critic)]
    metrics = ppo.minibatch_step(made, rollout, advantages, returns, torch.arange(12), last)
    assert torch.equal(flat(made.actors.policy), before[0]) and not torch.equal(flat(made.actors.critic), before[1])
    assert metrics["grad_norm"] == 0 < metrics["critic_grad_norm"]
    # no policy gradient is left over from the warm-up
    after, fresh = (
        ppo.minibatch_step(each, rollout, advantages, returns, torch.arange(12), first)["grad_norm"]
        for each in (made, make_ppo(tmp_path / "fresh", 12))
    )
    assert after == pytest.approx(fresh, rel=1e-4)


def test_policy_starts_from_sft_and_critic_from_the_reward_model_without_dropout(tmp_path):
    job = make_job("ppo", tmp_path)
    write = {"sft": tiny_policy(attention_dropout=0.5), "reward": tiny_reward_model()}
    for name, model in write.items():
        job.inputs[name] = write_model(model, tmp_path / name)
    made = ppo.load(job)
    pairs = [(made.actors.policy, "sft"), (made.actors.reference, "sft"), (made.actors.critic, "reward")]
    for model, name in pairs:
        assert torch.equal(flat(model), flat(write[name])) and not model.training
    assert made.actors.policy is not made.actors.reference
    ids = torch.tensor([PROMPTS[4].ids])
    assert torch.equal(made.actors.policy(input_ids=ids).logits, made.actors.policy(input_ids=ids).logits)


def test_ppos_learning_rates_scale_with_the_schedule(tmp_path):
    made = make_ppo(tmp_path, 12)
    ppo.set_learning_rates(made, 0.25)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in made.optimizers.values()]
    assert rates == [0.25 * made.config.learning_rate, 0.25 * made.config.critic_learning_rate]


# Variants


FREE = [
    ("rloo", ["ppo.samples_per_prompt=3"]),
    ("grpo", ["ppo.samples_per_prompt=3"]),
    ("reinforce++", []),
]


def without_critic(made: ppo.Ppo) -> ppo.Ppo:
    made.actors.critic = made.optimizers.pop("critic") and None
    return made


@pytest.mark.parametrize(("advantage", "options"), FREE)
def test_advantages_without_a_critic(tmp_path, advantage, options):
    made = without_critic(make_ppo(tmp_path, 5, f"ppo.advantage={advantage}", *options))
    perturb(made.actors.reference, 0.05)
    rollout = ppo.roll_out(made, rollouts.batch_of(PROMPTS, 0, 12, made.config.samples_per_prompt), 0)
    assert not rollout.values.any()
    advantages, _, metrics = estimate(rollout, 0.05, made.config)
    lengths = rollout.mask.sum(1).long().tolist()
    kl = (rollout.logprobs - rollout.reference_logprobs).tolist()
    rewards = [[-0.05 * k for k in kl[row][:n]] for row, n in enumerate(lengths)]
    for row, score in zip(rewards, rollout.scores.tolist(), strict=True):
        row[-1] += score
    if advantage == "reinforce++":
        to_go = torch.tensor([sum(row[t:]) for row in rewards for t in range(len(row))])
        expected = ((to_go - to_go.mean()) / to_go.std()).tolist()
    else:
        totals = torch.tensor([sum(row) for row in rewards]).view(4, 3)
        others = (totals.sum(1, keepdim=True) - totals) / 2
        scaled = (totals - totals.mean(1, keepdim=True)) / (totals.std(1, keepdim=True) + 1e-4)
        per_reply = (totals - others if advantage == "rloo" else scaled).flatten().tolist()
        expected = [per_reply[row] for row, n in enumerate(lengths) for _ in range(n)]
    assert advantages[rollout.mask.bool()].tolist() == pytest.approx(expected, abs=1e-4)
    assert not advantages[~rollout.mask.bool()].any() and "explained_variance" not in metrics


@pytest.mark.parametrize(("advantage", "options"), FREE)
def test_a_step_without_a_critic_moves_the_policy(tmp_path, advantage, options):
    made = without_critic(make_ppo(tmp_path, 5, f"ppo.advantage={advantage}", *options))
    rollout = ppo.roll_out(made, rollouts.batch_of(PROMPTS, 0, 12, made.config.samples_per_prompt), 0)
    advantages, returns, _ = estimate(rollout, 0.05, made.config)
    before = flat(made.actors.policy)
    ppo.set_learning_rates(made, 1.0)
    metrics = ppo.update(made, rollout, advantages, returns, 0)
    assert not torch.equal(flat(made.actors.policy), before)
    assert metrics["first_ratio_error"] < 1e-4 and not any(name.startswith(("value", "critic")) for name in metrics)


def test_no_critic_is_loaded_where_none_is_needed(tmp_path):
    job = make_job("ppo", tmp_path, "ppo.advantage=reinforce++")
    for name, model in {"sft": tiny_policy(), "reward": tiny_reward_model()}.items():
        job.inputs[name] = write_model(model, tmp_path / name)
    made = ppo.load(job)
    assert made.actors.critic is None and list(made.optimizers) == ["policy"]


def averaged(made: ppo.Ppo, rollout: rollouts.Rollout, advantages: torch.Tensor, rows: list[int]) -> list:
    """Of each reply the tokens' losses under the policy as it is now, one row at a time: REINFORCE's, and k3 to 0.1."""
    losses = []
    for row in rows:
        reply = rollout.reply[row][rollout.mask[row].bool()]
        ids = torch.tensor([PROMPTS_IN_THREES[row].ids + reply.tolist()])
        logits = made.actors.policy(input_ids=ids).logits[0, -len(reply) - 1 : -1] / 0.8
        new = logits.log_softmax(-1).gather(1, reply[:, None])[:, 0]
        ratio, a = (new - rollout.logprobs[row, : len(reply)]).exp(), advantages[row, 0]
        clipped = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        log_ratio = rollout.reference_logprobs[row, : len(reply)] - new
        losses.append((-clipped, 0.1 * (log_ratio.exp() - 1 - log_ratio), new))
    return losses


PROMPTS_IN_THREES = rollouts.batch_of(PROMPTS, 0, 12, 3)


@pytest.mark.parametrize("average", ["tokens", "replies", "sums"])
def test_a_step_follows_the_gradient_of_the_papers_average(tmp_path, average):
    options = ["ppo.kl_in=loss", "ppo.kl_estimator=k3", "ppo.samples_per_prompt=3", f"ppo.average={average}"]
    made = without_critic(make_ppo(tmp_path, 5, "ppo.advantage=grpo", *options))
    perturb(made.actors.reference, 0.05)
    rollout = ppo.roll_out(made, PROMPTS_IN_THREES, 0)
    made.kl_coef, rows = 0.1, [7, 0, 3, 11, 4]
    advantages, returns, _ = estimate(rollout, made.kl_coef, made.config)
    perturb(made.actors.policy, 0.01)
    assert made.job.config.sampling.temperature == 0.8 and rollout.mask[rows].sum(1).unique().numel() > 1
    per_reply = [clipped + kl for clipped, kl, _ in averaged(made, rollout, advantages, rows)]
    loss = {
        "tokens": torch.cat(per_reply).mean(),
        "replies": torch.stack([losses.mean() for losses in per_reply]).mean(),  # Shao et al. 2024, equation 3
        "sums": torch.stack([losses.sum() for losses in per_reply]).mean(),
    }[average]
    parameters = list(made.actors.policy.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    before = flat(made.actors.policy)
    ppo.minibatch_step(made, rollout, advantages, returns, torch.tensor(rows), 0)  # plain descent at rate 1
    moved = before - flat(made.actors.policy)
    assert expected.norm() > 0.01 and (moved - expected).norm() < 1e-3 * expected.norm()


def test_one_step_on_sums_is_rloos_reinforce(tmp_path):
    options = ["ppo.advantage=rloo", "ppo.samples_per_prompt=3", "ppo.average=sums", "ppo.epochs=1"]
    made = without_critic(make_ppo(tmp_path, 12, *options, "ppo.minibatches=1"))
    rollout = ppo.roll_out(made, PROMPTS_IN_THREES, 0)
    advantages, returns, _ = estimate(rollout, 0.0, made.config)
    scores = rollout.scores.tolist()
    loss = 0.0
    for row, (_, _, new) in enumerate(averaged(made, rollout, advantages, range(12))):
        others = [scores[i] for i in range(row - row % 3, row - row % 3 + 3) if i != row]
        loss = loss - (scores[row] - sum(others) / 2) * new.sum() / 12  # Ahmadian et al. 2024, section 3.3
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.actors.policy.parameters()))])
    before = flat(made.actors.policy)
    ppo.update(made, rollout, advantages, returns, 0)
    moved = before - flat(made.actors.policy)
    assert expected.norm() > 0.01 and (moved - expected).norm() < 1e-3 * expected.norm()


def test_a_reply_never_gains_by_a_missing_end(tmp_path):
    made = make_ppo(tmp_path, 12, "ppo.missing_end_penalty=-1")
    given = [3.0, -5.0] * 6
    made.reward = lambda prompts, completions, **columns: given
    rollout = ppo.roll_out(made, PROMPTS, 0)
    ended = rollout.ended.bool().tolist()
    assert {(end, score) for end, score in zip(ended, given, strict=True)} == {
        (end, score) for end in (True, False) for score in (3.0, -5.0)
    }
    assert rollout.scores.tolist() == [
        score if end else min(score, -1.0) for end, score in zip(ended, given, strict=True)
    ]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_added_per_token_and_leaves_the_reward_alone(tmp_path, estimator):
    made = make_ppo(tmp_path / "loss", 12, "ppo.kl_in=loss", f"ppo.kl_estimator={estimator}")
    plain = make_ppo(tmp_path / "plain", 12)
    perturb(made.actors.reference, 0.05)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    made.kl_coef = 0.3
    advantages, returns, metrics = estimate(rollout, made.kl_coef, made.config)
    assert metrics["reward"] == pytest.approx(rollout.scores.mean().item(), abs=1e-5)
    (loss, found), _ = ppo.losses(made, rollout, advantages, returns)
    (without, _), _ = ppo.losses(plain, rollout, advantages, returns)
    log_ratio = (rollout.logprobs - rollout.reference_logprobs)[rollout.mask.bool()]
    kl = log_ratio**2 / 2 if estimator == "k2" else torch.exp(-log_ratio) - 1 + log_ratio
    assert found["kl_loss"] == pytest.approx(kl.sum().item(), rel=1e-3) and found["kl_loss"] > 0.01
    assert (loss - without).item() == pytest.approx(0.3 * kl.sum().item(), rel=1e-2)


def test_a_rollout_takes_the_next_prompts_each_several_times():
    prompts = [[i] for i in range(5)]
    first, second = (rollouts.batch_of(prompts, number, 6, 2) for number in (0, 1))
    assert first == [[0], [0], [1], [1], [2], [2]] and second == [[3], [3], [4], [4], [0], [0]]


# Rewards by rule


def test_a_rule_gives_the_score_and_sees_the_prompt_the_reply_and_the_answer(tmp_path):
    def rule(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [float(len(text)) for text in completions]

    seen, made = [], make_ppo(tmp_path, 5, "ppo.missing_end_penalty=null")
    made.reward = rule
    rollout = ppo.roll_out(made, PROMPTS, 0)
    kept = [row[mask.bool()].tolist() for row, mask in zip(rollout.reply, rollout.mask, strict=True)]
    replies = [chat.reply_text(tiny_tokenizer(), ids) for ids in kept]
    ids = {"prompt_ids": [p.ids for p in PROMPTS], "completion_ids": kept}
    assert seen == [([p.messages for p in PROMPTS], replies, {"answer": [p.answer for p in PROMPTS], **ids})]
    assert rollout.scores.tolist() == [len(text) for text in replies]


def test_a_rule_that_does_not_apply_is_refused(tmp_path):
    made = make_ppo(tmp_path, 5, "ppo.reward.function=mod:rule")
    made.reward = lambda completions, **_: [None] * len(completions)
    with pytest.raises(UserError, match=r"^mod:rule: gives no score \(None\) to row \d+, "):
        ppo.roll_out(made, PROMPTS, 0)


def test_without_a_reward_model_the_critic_starts_from_the_sft_model_at_zero(tmp_path):
    job = make_job("ppo", tmp_path, "reward@ppo.reward=length")
    job.inputs["sft"] = write_model(tiny_policy(), tmp_path / "sft")
    made = ppo.load(job)
    trunk = flat(tiny_policy().base_model)
    assert torch.equal(flat(made.actors.critic.base_model), trunk)
    rollout = ppo.roll_out(made, PROMPTS[:4], 0)
    assert not rollout.values.any() and (rollout.scores <= 1).all()
