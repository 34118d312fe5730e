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

from pipeline.errors import UserError


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


def layouts(model: nn.Module) -> dict[Tensor, Layout]:
    """The layout of the weight of every linear layer. Raises `UserError` where a joined one is not known here."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {module.weight: _layout(model.config, name, module) for name, module in linear}


def _layout(config: Any, name: str, module: nn.Module) -> Layout:
    leaf, transposed = name.rsplit(".", 1)[-1], isinstance(module, Conv1D)
    rows = module.weight.size(1 if transposed else 0)
    rule = JOINED.get((config.model_type, leaf)) or JOINED.get(("", leaf))
    if rule is not None:
        return Layout(transposed, *rule(config, rows))
    if re.search(JOINED_NAMES, leaf):
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
    ("lfm2", "in_proj"): _equal(3),
    ("lfm2_moe", "in_proj"): _equal(3),
    ("modernbert-decoder", "Wi"): _equal(2),
    ("", "gate_up_proj"): _equal(2),
    ("", "input_linear"): _equal(2),
}
JOINED_NAMES = r"qkv|query_key_value|c_attn|att_proj|W_pack|gate_up|^in_proj|^Wi$"
