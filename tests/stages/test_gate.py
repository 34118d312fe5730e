"""PPO refuses a reward model that fails its check-up, before any of its models is loaded."""

import shutil

import pytest

from threefold import chain
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import read_json


def asked(smoke, *overrides: str):
    """PPO on the smoke run's reward model, which was trained on the labels of `length`."""
    base = ["experiment=smoke", f"runs={smoke}", "run=gated", "tracker=none", "dependents=false", "target=ppo"]
    return compose([*base, "ppo.episodes=16", *overrides])


def test_a_model_trained_on_length_is_stopped_with_check_figure_and_way_out(smoke):
    with pytest.raises(UserError) as refused:
        chain.bring_up_to_date(asked(smoke, "ppo.ignore_gate=false"))
    message = str(refused.value)
    assert message.startswith("ppo: the reward model fails its check-up: ") and "\n" not in message
    assert "interval of accuracy above that of length is" in message and "(reward.gate.min_over_length=0)" in message
    assert "ppo.ignore_gate=true" in message
    for refused_attempt in (smoke / "artifacts").glob("ppo-*.work"):
        shutil.rmtree(refused_attempt)  # the models of the smoke run serve other tests as well


def test_it_passes_where_no_limit_is_broken_and_goes_on_where_told_to(smoke):
    limits = ["min_accuracy", "min_over_length", "max_length_correlation", "max_calibration_error"]
    lifted = [f"reward.gate.{limit}=null" for limit in limits]
    probes = "reward.gate.probes={empty:1,whitespace:1,prompt_echoed:1}"
    reward = read_json(smoke / "smoke" / "reward" / "manifest.json")["fingerprint"]
    for overrides in (["ppo.ignore_gate=false", *lifted, probes], ["ppo.ignore_gate=true"]):
        chain.bring_up_to_date(asked(smoke, *overrides))
        assert read_json(smoke / "gated" / "ppo" / "metrics.json")["episodes"] == 16
        assert read_json(smoke / "gated" / "ppo" / "manifest.json")["parents"]["reward"] == reward  # trained once
