"""A small chain without a reward model: PPO with and without a critic on generated problems, and its report."""

import pytest

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.data import reading
from threefold.fileio import read_json, read_lines

SMALL = [
    "experiment=arithmetic",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "pretrain.tokens=8192",
    "sft.examples=256",
    "sft.epochs=1",
    "ppo.episodes=128",
    "ppo.batch_size=64",
    "ppo.min_score_std=null",
    "evaluate.prompts=32",
    "runtime.threads=1",
]
GRPO = ["run=grpo", "ppo.advantage=grpo", "ppo.samples_per_prompt=4"]
CHAIN = ["tokenizer", "pretrain", "sft", "ppo", "evaluate"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The `runs` folder after both runs."""
    runs = tmp_path_factory.mktemp("arithmetic") / "runs"
    cli.main(["run", *SMALL, f"runs={runs}"])
    cli.main(["run", *SMALL, *GRPO, f"runs={runs}"])
    return runs


def test_only_what_the_evaluation_needs_is_made(runs):
    made = {folder.name.rpartition("-")[0] for folder in runs.glob("artifacts/*-*") if folder.is_dir()}
    assert made == set(CHAIN)
    assert (runs / "arithmetic/ppo/critic").is_dir() and not (runs / "grpo/ppo/critic").exists()


def test_status_lists_the_stages_of_this_chain_as_fresh(runs):
    rows = chain.status(compose([*SMALL, f"runs={runs}"]))
    assert [(row["stage"], row["state"]) for row in rows] == [(name, "fresh") for name in CHAIN]
    assert rows[-1]["metric"].startswith("ppo_gold_mean ")


@pytest.mark.parametrize("run", ["arithmetic", "grpo"])
def test_scores_and_the_evaluation_are_shares_of_exact_matches(run, runs):
    for step in read_lines(runs / run / "ppo/log.jsonl"):
        assert 0 <= step["score"] <= 1 and step["score"] * 64 == pytest.approx(round(step["score"] * 64), abs=1e-4)
    result = read_json(runs / run / "evaluate/metrics.json")
    assert result["judge"] == "exact_match" and set(result["models"]) == {"base", "sft", "ppo"}
    samples = read_lines(runs / run / "evaluate/samples.jsonl")
    held_out = {row["key"] for row in reading.load(compose(SMALL).data.replies, "test").rows}
    assert {row["prompt"][0]["content"] for row in samples} <= held_out
    for name, model in result["models"].items():
        right = [answer_of(row) == row[name]["reply"] for row in samples]
        assert model["gold_mean"] == pytest.approx(sum(right) / 32)
        assert 0 <= model["greedy_gold_ci95"][0] <= model["greedy_gold_mean"] <= model["greedy_gold_ci95"][1]
        assert "proxy_mean" not in model


def answer_of(row):
    first, sign, second = row["prompt"][0]["content"].partition("+")
    if not sign:
        first, sign, second = row["prompt"][0]["content"].partition("-")
    return str(int(first) + int(f"{sign}{second}"))


def test_the_report_shows_what_there_is(runs, capsys):
    cli.main(["report", *SMALL, f"runs={runs}"])
    shown, page = capsys.readouterr().out, (runs / "arithmetic/report.html").read_text()
    for stage in ("comparisons", "reward", "dpo"):
        assert f'<th scope="row">{stage}</th>' not in page
    assert "comparisons that the reward model" not in page and 'data-model="human"' not in page
    for heading in ("gold judge: exact_match", "exact_match, greedy", "second judge: length"):
        assert heading in shown and f'<th scope="col" class="number">{heading}</th>' in page
    assert "reward model" not in shown.split("gold judge")[1]
