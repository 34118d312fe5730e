"""PPO's estimators and losses against NumPy, scalar Python and closed forms."""

import math

import numpy as np
import pytest
import torch

from threefold.ppo import advantages as estimators

LENGTHS = [7, 4, 1]


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.tensor([[1.0] * n + [0.0] * (7 - n) for n in LENGTHS])


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(mask, gamma, lam):
    rewards, values = drawn((3, 7), 0) * mask, drawn((3, 7), 1)
    advantages, returns = estimators.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(LENGTHS):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** i * delta[t + i] for i in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)


def test_gae_without_discount_is_return_minus_value(mask):
    rewards, values = drawn((3, 7), 0) * mask, drawn((3, 7), 1)
    advantages, returns = estimators.gae(rewards, values, mask, 1.0, 1.0)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            to_go = sum(rewards[row, t:length].tolist())
            assert returns[row, t].item() == pytest.approx(to_go, abs=1e-5)
            assert advantages[row, t].item() == pytest.approx(to_go - values[row, t].item(), abs=1e-5)


def test_gae_ignores_padding(mask):
    rewards, values = drawn((3, 7), 0) * mask, drawn((3, 7), 1) * mask
    clean = estimators.gae(rewards, values, mask, 1.0, 0.95)
    dirty = estimators.gae(rewards + 1e6 * (1 - mask), values - 1e6 * (1 - mask), mask, 1.0, 0.95)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a * (1 - mask), torch.zeros(3, 7))


def test_whiten_is_numpys_on_real_tokens(mask):
    values = drawn((3, 7), 2) * 3 + 5
    chosen = mask.bool().numpy()
    real = values.numpy()[chosen]
    expected = (real - real.mean()) / real.std(ddof=1)
    whitened, kept = estimators.whiten(values, mask), estimators.whiten(values, mask, shift_mean=False)
    np.testing.assert_allclose(whitened.numpy()[chosen], expected, atol=1e-5)
    np.testing.assert_allclose(kept.numpy()[chosen], expected + real.mean(), atol=1e-5)
    for result in (whitened, kept):
        assert torch.equal(result * (1 - mask), torch.zeros(3, 7))


def test_whiten_does_not_look_at_padding(mask):
    values = drawn((3, 7), 2)
    assert torch.equal(estimators.whiten(values, mask), estimators.whiten(values + 1e4 * (1 - mask), mask))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), torch.tensor([0.25, 0.3, 0.1, 0.05, 0.3])
    exact = (p * (p / q).log()).sum().item()
    tokens = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = estimators.kl_per_token(p.log()[tokens], q.log()[tokens], estimator)
    error = estimate.std().item() / math.sqrt(len(tokens))
    assert error < 0.01 * exact
    assert abs(estimate.mean().item() - exact) < 4 * error


