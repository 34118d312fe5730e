"""Weights that are stored transposed, or several as one: which rows are which, and Muon's update of each."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from threefold.errors import UserError
from threefold.training import fused
from threefold.training.muon import MuonAdamW

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
HALVES = {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
NEOX = {"intermediate_size": 24}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
FALCON = {"new_decoder_architecture": False, "alibi": False, "bos_token_id": 0, "eos_token_id": 0}

# architecture, its settings, the layer's name, and the module whose output is watched
QUERY_KEY_VALUE = [
    ("gpt2", {}, "c_attn", "attn"),
    ("gpt_bigcode", {"multi_query": True}, "c_attn", "attn"),
    ("gpt_bigcode", {"multi_query": False}, "c_attn", "attn"),
    ("gpt_neox", NEOX, "query_key_value", "attention"),
    ("gpt_neox_japanese", {"intermediate_multiple_size": 2}, "query_key_value", "attention"),
    ("bloom", {}, "query_key_value", "self_attention"),
    ("persimmon", NEOX, "query_key_value", "self_attn"),
    ("falcon", NEW_FALCON | {"bos_token_id": 0, "eos_token_id": 0}, "query_key_value", "self_attention"),
    ("falcon", FALCON | {"multi_query": True}, "query_key_value", "self_attention"),
    ("falcon", FALCON | {"multi_query": False}, "query_key_value", "self_attention"),
    ("codegen", {"rotary_dim": 4}, "qkv_proj", "attn"),
    ("mpt", {"max_seq_len": 32}, "Wqkv", "attn"),
    ("phi3", HALVES, "qkv_proj", "self_attn"),
    ("openai-gpt", {}, "c_attn", "attn"),
]
STATES = {"state_size": 4, "time_step_rank": 2}
JAMBA = {
    "intermediate_size": 24, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False,
}  # fmt: skip
GATE_AND_UP = [
    ("phi3", HALVES, "gate_up_proj", "mlp"),
    ("glm", HALVES | {"head_dim": 4}, "gate_up_proj", "mlp"),
    ("modernbert-decoder", {"intermediate_size": 24, "pad_token_id": 0}, "Wi", "mlp"),
    ("mamba", STATES, "in_proj", "mixer"),
    ("falcon_mamba", STATES, "in_proj", "mixer"),
    ("jamba", JAMBA, "in_proj", "mamba"),
]
LATENT = {
    "intermediate_size": 24, "num_key_value_heads": 4, "kv_lora_rank": 6, "q_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 8}
# with the part without which there are no values, and the other one, which is of the keys alone
KEYS_AND_VALUES = [
    ("minicpm3", LATENT, "kv_a_proj_with_mqa", 0, 1),
    ("minicpm3", LATENT, "kv_b_proj", 1, 0),
    ("deepseek_v3", LATENT | EXPERTS | {"first_k_dense_replace": 1}, "kv_a_proj_with_mqa", 0, 1),
    ("deepseek_v3", LATENT | EXPERTS | {"first_k_dense_replace": 1}, "kv_b_proj", 1, 0),
    ("jetmoe", {"intermediate_size": 24, "kv_channels": 4, "num_key_value_heads": 2}, "kv_proj", 1, 0),
]


def made(architecture: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SHAPE | settings, dtype="float32", use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_() if name.endswith("bias") else p.add_(0.3 * torch.randn(p.shape))
    return model


def layer(model: nn.Module, name: str) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == name)


@torch.no_grad()
def output(model: nn.Module, name: str, watched: str, zeroed: set[int]) -> torch.Tensor:
    """What the module `watched` gives where the parts `zeroed` of the layer `name` are zero."""
    module, heard, number = layer(model, name), [], iter(range(100))
    kept = module.weight.detach().clone()
    zero = fused.each_part(
        kept[None], fused.layouts(model)[module.weight], lambda part: part * (next(number) not in zeroed)
    )
    module.weight.copy_(zero[0])
    hook = layer(model, watched).register_forward_hook(lambda _, __, given: heard.append(given))
    model(input_ids=torch.arange(1, 9)[None])
    hook.remove()
    module.weight.copy_(kept)
    return heard[0] if isinstance(heard[0], torch.Tensor) else heard[0][0]


@pytest.mark.parametrize(("architecture", "settings", "name", "watched"), QUERY_KEY_VALUE)
def test_query_key_and_value_are_the_rows_that_the_model_uses_as_such(architecture, settings, name, watched):
    """Without values attention gives as much as without all three; without queries as much as without keys as well."""
    model, places = made(architecture, settings), (0, 2, 1) if architecture == "codegen" else (0, 1, 2)

    def without(*parts: int) -> torch.Tensor:
        return output(model, name, watched, {places[part] for part in parts})

    ordinary, everywhere_alike = without(), without(0, 1)
    torch.testing.assert_close(without(2), without(0, 1, 2), atol=1e-6, rtol=1e-5)
    for part in (0, 1):
        torch.testing.assert_close(without(part), everywhere_alike, atol=1e-6, rtol=1e-5)
    assert (ordinary - everywhere_alike).abs().max() > 1e-3 and (ordinary - without(2)).abs().max() > 1e-3


@pytest.mark.parametrize(("architecture", "settings", "name", "watched"), GATE_AND_UP)
def test_gate_and_up_are_halves(architecture, settings, name, watched):
    model = made(architecture, settings)
    gate, up = (output(model, name, watched, {part}) for part in (0, 1))
    assert not gate.any() and not up.any() and output(model, name, watched, set()).abs().max() > 1e-3


@pytest.mark.parametrize(("architecture", "settings", "name", "values", "keys"), KEYS_AND_VALUES)
def test_keys_and_values_are_the_rows_that_the_model_uses_as_such(architecture, settings, name, values, keys):
    """Attention gives nothing without values; without (a part of) keys it gives something else."""
    model = made(architecture, settings)
    watched = "self_attention" if architecture == "jetmoe" else "self_attn"
    ordinary, without = (output(model, name, watched, zeroed) for zeroed in (set(), {keys}))
    assert not output(model, name, watched, {values}).any()
    assert without.any() and (without - ordinary).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "settings", "watched"),
    [("mamba", STATES, "mixer"), ("falcon_mamba", STATES, "mixer"), ("jamba", JAMBA, "mamba")],
)
def test_step_size_b_and_c_are_the_rows_that_a_state_space_model_uses_as_such(architecture, settings, watched):
    """Without B nothing enters the state and without C nothing leaves it, whatever the size of its steps is."""
    model = made(architecture, settings)

    def without(*parts: int) -> torch.Tensor:
        return output(model, "x_proj", watched, set(parts))

    no_state = without(1, 2)
    for parts in ((1,), (2,), (0, 1), (0, 2)):
        torch.testing.assert_close(without(*parts), no_state, atol=1e-6, rtol=1e-5)
    assert (without() - no_state).abs().max() > 1e-3 and (without(0) - no_state).abs().max() > 1e-3
    assert (without(0) - without()).abs().max() > 1e-3


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix, by singular values."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def first_update(model: nn.Module, weight: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradient of `weight`, and Muon's first step on it at rate 1, both as they are stored."""
    optimizer, generator = MuonAdamW(model, matrix_lr=1.0, lr=0.0, bf16=False), torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    before = weight.detach().clone()
    optimizer.step()
    return weight.grad, before - weight.detach()


