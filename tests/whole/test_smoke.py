"""The whole chain on the smoke run: what it leaves, what runs again and why, and what other tools can load."""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from threefold import chain, cli
from threefold.chain import making
from threefold.config.compose import compose
from threefold.fileio import read_json, read_lines
from threefold.stages import STAGES

CHAIN = [stage for stage in STAGES if stage != "frontier"]  # what a run has without more being asked for


def stages_that_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran = []
    original = making.make
    monkeypatch.setattr(
        making, "make", lambda config, entry, *rest: ran.append(entry.stage) or original(config, entry, *rest)
    )
    cli.main(["run", *arguments])
    return ran


def test_every_stage_leaves_the_documented_files(smoke):
    for stage in CHAIN:
        folder = smoke / "smoke" / stage
        for name in ("manifest.json", "metrics.json", "config.yaml"):
            assert (folder / name).is_file(), (stage, name)
        metrics = read_json(folder / "metrics.json")
        assert metrics["seconds"] > 0 and metrics["peak_memory_bytes"] > 10**7
        assert (
            metrics["fingerprint"]
            == read_json(folder / "manifest.json")["fingerprint"]
            == folder.resolve().name.split("-")[1]
        )
    assert not list(smoke.glob("artifacts/*.work"))


def test_summary_has_the_promised_numbers(smoke):
    summary = read_json(smoke / "smoke" / "summary.json")
    assert summary["outdated"] == {}
    assert set(summary["pretrain"]["baselines"]) == {"1-gram", "2-gram", "3-gram", "4-gram", "bz2", "xz"}
    for key in ("reply_bits_per_byte", "reply_bits_per_byte_base", "ended_share"):
        assert key in summary["sft"]
    for key in ("accuracy", "accuracy_ci95", "accuracy_length_only", "accuracy_bag_of_words"):
        assert key in summary["reward"]
    models = summary["evaluate"]["models"]
    assert set(models) == {"human", "base", "sft", "dpo", "ppo", "best_of_4", "ppo_majority_4"}
    by_itself = {"kl", "ended_share", "reply_bits_per_byte"}
    for name, values in models.items():
        wanted = {"gold_mean", "gold_ci95", "second_judge_mean", "length", "distinct_2"}
        assert wanted | (by_itself if name in ("base", "sft", "dpo", "ppo") else set()) <= set(values)
        assert values["gold_ci95"][0] <= values["gold_mean"] <= values["gold_ci95"][1]
    assert models["sft"]["kl"] == pytest.approx(0, abs=1e-4) and models["ppo"]["kl"] > 0 and models["dpo"]["kl"] > 0


def test_ppo_begins_at_the_reference(smoke):
    first = read_lines(smoke / "smoke" / "ppo" / "log.jsonl")[0]
    assert abs(first["kl"]) < 1e-4 and 0 <= first["kl_k3"] < 1e-6 and first["first_ratio_error"] < 1e-4


def test_a_second_run_does_nothing(smoke, monkeypatch):
    started = time.perf_counter()
    assert stages_that_run(["experiment=smoke", f"runs={smoke}"], monkeypatch) == []
    assert time.perf_counter() - started < 10


@pytest.mark.slow
def test_a_changed_key_runs_its_stage_and_what_depends_on_it(smoke, monkeypatch, tmp_path):
    overrides = ["experiment=smoke", f"runs={smoke}", "run=changed"]
    stages_that_run(overrides, monkeypatch)
    changed = [*overrides, "ppo.kl_coef=0.2"]
    rows = {row["stage"]: row for row in chain.status(compose(changed))}
    assert rows["ppo"]["state"] == "stale" and rows["ppo"]["reason"] == "ppo.kl_coef 0.05 → 0.2"
    assert rows["evaluate"]["state"] == "stale" and rows["evaluate"]["reason"] == "ppo is stale"
    assert {row["state"] for stage, row in rows.items() if stage not in ("ppo", "evaluate")} == {"fresh"}
    assert stages_that_run([*changed, "target=ppo"], monkeypatch) == ["ppo", "evaluate"]
    assert read_json(smoke / "changed" / "summary.json")["outdated"] == {}


def test_model_folders_load_without_our_code(smoke):
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    auto = AutoModelForSequenceClassification if "reward" in folder else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    if "reward" in folder:
        assert model(**chat).logits.shape == (1, 1)
    else:
        assert model.generate(**chat, max_new_tokens=4).shape[0] == 1
