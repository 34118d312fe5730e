"""Guards of PPO: what trips them, and what becomes of the policy then."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import PROMPTS, flat, make_ppo

from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.ppo import rollouts
from threefold.ppo.advantages import estimate
from threefold.sampling import sampler
from threefold.stages import ppo
from threefold.training import guards

HEALTHY = {"kl": 3.0, "policy_loss": -0.1, "entropy": 2.0, "score_std": 1.0}


@pytest.mark.parametrize(
    ("key", "limit", "metric", "ill"),
    [
        ("max_kl", 5.0, "kl", 5.1),
        ("max_loss", 10.0, "policy_loss", -11.0),
        ("min_entropy", 0.5, "entropy", 0.4),
        ("min_score_std", 0.1, "score_std", 0.0),
    ],
)
def test_each_guard_trips_beyond_its_limit_only(key, limit, metric, ill):
    config = make_config(f"ppo.{key}={limit}")
    assert guards.tripped(HEALTHY, config) is None
    assert guards.tripped(HEALTHY | {metric: math.copysign(limit, ill)}, config) is None
    reason = guards.tripped(HEALTHY | {metric: ill}, config)
    assert reason.startswith(metric) and reason.endswith(f"ppo.{key}={limit}")
    assert guards.tripped(HEALTHY | {metric: ill}, make_config(f"ppo.{key}=null")) is None
    others = {name: value for name, value in HEALTHY.items() if name != metric}
    assert guards.tripped(others, config) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_trips(value):
    assert guards.tripped(HEALTHY | {"grad_norm": value}, make_config()) == f"grad_norm is {value}"


def make_config(*overrides):
    return compose(["experiment=smoke", *overrides]).ppo


def failing_at(made: ppo.Ppo, rollout: int, monkeypatch) -> None:
    """Have the update of a rollout, counted from 1, end in weights and a loss that are no numbers."""
    whole = ppo.update

    def update(made, rolled, advantages, returns, number):
        metrics = whole(made, rolled, advantages, returns, number)
        if number == rollout - 1:
            next(made.actors.policy.parameters()).data.fill_(math.nan)
            metrics["policy_loss"] = math.nan
        return metrics

    monkeypatch.setattr(ppo, "update", update)


FOUR = ["ppo.episodes=48", "runtime.checkpoints=3", "ppo.learning_rate=0.001"]


def test_lost_weights_are_an_error_unless_going_back_is_asked_for(tmp_path, monkeypatch):
    made = make_ppo(tmp_path, 12, *FOUR)
    failing_at(made, 3, monkeypatch)
    with pytest.raises(UserError, match=r"policy_loss is nan at rollout 3; lower ppo\.learning_rate"):
        ppo.train(made, PROMPTS)


@pytest.mark.parametrize(("rollout", "left"), [(3, 2), (1, 0)])
def test_going_back_keeps_the_last_good_policy_and_critic(tmp_path, monkeypatch, capsys, rollout, left):
    undisturbed = make_ppo(tmp_path / "undisturbed", 12, *FOUR, f"ppo.episodes={12 * max(1, left)}")
    if left:
        monkeypatch.setattr(ppo, "set_learning_rates", lambda *_: None)  # the schedule knows the length of training
        ppo.train(undisturbed, PROMPTS)
    made = make_ppo(tmp_path / "failing", 12, *FOUR, "ppo.on_trip=rollback")
    failing_at(made, rollout, monkeypatch)
    result = ppo.train(made, PROMPTS)
    assert torch.equal(flat(made.actors.policy), flat(undisturbed.actors.policy))
    assert torch.equal(flat(made.actors.critic), flat(undisturbed.actors.critic))
    assert result["stopped"] == "policy_loss is nan" and "policy_loss" not in result
    assert (
        f"stopped at rollout {rollout}: policy_loss is nan; back to the policy of rollout {left}"
        in capsys.readouterr().out
    )


def test_going_back_from_a_kl_that_is_too_high_leaves_the_policy_that_had_it(tmp_path, capsys):
    options = ["ppo.learning_rate=0.3", "ppo.max_kl=0.5", "ppo.min_score_std=null", "runtime.checkpoints=50"]
    options += ["ppo.episodes=120", "ppo.on_trip=rollback"]
    made = make_ppo(tmp_path / "back", 12, *options)
    result = ppo.train(made, PROMPTS)
    assert result["stopped"].startswith("kl ") and result["kl"] > 0.5
    tripped, left = map(int, re.search(r"rollout (\d+): .* of rollout (\d+)", capsys.readouterr().out).groups())
    assert left == tripped - 2  # the policy of rollout tripped - 1 has the KL, and that before it passed
    undisturbed = make_ppo(tmp_path / "whole", 12, *options, "ppo.max_kl=null")
    stopped_before(undisturbed, left)
    assert torch.equal(flat(made.actors.policy), flat(undisturbed.actors.policy))


def stopped_before(made: ppo.Ppo, count: int) -> None:
    """Train for the first `count` of the run's rollouts."""
    total = made.config.episodes // made.config.batch_size
    for number in range(count):
        rollout = ppo.roll_out(made, rollouts.batch_of(PROMPTS, number, made.config.batch_size), number)
        advantages, returns, _ = estimate(rollout, made.kl_coef, made.config)
        ppo.set_learning_rates(made, 1 - number / total)
        ppo.update(made, rollout, advantages, returns, number)