def test_gpt2s_query_key_and_value_are_orthogonalised_each_by_itself():
    """Each third of the columns of c_attn has the singular vectors of its own gradient."""
    model = made("gpt2", {})
    weight = model.transformer.h[0].attn.c_attn.weight
    gradients, updates = first_update(model, weight)
    for gradient, update in zip(gradients.split(16, 1), updates.split(16, 1), strict=True):
        torch.testing.assert_close(polar(update), polar(gradient), atol=2e-3, rtol=0)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.3 and values.max() < 1.3


def test_interleaved_heads_are_brought_together_first():
    """GPT-NeoX stores query, key and value of one head, then those of the next."""
    model = made("gpt_neox", NEOX)
    weight = model.gpt_neox.layers[0].attention.query_key_value.weight
    gradients, updates = (stored.view(4, 3, 4, 16) for stored in first_update(model, weight))
    for part in range(3):
        gradient, update = (stored[:, part].reshape(16, 16) for stored in (gradients, updates))
        torch.testing.assert_close(polar(update), polar(gradient), atol=2e-3, rtol=0)


class Stack(nn.Module):
    """As much of a language model as the optimiser asks of one, with two layers of 12 → 48 → 12."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.config = AutoConfig.for_model("gpt2")
        self.up = Conv1D(48, 12) if transposed else nn.Linear(12, 48)
        self.down = Conv1D(12, 48) if transposed else nn.Linear(48, 12)

    def get_output_embeddings(self) -> None:
        return None


def test_a_conv1d_and_the_transposed_linear_get_the_same_update():
    """Three steps on the same gradients; the updates have norms of about sqrt(out / in) times that of a square one."""
    models = [Stack(transposed) for transposed in (True, False)]
    with torch.no_grad():
        for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
            ours.copy_(theirs.mT if theirs.ndim == 2 else theirs)
    start = [p.detach().clone() for p in models[1].parameters()]
    optimizers = [MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False) for model in models]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.mT if ours.ndim == 2 else ours.grad
        for optimizer in optimizers:
            optimizer.step()
    for theirs, ours, first in zip(models[0].parameters(), models[1].parameters(), start, strict=True):
        torch.testing.assert_close(theirs.mT if theirs.ndim == 2 else theirs, ours, atol=1e-6, rtol=1e-5)
        assert not torch.equal(ours, first)


@pytest.mark.parametrize(("name", "wanted"), [("c_fc", 2.0), ("c_proj", 1.0)])
def test_an_update_is_as_large_as_the_shape_of_the_layer_asks(name, wanted):
    """The middle singular value of the update is sqrt(max(1, out / in)): 2 for 16 → 64 and 1 for 64 → 16."""
    model = made("gpt2", {})
    _, update = first_update(model, getattr(model.transformer.h[0].mlp, name).weight)
    assert torch.linalg.svdvals(update).median() == pytest.approx(wanted, rel=0.3)


def test_a_joined_matrix_that_is_not_known_is_refused():
    model = made("qwen3", {"intermediate_size": 24, "num_key_value_heads": 2})
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(16, 48)
    with pytest.raises(UserError, match=r"^pretrain.tokens: .* qwen3 stores several as one \(model.layers.0.self_attn"):
        fused.layouts(model)


@pytest.mark.parametrize(("rows", "known"), [(4, True), (8, False)])
def test_rows_that_are_not_those_of_the_rule_are_refused(rows, known):
    """DeepSeek V4's attention has one head of keys that are its values; its compressors have two of them in one."""
    model = made("qwen3", {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4})
    model.model.layers[0].self_attn.kv_proj = nn.Linear(16, rows)
    model.config.model_type = "deepseek_v4"
    if known:
        assert fused.layouts(model)[model.model.layers[0].self_attn.kv_proj.weight].sizes == (4,)
        return
    with pytest.raises(UserError, match="deepseek_v4 stores several as one"):
        fused.layouts(model)
