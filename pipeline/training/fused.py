"""Matrices that an architecture stores as one or transposed: how to take them apart and put them together again.

An optimiser that looks at a matrix as a whole (Muon) has to see what the model computes with: query, key and value
apart, and outputs as rows. Sources are the models' own code in transformers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from threefold.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a weight is stored: [out, in], or [in, out] where `transposed`.

    With `sizes` its rows of output are several matrices: `groups` times the rows of each, one after the other. Groups
    are heads where heads are interleaved; otherwise there is one.
    """

    transposed: bool = False
    groups: int = 1
    sizes: tuple[int, ...] = ()


def each_part(weights: Tensor, layout: Layout, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of every matrix [N, rows, columns] that `weights` [N, ...] hold, put together as they were."""
    rows = weights.mT if layout.transposed else weights
    if layout.sizes:
        parts = rows.unflatten(1, (layout.groups, -1)).split(layout.sizes, 2)  # each [N, groups, size, columns]
        changed = [function(part.flatten(1, 2)).unflatten(1, (layout.groups, -1)) for part in parts]
        rows = torch.cat(changed, 2).flatten(1, 2)
    else:
        rows = function(rows)
    return rows.mT if layout.transposed else rows


def layouts(model: Any) -> dict[Tensor, Layout]:
    """The layout of the weight of every linear layer. Raises `UserError` where a joined one is not known here."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {module.weight: _layout(model.config, name, module) for name, module in linear}


def _layout(config: Any, name: str, module: Any) -> Layout:
    leaf, transposed = name.rsplit(".", 1)[-1], isinstance(module, Conv1D)
    rows = module.weight.size(1 if transposed else 0)
    rule = JOINED.get((config.model_type, leaf)) or JOINED.get(("", leaf))
    groups, sizes = rule(config, rows) if rule is not None else (1, ())
    if rule is not None and groups * sum(sizes) == rows:
        return Layout(transposed, groups, sizes)
    if rule is not None or re.search(JOINED_NAMES, leaf):
        raise UserError(
            f"pretrain.tokens: Muon trains every matrix by itself, and {config.model_type} stores several as one "
            f"({name}) in a way that is not known here; set it to 0 to take a checkpoint as it is, or choose another "
            "architecture"
        )
    return Layout(transposed)


# Rules: groups, and the rows of each part in a group, from the configuration and the number of rows


def _equal(parts: int, groups: int = 1) -> Callable[[Any, int], tuple[int, tuple[int, ...]]]:
    return lambda _, rows: (groups, (rows // groups // parts,) * parts)


def _by_head(config: Any, rows: int) -> tuple[int, tuple[int, ...]]:
    heads = config.num_attention_heads
    return heads, (rows // heads // 3,) * 3


def _by_kind(heads: int, key_heads: int, rows: int, groups: int = 1) -> tuple[int, tuple[int, ...]]:
    """All heads of the query, then those of the key and of the value; heads are those of all `groups`."""
    head = rows // (heads + 2 * key_heads)
    return groups, (heads // groups * head, key_heads // groups * head, key_heads // groups * head)


def _falcon(config: Any, rows: int) -> tuple[int, tuple[int, ...]]:
    if config.new_decoder_architecture:
        return _by_kind(config.num_attention_heads, config.num_kv_heads, rows, groups=config.num_kv_heads)
    return _by_kind(config.num_attention_heads, 1, rows) if config.multi_query else _by_head(config, rows)


def _bigcode(config: Any, rows: int) -> tuple[int, tuple[int, ...]]:
    return _by_kind(config.num_attention_heads, 1, rows) if config.multi_query else _by_head(config, rows)


def _phi(config: Any, rows: int) -> tuple[int, tuple[int, ...]]:
    return _by_kind(config.num_attention_heads, config.num_key_value_heads, rows)


def _dbrx(config: Any, rows: int) -> tuple[int, tuple[int, ...]]:
    return _by_kind(config.n_heads, config.attn_config.kv_n_heads, rows)


def _latent(config: Any, _: int) -> tuple[int, tuple[int, ...]]:
    """Multi-head latent attention: what keys and values are made of, and the rotated part that all keys share."""
    return 1, (config.kv_lora_rank, config.qk_rope_head_dim)


def _from_latent(config: Any, _: int) -> tuple[int, tuple[int, ...]]:
    """Multi-head latent attention: for each head the part of its key that is not rotated, and its value."""
    return config.num_attention_heads, (config.qk_nope_head_dim, config.v_head_dim)


def _selective(state: str) -> Callable[[Any, int], tuple[int, tuple[int, ...]]]:
    """Mamba: what the step size is made of, then B and C of as many rows as the state that the configuration names."""
    return lambda config, rows: (1, (rows - 2 * getattr(config, state), *(getattr(config, state),) * 2))


def _one_head(config: Any, _: int) -> tuple[int, tuple[int, ...]]:
    return 1, (config.head_dim,)


# (architecture, layer): its rule; the architecture "" is every other one
JOINED = {
    ("gpt2", "c_attn"): _equal(3),
    ("openai-gpt", "c_attn"): _equal(3),
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("mpt", "Wqkv"): _equal(3),
    ("dbrx", "Wqkv"): _dbrx,
    ("phi3", "qkv_proj"): _phi,
    ("phi4_multimodal", "qkv_proj"): _phi,
    ("codegen", "qkv_proj"): _equal(3, groups=4),
    ("gpt_neox", "query_key_value"): _by_head,
    ("gpt_neox_japanese", "query_key_value"): _by_head,
    ("bloom", "query_key_value"): _by_head,
    ("persimmon", "query_key_value"): _by_head,
    ("minimax", "qkv_proj"): _by_head,
    ("falcon", "query_key_value"): _falcon,
    ("mamba", "in_proj"): _equal(2),
    ("falcon_mamba", "in_proj"): _equal(2),
    ("jamba", "in_proj"): _equal(2),
    ("mamba", "x_proj"): _selective("state_size"),
    ("falcon_mamba", "x_proj"): _selective("state_size"),
    ("jamba", "x_proj"): _selective("mamba_d_state"),
    ("jetmoe", "kv_proj"): _equal(2),
    ("deepseek_v4", "kv_proj"): _one_head,  # that of attention, keys being values; its compressors' are two, refused
    ("lfm2", "in_proj"): _equal(3),
    ("lfm2_moe", "in_proj"): _equal(3),
    ("modernbert-decoder", "Wi"): _equal(2),
    ("", "kv_a_proj_with_mqa"): _latent,
    ("", "kv_b_proj"): _from_latent,
    ("", "gate_up_proj"): _equal(2),
    ("", "input_linear"): _equal(2),
}
JOINED_NAMES = r"qkv|query_key_value|c_attn|att_proj|W_pack|gate_up|^in_proj|^Wi$|^x_proj$|^kv_proj$|^kv_[ab]_proj"
