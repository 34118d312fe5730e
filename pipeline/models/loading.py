"""Models: made from scratch, loaded from folders, and saved with their tokenizer."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
)

from threefold.errors import UserError, first_line
from threefold.models import Model, chat, checkpoints


def from_scratch(model: Any, tokenizer: Any, seed: int) -> Model:
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
    return without_dropout(created)


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def check_checkpoint(model: Any) -> bool:
    """Whether the checkpoint of `model=hf` needs code of its own; raises `UserError` where it cannot be taken.

    Reads no weights.
    """
    if model.gguf_file:
        checkpoints.check_gguf(model)
        return False
    name = f"model.checkpoint={model.checkpoint}"
    return checkpoints.check(model.checkpoint, name, model.revision, model.trust_remote_code)


def from_checkpoint(model: Any, tokenizer: Any) -> Model:
    """The checkpoint of `model=hf`, with rows for the tokens that the tokenizer stage added."""
    if model.gguf_file:
        loaded = checkpoints.load_gguf(model)
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
    return without_dropout(loaded)


@torch.no_grad()
def add_rows(model: Model, rows: int) -> None:
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


def load_policy(folder: Path, device: str = "cpu") -> Model:
    """The causal language model of an artifact, fp32, in evaluation mode, safetensors only.

    On the device "meta" it has shapes and no weights, here and in the functions below.
    """
    loaded = _loaded(AutoModelForCausalLM, folder, device)
    if device != "meta":
        require_own_logits(loaded)
    return loaded


def load_reward_model(folder: Path, device: str = "cpu") -> Model:
    """The reward model of an artifact: one score per sequence, fp32, in evaluation mode, safetensors only."""
    return _loaded(AutoModelForSequenceClassification, folder, device)


def new_critic(folder: Path, device: str = "cpu") -> Model:
    """A critic on the trunk of a causal language model, fp32, in evaluation mode: its value of every text is 0."""
    model = with_new_head(folder, device)
    nn.init.zeros_(model.score.weight)
    model.config.score_mean, model.config.score_std = 0.0, 1.0
    return model


def with_new_head(folder: Path, device: str = "cpu") -> Model:
    """The trunk of a causal language model with a new score in place of its output layer, fp32, evaluation mode."""
    return _loaded(AutoModelForSequenceClassification, folder, device, new_head=True, num_labels=1)


def _loaded(kind: Any, folder: Path, device: str, new_head: bool = False, **options: Any) -> Model:
    name = f"{folder}"
    if device == "meta":
        with checkpoints.loading(name):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
            with torch.device("meta"):
                return kind.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    loaded = checkpoints.load(kind, folder, name, new_head, dtype=torch.float32, **options)
    return without_dropout(loaded).to(device).eval()


def without_dropout(model: Model) -> Model:
    """The model with every dropout rate at 0, in its layers and in its configuration, which is saved with it.

    Dropout hurts preference training and makes a loss depend on how a batch is split into passes. RWKV rescales weights
    in evaluation mode (`rescale_every`), and they would be saved like that: this is switched off, too.
    """
    rates = [model.config, *(part for part in vars(model.config).values() if isinstance(part, PreTrainedConfig))]
    for part in [*rates, *model.modules()]:
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(part, name, type(value)(0))
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
    return model


class _GivenStates:
    """Stands for the trunk while the output layer runs: whatever it is called with, it gives `states` [1, N, D]."""

    def __init__(self, trunk: nn.Module, states: Tensor):
        self.trunk, self.states = trunk, states

    def __call__(self, *_: Any, **__: Any) -> "_TrunkOutput":
        return _TrunkOutput(self.states)

    @property
    def decoder(self) -> "_GivenStates":
        """OPT calls the decoder inside of its trunk."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trunk, name)


class _TrunkOutput:
    """What a trunk returns: its states [1, N, D] first, and None for anything else (caches, attentions)."""

    def __init__(self, states: Tensor):
        self.last_hidden_state = states

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def output_logits(model: Model, states: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., D], as the model's own forward pass makes them.

    That pass runs with the states in place of its trunk, so that scales (Granite, Cohere), caps (Gemma 2) and layers
    before the matrix (ModernBERT) are those of the architecture. `model` may be one with adapters (`lora.Adapted`).
    """
    full_model = getattr(model, "base", model)
    prefix, head = full_model.base_model_prefix, object.__new__(type(full_model))
    trunk = _GivenStates(full_model._modules[prefix], states.reshape(1, -1, states.size(-1)))
    head.__dict__ = {**full_model.__dict__, "_modules": {**full_model._modules, prefix: trunk}}
    logits = type(full_model).forward(head, use_cache=False, return_dict=True).logits
    return logits.reshape(*states.shape[:-1], -1)


@torch.no_grad()
def require_own_logits(model: Model) -> None:
    """Raise `UserError` where the output layer, from the trunk's states, does not give the model's own logits."""
    kind, ids = model.config.model_type, torch.arange(1, 4, device=model.device)[None]
    if model.base_model is model:
        raise UserError(f"{kind}: its trunk cannot be run apart from its output layer; choose another model")
    try:
        expected = model(input_ids=ids, use_cache=False).logits
        logits = output_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{kind}: is no model that predicts the next token of text ({first_line(error)})") from error
    if not expected.isfinite().all():
        raise UserError(f"{kind}: its logits are not finite; its weights are broken")
    if not logits_agree(logits, expected):
        raise UserError(f"{kind}: its output layer, given its hidden states, gives other logits than the model itself")


def logits_agree(values: Tensor, expected: Tensor) -> bool:
    """Whether two fp32 tensors [...] of the same thing agree up to rounding: a thousandth of the largest value."""
    return torch.allclose(values, expected, rtol=0.0, atol=0.001 * expected.abs().max().item() + 1e-6)


def context_length(config: Any) -> float:
    """The longest sequence that a model reads, in tokens; infinite where its architecture sets no limit.

    With longrope it is the length of pretraining: where one row of a batch is longer, transformers rotates all rows by
    the factors for long texts, while keys in a cache keep those for short texts.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each kind of them
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            return parameters["original_max_position_embeddings"]
    names = ("max_position_embeddings", "max_seq_len")
    return next((length for name in names if (length := getattr(config, name, None))), math.inf)


def save(model: Model, tokenizer: Any, folder: Path) -> None:
    """Write a model folder that transformers loads by itself: safetensors, tokenizer and chat template.

    Raises `UserError` where a weight is not a finite number.
    """
    require_finite(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        ends = chat.end_ids(tokenizer)
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def require_finite(model: Model) -> None:
    """Raise `UserError` naming the first parameter that is not finite throughout."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name}: has weights that are no finite numbers; lower the stage's learning rate")
