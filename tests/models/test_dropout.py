"""Dropout is off in every model of the chain, while it trains as well, and the saved configuration says so."""

import pytest
import torch
from helpers import composed, make_job, random_ids, tiny_config, tiny_tokenizer, write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from threefold.config.compose import compose
from threefold.models import loading
from threefold.stages import reward

PAD = tiny_tokenizer().pad_token_id
RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = [
    *(f"model.{key}={value}" for key, value in SHAPE.items()),
    *(f"model.{key}=null" for key in ("intermediate_size", "num_key_value_heads", "head_dim")),
]


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 with its usual rates of 0.1, as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    assert {getattr(model.config, rate) for rate in RATES} == {0.1}
    return write_model(model, tmp_path / "sft")


def fresh(folder):
    return loading.from_scratch(composed("model=gpt2", *SMALL).model, tiny_tokenizer(), 0)


def from_checkpoint(folder):
    config = compose(["experiment=smoke", "model=hf", f"model.checkpoint={folder}"])
    return loading.from_checkpoint(config.model, tiny_tokenizer())


def policy(folder):
    return loading.load_policy(folder)


def score_head(folder):
    job = make_job("reward", folder.parent / "job")
    job.inputs = {"sft": folder}
    return reward.with_score_head(job, tiny_tokenizer(), 0)


def loss(model, rows: list[list[int]]) -> float:
    """The summed loss of rows of one length, in the mode in which trainers call a model."""
    ids = torch.tensor(rows)
    if hasattr(model, "score"):
        labels = torch.ones(len(rows), 1)
        model.config.problem_type = "multi_label_classification"  # as the trainer of unpaired replies sets it
        return model.train()(input_ids=ids, labels=labels).loss.item() * len(rows)
    return model.train()(input_ids=ids, labels=ids).loss.item() * len(rows)


@pytest.mark.parametrize("load", [fresh, from_checkpoint, policy, loading.new_critic, score_head])
def test_a_loss_in_training_is_the_same_each_time_and_however_the_batch_is_split(load, folder):
    model, rows = load(folder), random_ids([9, 9, 9, 9])
    if load in (fresh, loading.new_critic):  # their last layers are 0, which hides what comes before
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    whole = loss(model, rows)
    assert [loss(model, rows), loss(model, rows)] == [whole, whole]
    assert loss(model, rows[:1]) + loss(model, rows[1:]) == pytest.approx(whole, rel=1e-5)
    loading.save(model, tiny_tokenizer(), folder.parent / "saved")
    saved = AutoConfig.from_pretrained(folder.parent / "saved")
    assert {getattr(saved, rate) for rate in RATES} == {0.0}


NAMES = {
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
    "bloom": ("hidden_dropout", "attention_dropout"),
    "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
    "falcon": ("hidden_dropout", "attention_dropout"),
    "mixtral": ("attention_dropout",),
}


@pytest.mark.parametrize("model_type", NAMES)
def test_every_name_that_an_architecture_has_for_it_is_0(model_type):
    from architectures import SHAPES

    options = SHAPES[model_type] | dict.fromkeys(NAMES[model_type], 0.5) | {"vocab_size": 32, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    loading.without_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_reward_model_is_loaded_without_it(folder, tmp_path):
    torch.manual_seed(0)
    config = tiny_config("gpt2", num_labels=1, score_mean=0.0, score_std=1.0)
    loading.save(AutoModelForSequenceClassification.from_config(config), tiny_tokenizer(), tmp_path / "reward")
    loaded = loading.load_reward_model(tmp_path / "reward").train()
    ids = torch.tensor(random_ids([9]))
    assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
