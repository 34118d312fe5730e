"""What `import threefold` offers to programs and notebooks, on the smoke run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import documented

import threefold
from threefold.config.names import keys
from threefold.fileio import read_json

DOC = (Path(__file__).parents[2] / "docs" / "python.md").read_text()


@pytest.fixture(scope="module")
def run(smoke):
    return threefold.open_run(smoke / "smoke")


def test_a_composed_configuration_is_checked_and_read_only():
    config = threefold.compose("experiment=smoke", "ppo.kl_coef=0.2")
    assert config.ppo.kl_coef == 0.2 and config.run == "smoke"
    with pytest.raises(threefold.UserError, match=r"ppo.kl_cof is not a configuration key \(nearest: ppo.kl_coef\)"):
        threefold.compose("ppo.kl_cof=0.2")
    with pytest.raises(Exception, match="read-only"):
        config.ppo.kl_coef = 0.3


def test_what_is_fresh_is_not_made_again(smoke):
    run = threefold.make("experiment=smoke", "tracker=none", f"runs={smoke}")
    assert run.name == "smoke" and run.stages[0] == "tokenizer" and run.stages[-1] == "evaluate"
    states = threefold.status("experiment=smoke", f"runs={smoke}")
    assert set(states.state[states.stage != "frontier"]) == {"fresh"}


def test_metrics_and_steps_are_tables(run):
    metrics, steps = run.metrics(), run.steps("ppo")
    of_ppo = metrics[metrics.stage == "ppo"].set_index("metric").value
    assert of_ppo["kl"] == read_json(run.folder / "ppo" / "metrics.json")["kl"]
    assert len(steps) > 1 and set(steps.columns) - {"step"} == documented("ppo steps")
    assert run.config("ppo").ppo.kl_coef == steps.kl_coef[0]


def test_the_same_seed_samples_the_same_replies(run):
    prompts = ["Hello there", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are you?"}]]
    first = run.sample("ppo", prompts, count=3, max_new_tokens=8)
    assert [len(replies) for replies in first] == [3, 3]
    assert run.sample("ppo", prompts, count=3, max_new_tokens=8) == first
    assert run.sample("ppo", prompts, count=3, max_new_tokens=8, seed=2) != first
    with pytest.raises(threefold.UserError, match="sample: has no setting top_p; there are temperature"):
        run.sample("ppo", prompts, top_p=0.9)


def test_models_and_tokenizers_are_those_of_their_stage(run):
    assert run.model("sft").config.vocab_size >= len(run.tokenizer("sft"))
    assert run.model("reward").config.num_labels == 1


def test_what_is_not_there_is_said(run, tmp_path):
    with pytest.raises(threefold.UserError, match="has no finished stage frontier; finished: tokenizer, pretrain"):
        run.steps("frontier")
    with pytest.raises(
        threefold.UserError, match="has no finished stage; name the folder of a run, for example runs/demo"
    ):
        threefold.open_run(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'mak'"):
        threefold.mak  # noqa: B018


@pytest.mark.slow
def test_the_documented_program_runs(smoke, tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    program = program.replace('"run=tiny"', f'"run=smoke", "tracker=none", "runs={smoke}"')
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kl" in done.stdout


def test_editors_know_every_key():
    assert {"ppo.kl_coef", "data.replies.path", "run"} <= set(keys())