def test_k3_is_never_negative_where_k1_is():
    logprobs, reference = drawn((1000,), 3), drawn((1000,), 4)
    assert (estimators.kl_per_token(logprobs, reference, "k1") < 0).any()
    assert (estimators.kl_per_token(logprobs, reference, "k3") >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_of_equal_policies_is_zero(estimator):
    logprobs = drawn((3, 7), 3)
    assert torch.equal(estimators.kl_per_token(logprobs, logprobs, estimator), torch.zeros(3, 7))


def test_score_counts_on_the_last_real_token(mask):
    kl, scores = drawn((3, 7), 5), torch.tensor([1.0, -2.0, 3.0])
    rewards = estimators.token_rewards(scores, kl, 0.1, mask)
    for row, length in enumerate(LENGTHS):
        expected = [-0.1 * kl[row, t].item() for t in range(length)] + [0.0] * (7 - length)
        expected[length - 1] += scores[row].item()
        assert rewards[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_gradients_of_kl_estimators_used_as_losses():
    """The mean gradient of k2 at the policy's own tokens is that of the exact KL, k3's that of KL(q, p), k1's zero."""
    logits, q = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True), torch.tensor([0.1, 0.4, 0.3, 0.2])
    p = logits.softmax(-1)
    (exact,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((q * (q / p).log()).sum(), logits, retain_graph=True)
    for name, wanted in (("k2", exact), ("k3", reverse), ("k1", torch.zeros(4))):
        each = estimators.kl_per_token(p.log(), q.log(), name)
        (found,) = torch.autograd.grad((p.detach() * each).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(estimators.kl_per_token(p.log(), q.log(), "k2"), (p / q).log() ** 2 / 2)


def test_returns_to_go_are_sums_of_what_follows(mask):
    rewards = drawn((3, 7), 5) * mask
    found = estimators.returns_to_go(rewards, mask, 0.9)
    for row, length in enumerate(LENGTHS):
        for t in range(7):
            expected = sum(0.9 ** (i - t) * rewards[row, i].item() for i in range(t, length))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = [1.0, 2.0, 6.0, 0.5, 0.5, -1.0]
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 0.5 + 0.25, 0.5 + 0.25, -1 - 0.5]
    assert estimators.rloo(torch.tensor(rewards), 3).tolist() == pytest.approx(expected)


def test_grpo_is_numpys_standard_score_in_each_group():
    groups = np.random.default_rng(0).normal(size=(5, 4))
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(estimators.grpo(torch.tensor(groups.ravel()), 4), expected.ravel(), rtol=1e-6)
    assert estimators.grpo(torch.ones(4), 4).tolist() == [0.0] * 4


def test_value_loss_without_a_clip_range_is_half_the_squared_error():
    values, old, returns = drawn((3, 7), 9), drawn((3, 7), 10), drawn((3, 7), 11)
    losses, clipped = estimators.value_losses(values, old, returns, None)
    torch.testing.assert_close(losses, (values - returns).square() / 2)
    assert not clipped.any()


def test_policy_loss_is_ppos_clipped_objective():
    new, old, advantages = drawn((3, 7), 6) * 0.4, drawn((3, 7), 7) * 0.4, drawn((3, 7), 8)
    losses, clipped = estimators.policy_losses(new, old, advantages, 0.2)
    for i in np.ndindex(3, 7):
        ratio, advantage = math.exp(new[i] - old[i]), advantages[i].item()
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        assert losses[i].item() == pytest.approx(-objective, abs=1e-5)
        took_effect = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        assert bool(clipped[i]) == took_effect
    assert 0 < clipped.mean() < 1


def test_policy_gradient_vanishes_exactly_where_clipping_took_effect():
    new, old, advantages = drawn((3, 7), 6) * 0.4, drawn((3, 7), 7) * 0.4, drawn((3, 7), 8)
    new.requires_grad_()
    losses, clipped = estimators.policy_losses(new, old, advantages, 0.2)
    losses.sum().backward()
    assert torch.equal(new.grad == 0, clipped.bool())


def test_value_loss_is_the_worse_of_free_and_clipped():
    values, old, returns = drawn((3, 7), 9), drawn((3, 7), 10), drawn((3, 7), 11)
    losses, clipped = estimators.value_losses(values, old, returns, 0.2)
    for i in np.ndindex(3, 7):
        v, o, r = values[i].item(), old[i].item(), returns[i].item()
        near = min(max(v, o - 0.2), o + 0.2)
        assert losses[i].item() == pytest.approx(0.5 * max((v - r) ** 2, (near - r) ** 2), abs=1e-5)
        assert bool(clipped[i]) == ((near - r) ** 2 > (v - r) ** 2)
    assert 0 < clipped.mean() < 1
    values = old + 0.19 * (values - old).sign()  # rounding is no clipping
    assert not estimators.value_losses(values, old, returns, 0.2)[1].any()


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)])
def test_adaptive_kl_coefficient_limits_its_error(kl, error):
    found = estimators.adapted_kl_coef(0.05, kl, target=6.0, episodes=128, horizon=1000)
    assert found == pytest.approx(0.05 * (1 + error * 128 / 1000))


def test_explained_variance_is_numpys_on_real_tokens(mask):
    values, returns = drawn((3, 7), 12), drawn((3, 7), 13)
    v, r = (x.numpy()[mask.bool().numpy()] for x in (values, returns))
    expected = 1 - np.var(r - v, ddof=1) / np.var(r, ddof=1)
    assert estimators.explained_variance(values, returns, mask).item() == pytest.approx(expected, abs=1e-5)


def test_explained_variance_of_a_perfect_and_of_a_constant_critic(mask):
    returns = drawn((3, 7), 13)
    dirty = returns + 100 * (1 - mask)
    assert estimators.explained_variance(dirty, returns, mask).item() == pytest.approx(1)
    assert estimators.explained_variance(torch.full((3, 7), 2.0), returns, mask).item() == pytest.approx(0, abs=1e-5)
