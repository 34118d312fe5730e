"""Models: made from scratch, loaded from folders, and saved with their tokenizer."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

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
    created = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in created.named_parameters():
        output_layer = name == "lm_head.weight" and not config.tie_word_embeddings
        if output_layer or name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
            nn.init.zeros_(parameter)
    return created


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def from_checkpoint(model: DictConfig, tokenizer: Any) -> nn.Module:
    """The checkpoint of `model=hf`, with rows for the tokens that the tokenizer stage added."""
    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    if model.gguf_file:
        options["gguf_file"] = model.gguf_file
    else:
        options["use_safetensors"] = True
    loaded = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=torch.float32, **options)
    if len(tokenizer) > loaded.get_input_embeddings().num_embeddings:
        loaded.resize_token_embeddings(len(tokenizer))
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.eos_token_id = tokenizer.eos_token_id
    return loaded


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
    model = _loaded(AutoModelForSequenceClassification, folder, device, num_labels=1)
    nn.init.zeros_(model.score.weight)
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    return model


def _loaded(kind: Any, folder: Path, device: str, **options: Any) -> nn.Module:
    if device == "meta":
        with torch.device("meta"):
            return kind.from_config(AutoConfig.from_pretrained(folder, **options), dtype=torch.float32).eval()
    return kind.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options).to(device).eval()


def save(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model folder that transformers loads by itself: safetensors, tokenizer and chat template.

    Raises `UserError` where a weight is not a finite number.
    """
    require_finite(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def require_finite(model: nn.Module) -> None:
    """Raise `UserError` naming the first parameter that is not finite throughout."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name}: has weights that are no finite numbers; lower the stage's learning rate")


def parameter_count(model: nn.Module) -> int:
    """Parameters that take part in matrix products: all but the input embeddings, unless those are the output's too."""
    total = sum(p.numel() for p in model.parameters())
    tied = getattr(model.config, "tie_word_embeddings", False)
    return total if tied else total - model.get_input_embeddings().weight.numel()