assert not any(m.split(".")[0] == "threefold" for m in sys.modules)
"""
    folders = [smoke / "smoke" / stage for stage in ("pretrain", "sft", "dpo", "ppo", "reward")]
    command = [sys.executable, "-c", script, *(str(folder.relative_to(smoke)) for folder in folders)]
    done = subprocess.run(command, cwd=smoke, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert not list(folder.resolve().glob("**/*.bin")) and not list(folder.resolve().glob("**/*.pt"))


def test_every_stage_says_where_and_in_how_many_processes_it_runs(smoke):
    printed = (smoke.parent / "printed.txt").read_text()
    for stage in CHAIN:
        assert re.search(rf"^{stage} +1 CPU threads, fp32 · one process · \S", printed, re.MULTILINE), stage


def test_offline_wandb_runs_are_grouped_by_run(smoke):
    folders = list((smoke / "artifacts" / "wandb").glob("wandb/offline-run-*"))
    assert len(folders) >= len(CHAIN)


def test_the_report_asks_no_other_host(smoke):
    page = (smoke / "smoke" / "report.html").read_text()
    assert '<link rel="stylesheet" href="http' not in page and 'src="http' not in page
    for stage in CHAIN:
        assert f'<th scope="row">{stage}</th>' in page


def test_a_partial_run_gives_a_report(smoke, capsys):
    cli.main(["run", "experiment=smoke", f"runs={smoke}", "run=partial", "target=sft"])
    assert set(read_json(smoke / "partial" / "summary.json")) == {"run", "outdated", "tokenizer", "pretrain", "sft"}
    assert "bits per byte" in capsys.readouterr().out


def test_an_outdated_dependent_is_named_in_the_report(smoke):
    overrides = ["experiment=smoke", f"runs={smoke}", "run=outdated"]
    cli.main(["run", *overrides])
    cli.main(["run", *overrides, "target=ppo", "dependents=false", "ppo.kl_coef=0.2"])
    assert read_json(smoke / "outdated" / "summary.json")["outdated"] == {"evaluate": ["ppo"]}
    assert "evaluate was made from an earlier ppo" in (smoke / "outdated" / "report.html").read_text()


@pytest.mark.slow
def test_same_seed_same_bits(smoke, tmp_path):
    """The first three stages, made again in a fresh process with another hash seed, are equal to the bit."""
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [
        sys.executable,
        "-m",
        "threefold",
        "run",
        "experiment=smoke",
        "tracker=none",
        f"runs={tmp_path}",
        "target=sft",
    ]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in ("tokenizer/tokenizer.json", "pretrain/model.safetensors", "sft/model.safetensors"):
        assert (tmp_path / "smoke" / name).read_bytes() == (smoke / "smoke" / name).read_bytes(), name


def test_ppo_without_a_critic_and_with_kl_in_the_loss_runs(smoke):
    options = ["ppo.advantage=rloo", "ppo.samples_per_prompt=2", "ppo.kl_in=loss", "ppo.kl_estimator=k2"]
    cli.main(["run", "experiment=smoke", "tracker=none", f"runs={smoke}", "run=variant", "target=ppo", *options])
    steps = read_lines(smoke / "variant" / "ppo" / "log.jsonl")
    assert len(steps) == 4 and {"kl_loss"} == steps[-1].keys() - read_lines(smoke / "smoke/ppo/log.jsonl")[0].keys()
    assert not any("critic" in name or "value" in name for name in steps[-1])
    assert not (smoke / "variant" / "ppo" / "critic").exists()


def test_ppo_stops_at_its_kl_ceiling(smoke, capsys):
    options = ["ppo.max_kl=0.001", "ppo.learning_rate=0.01"]
    cli.main(["run", "experiment=smoke", "tracker=none", f"runs={smoke}", "run=ceiling", "target=ppo", *options])
    steps = read_lines(smoke / "ceiling" / "ppo" / "log.jsonl")
    assert 0 < len(steps) < 4 and steps[-1]["kl"] <= 0.001
    reason = read_json(smoke / "ceiling" / "ppo" / "metrics.json")["stopped"]
    assert reason.endswith("is above ppo.max_kl=0.001")
    assert f"stopped at rollout {len(steps) + 1}: {reason}; the policy stays as it is" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_of_elsewhere_goes_through_the_chain(smoke, tmp_path):
    """model=hf takes a folder that transformers loads, with its own tokenizer, and SFT trains it."""
    folder = shutil.copytree((smoke / "smoke" / "sft").resolve(), tmp_path / "checkpoint")
    for ours in ("metrics.json", "manifest.json", "log.jsonl", "config.yaml"):
        (folder / ours).unlink()
    model = ["model=hf", f"model.checkpoint={folder}", "pretrain.tokens=0"]
    cli.main(["run", "experiment=smoke", "tracker=none", f"runs={tmp_path}/runs", "target=sft", *model])
    base = tmp_path / "runs/smoke/pretrain"
    assert filecmp.cmp(base / "model.safetensors", folder / "model.safetensors", shallow=False)
    metrics = read_json(tmp_path / "runs/smoke/sft/metrics.json")
    first, again = read_json(smoke / "smoke/sft/metrics.json"), metrics["template_hash"]
    assert first["template_hash"] == again and metrics["reply_bits_per_byte"] < first["reply_bits_per_byte"] + 0.05


HH = Path(__file__).parents[3] / "shared/data/hh-rlhf"


@pytest.mark.slow
@pytest.mark.skipif(not HH.is_dir(), reason="the human comparisons are not here")
def test_human_comparisons_train_a_reward_model_and_dpo(tmp_path):
    for target in ("reward", "dpo"):
        cli.main(["run", "experiment=hh", "tracker=none", f"runs={tmp_path}", f"target={target}"])
        metrics = read_json(tmp_path / "hh" / target / "metrics.json")
        low, high = metrics["accuracy_ci95"]
        assert low < metrics["accuracy"] < high and metrics["pairs"] > 1000
    assert read_json(tmp_path / "hh/comparisons/metrics.json")["test_pairs"] == 200