def off_by(nats: float, sample):
    """A sampler that records log-probabilities which are off."""

    def sampled(*given, **options):
        return [
            replace(reply, logprobs=[logprob - nats for logprob in reply.logprobs])
            for reply in sample(*given, **options)
        ]

    return sampled


@pytest.mark.parametrize("nats", [0.05, -0.05, 3.0])
@pytest.mark.parametrize("options", [[], ["ppo.on_trip=rollback"]])
def test_a_sampler_that_is_off_ends_training_before_it_is_believed(tmp_path, monkeypatch, nats, options):
    made = make_ppo(tmp_path / "off", 12, *FOUR, *options)
    monkeypatch.setattr(sampler, "sample", off_by(nats, sampler.sample))
    message = r"^ppo: sampled and recomputed log-probabilities differ: first_ratio_error (\S+) is above "
    with pytest.raises(UserError, match=message + r"ppo\.max_first_ratio_error=0\.01; ") as caught:
        ppo.train(made, PROMPTS)
    told = float(re.match(message, str(caught.value))[1])
    assert told == pytest.approx(abs(math.expm1(nats)), rel=1e-2)
    made = make_ppo(tmp_path / "told", 12, "ppo.episodes=12", "ppo.max_first_ratio_error=null", "ppo.max_loss=null")
    assert ppo.train(made, PROMPTS)["first_ratio_error"] == pytest.approx(abs(math.expm1(nats)), rel=1e-2)


def test_an_engine_that_is_off_ends_training_although_its_probabilities_are_not_used(tmp_path):
    class Engine:
        def sample(self, policy, prompts, uniforms):
            made_here = sampler.sample(policy, prompts, made.job.config.sampling, made.tokenizer, uniforms)
            return off_by(self.nats, lambda: made_here)()

    made = make_ppo(tmp_path / "off", 12, *FOUR)
    made.engine = Engine()
    made.engine.nats = 0.3
    with pytest.raises(UserError, match=r"engine_ratio_mean 0\.35 is above ppo\.max_engine_ratio=0\.1; "):
        ppo.train(made, PROMPTS)
    made = make_ppo(tmp_path / "rounded", 12, "ppo.episodes=12")
    made.engine = Engine()
    made.engine.nats = 0.02  # as bf16 rounds
    assert ppo.train(made, PROMPTS)["engine_ratio_mean"] == pytest.approx(math.expm1(0.02), rel=1e-2)


def test_a_run_killed_in_its_first_rollout_starts_again_where_guards_go_back(tmp_path, monkeypatch):
    options = ["ppo.episodes=24", "ppo.on_trip=rollback", "ppo.min_score_std=null"]
    whole, cut = make_ppo(tmp_path / "whole", 12, *options), make_ppo(tmp_path / "cut", 12, *options)
    ppo.train(whole, PROMPTS)
    original = ppo.update
    monkeypatch.setattr(ppo, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ppo.train(cut, PROMPTS)
    monkeypatch.setattr(ppo, "update", original)
    ppo.train(cut, PROMPTS)
    assert torch.equal(flat(cut.actors.policy), flat(whole.actors.policy))
