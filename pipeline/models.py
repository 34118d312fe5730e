"""Models: made from scratch, loaded from folders, and saved with their tokenizer."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from pipeline import checkpoints, gguf_checkpoint
from pipeline.errors import UserError


def from_scratch(model: DictConfig, tokenizer: Any, seed: int) -> nn.Module:
    """A new causal language model, fp32, of the shape that the config group `model` gives.

    Output projections of blocks and the output layer start at zero, so that the model starts as the uniform
    distribution and blocks as the identity (nanochat's recipe).
    """
    shape = {key: model[key] for key in SHAPE if model[key] is not None}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    try:
        config = AutoConfig.for_model(model.model_type)
    except ValueError as error:
        raise UserError(f"model.model_type={model.model_type}: not an architecture of this transformers") from error
    for key in shape:
        if not hasattr(config, key):
            raise UserError(f"model.{key}: {model.model_type} has no such setting; leave it null")
    config = AutoConfig.for_model(model.model_type, **shape, **ids, vocab_size=len(tokenizer), dtype="float32")
    torch.manual_seed(seed)
    created = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    for name, parameter in created.named_parameters():
        output_layer = name == "lm_head.weight" and not config.tie_word_embeddings
        if output_layer or name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
            nn.init.zeros_(parameter)
    return created


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def check_checkpoint(model: DictConfig) -> bool:
    """Whether the checkpoint of `model=hf` needs code of its own; raises `UserError` where it cannot be taken.

    Reads no weights.
    """
    if model.gguf_file:
        gguf_checkpoint.check(model)
        return False
    name = f"model.checkpoint={model.checkpoint}"
    return checkpoints.check(model.checkpoint, name, model.revision, model.trust_remote_code)


def from_checkpoint(model: DictConfig, tokenizer: Any) -> nn.Module:
    """The checkpoint of `model=hf`, with rows for the tokens that the tokenizer stage added."""
    if model.gguf_file:
        loaded = gguf_checkpoint.load(model)
    else:
        options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
        loaded = checkpoints.load_causal(model.checkpoint, f"model.checkpoint={model.checkpoint}", **options)
    add_rows(loaded, max(tokenizer.get_vocab().values()) + 1)
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.eos_token_id = tokenizer.eos_token_id
    try:
        loaded.generation_config.validate(strict=True)
    except ValueError:  # settings that do not go together, with which transformers loads a model and does not save it
        loaded.generation_config = GenerationConfig.from_model_config(loaded.config)
    return loaded


@torch.no_grad()
def add_rows(model: nn.Module, rows: int) -> None:
    """Give the embeddings and the output layer at least `rows` rows; new ones are the mean of the others.

    So nothing is drawn, and a new token's logit is no larger than others' (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models").
    """
    before = model.get_input_embeddings().num_embeddings
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in layer.parameters():  # weight [V, D], and a bias [V] where there is one
            values[before:] = values[:before].mean(0)


def load_policy(folder: Path, device: str = "cpu") -> nn.Module:
    """The causal language model of an artifact, fp32, in evaluation mode, safetensors only.

    On the device "meta" it has shapes and no weights, here and in the functions below.
    """
    return _loaded(AutoModelForCausalLM, folder, device)


def load_reward_model(folder: Path, device: str = "cpu") -> nn.Module:
    """The reward model of an artifact: one score per sequence, fp32, in evaluation mode, safetensors only."""
    return _loaded(AutoModelForSequenceClassification, folder, device)


def new_critic(folder: Path, device: str = "cpu") -> nn.Module:
    """A critic on the trunk of a causal language model, fp32, in evaluation mode: its value of every text is 0."""
    model = with_new_head(folder, device)
    nn.init.zeros_(model.score.weight)
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    return model


def with_new_head(folder: Path, device: str = "cpu") -> nn.Module:
    """The trunk of a causal language model with a new score in place of its output layer, fp32, evaluation mode."""
    return _loaded(AutoModelForSequenceClassification, folder, device, new_head=True, num_labels=1)


def _loaded(kind: Any, folder: Path, device: str, new_head: bool = False, **options: Any) -> nn.Module:
    name = f"{folder}"
    if device == "meta":
        with checkpoints.loading(name):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
            with torch.device("meta"):
                return kind.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    return checkpoints.load(kind, folder, name, new_head, dtype=torch.float32, **options).to(device).eval()


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model folder that transformers loads by itself: safetensors, tokenizer and chat template."""
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def parameter_count(model: nn.Module) -> int:
    """Parameters that take part in matrix products: all but the input embeddings, unless those are the output's too."""
    total = sum(p.numel() for p in model.parameters())
    tied = getattr(model.config, "tie_word_embeddings", False)
    return total if tied else total - model.get_input_embeddings().weight.numel()
