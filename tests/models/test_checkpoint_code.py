"""Code that a checkpoint or an artifact brings along: never run unasked, and nothing is read from standard input."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import DATE, edit, hf, refused, settings, take
from helpers import composed, tiny_policy, tiny_tokenizer, write_model
from peft import LoraConfig, get_peft_model

from threefold import chain
from threefold.errors import UserError
from threefold.evaluation import judge_model
from threefold.models import chat, loading
from threefold.stages import tokenizer as tokenizer_stage

IDS = torch.tensor([[9, 30, 77, 120, 200]])


@pytest.fixture
def folder(tmp_path):
    return write_model(tiny_policy("llama"), tmp_path / "checkpoint")


CODE = """
import pathlib
pathlib.Path({ran!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class PlantedConfig(LlamaConfig):
    model_type = {kind!r}
class PlantedModel(LlamaForCausalLM):
    config_class = PlantedConfig
class PlantedTokenizer:
    pass
def generate(*_):
    pass
"""


def plant(folder, kind="planted"):
    """Code in the folder that writes `ran` when it runs."""
    (folder / "planted.py").write_text(CODE.format(ran=str(folder / "ran"), kind=kind))
    code = {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"}
    edit(folder, model_type=kind, auto_map=code)
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "planted.py", folder / "custom_generate/generate.py")


def test_code_of_a_checkpoint_or_an_artifact_does_not_run_and_nothing_is_asked(folder, monkeypatch):
    plant(folder)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked on standard input"))
    refused("needs code of its own", take, folder)
    for load in (loading.load_policy, loading.load_reward_model, loading.new_critic, loading.with_new_head):
        refused("needs code of its own", load, folder)
    refused("needs code of its own", loading.load_policy, folder, "meta")
    judge = composed(f"evaluate.judge_model.path={folder}").evaluate.judge_model
    refused("needs code of its own", judge_model.check, judge, DATE)
    assert not (folder / "ran").exists()


def test_code_of_a_tokenizer_does_not_run(folder, monkeypatch):
    plant(folder, kind="llama")
    file, text = folder / "tokenizer_config.json", "The weather is nice, thank you"
    planted = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["planted.PlantedTokenizer", None]}}
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked on standard input"))
    file.write_text(json.dumps(planted))  # beside a class that transformers has
    taken = tokenizer_stage.from_checkpoint(settings(folder), DATE)
    assert taken(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    file.write_text(json.dumps(planted | {"tokenizer_class": "PlantedTokenizer"}))
    refused("its tokenizer: needs code of its own", take, folder)
    refused("its tokenizer: needs code of its own", chat.load_tokenizer, folder)
    assert not (folder / "ran").exists()


def test_code_beside_an_architecture_that_transformers_has_is_passed_over(folder):
    expected = loading.load_policy(folder)
    plant(folder, kind="llama")
    taken = take(folder)
    assert torch.equal(taken(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert torch.equal(loading.load_policy(folder)(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert not (folder / "ran").exists()


def test_code_that_was_asked_for_runs_for_pretrain_and_is_refused_at_the_start_for_more(folder):
    plant(folder)
    taken = take(folder, "model.trust_remote_code=true")
    assert type(taken).__name__ == "PlantedModel" and (folder / "ran").exists()
    (folder / "ran").unlink()
    config = hf(folder, "model.trust_remote_code=true")
    with pytest.raises(UserError, match="stages after pretrain run none; set target=pretrain"):
        chain.check(config, chain.plan(config, ["tokenizer", "pretrain", "sft"]))
    assert not (folder / "ran").exists()
    chain.check(config, chain.plan(config, ["tokenizer", "pretrain"]))


def test_code_of_an_adapters_base_runs_where_it_was_asked_for(folder, tmp_path):
    adapted = get_peft_model(loading.load_policy(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    plant(folder)
    refused("needs code of its own", take, tmp_path / "adapter")
    assert not (folder / "ran").exists()
    taken = take(tmp_path / "adapter", "model.trust_remote_code=true")
    assert type(taken).__name__ == "PlantedModel" and (folder / "ran").exists()


def test_the_command_ends_with_one_line_and_status_2_before_any_stage(folder, tmp_path):
    plant(folder)
    line = ["run", "target=sft", "experiment=smoke", "tracker=none", "model=hf", f"model.checkpoint={folder}"]
    done = subprocess.run([sys.executable, "-m", "threefold", *line], input="y\ny\n", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs code of its own" in done.stderr
    assert not (folder / "ran").exists() and not list(tmp_path.glob("runs/artifacts/*.work"))


@pytest.mark.slow
def test_chat_does_not_run_code_planted_in_an_artifact(folder, tmp_path):
    artifact = tmp_path / "runs/smoke/ppo"
    shutil.copytree(folder, artifact)
    (artifact / "manifest.json").write_text("{}")
    plant(artifact)
    line = ["chat", "experiment=smoke", f"runs={tmp_path}/runs", "chat.model=ppo"]
    done = subprocess.run(
        [sys.executable, "-m", "threefold", *line], input="y\ny\nhi\n", capture_output=True, text=True
    )
    assert done.returncode == 2 and not (artifact / "ran").exists() and not done.stdout
    assert done.stderr.count("\n") == 1 and "needs code of its own" in done.stderr


def test_every_call_that_loads_says_whether_code_may_run():
    """Left out, transformers asks on standard input."""
    root = Path(__file__).parents[2]
    for file in [f for part in ("pipeline", "stages", "rewards") for f in (root / part).rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            loads = getattr(call.func, "attr", "") in ("from_pretrained", "from_config")
            if loads and getattr(call.func.value, "id", "").startswith("Auto"):
                given = {keyword.arg for keyword in call.keywords}  # None stands for **options
                assert given & {"trust_remote_code", None}, f"{file}:{call.lineno}"
