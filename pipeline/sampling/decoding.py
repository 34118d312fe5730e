"""Decoders: the hidden state after one more token for a batch of rows, with a key-value cache.

B: rows, P: prompt tokens, T: room of the cache in tokens, H: heads, G: key and value heads, W: width of a head,
D: width, V: vocabulary.
"""

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from threefold.errors import UserError
from threefold.models import Model, likelihood, loading, lora

# finished rows leave the batch when at most this share is alive: leaving copies the cache, staying costs work
KEEP_ABOVE = 0.875
FUSED = ("llama", "mistral", "qwen2", "qwen3")  # architectures that `FusedDecoder` knows
STEADY_ROPE = ("default", "linear", "llama3", "yarn")  # rotary embeddings that do not change with the length


class RoomyLayer(CacheLayerMixin):
    """Keys and values [B, G, T, W] of one layer in buffers with room for all tokens, so that growing copies nothing."""

    is_sliding = False
    keys: Any  # tensors [B, G, T, W]
    values: Any

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers [B, G, T, W] of the type of the first keys and values [B, G, tokens, W]."""
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self.room, states.size(-1)) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, G, new tokens, W] behind the others; returns those of all [B, G, tokens, W]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = slice(self.length, self.length + key_states.size(2))
        self.keys[:, :, new], self.values[:, :, new] = key_states, value_states
        self.length = new.stop
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens to attend to, those of the query included, and the first of them."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.room


class Decoder:
    """A causal language model of transformers by its own forward pass, with its own kind of cache.

    That may hold keys and values, or the states of a recurrent model, which a step reads without a mask.
    """

    cache: Any  # a DynamicCache

    def __init__(self, model: Model):
        self.model = model
        accepted = inspect.signature(model.base_model.forward).parameters
        self.recurrent = "past_key_values" not in accepted
        self.cache_name = "cache_params" if self.recurrent else "past_key_values"
        self.has_positions = "position_ids" in accepted

    def logits(self, states: Tensor) -> Tensor:
        """Logits [B, V] of states [B, D]."""
        return loading.output_logits(self.model, states)

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """States [B, D] after prompts [B, P], padded on the left; `room` is the number of tokens to come."""
        self.cache = DynamicCache(config=self.model.config)
        self.cache.layers = [
            RoomyLayer(ids.size(1) + room) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer
            for layer in self.cache.layers
        ]
        self.mask, self.position = mask, (mask.cumsum(-1) - 1).clamp(min=0)  # positions count real tokens only
        return self._forward(ids, self.mask)

    def step(self, tokens: Tensor) -> Tensor:
        """States [B, D] after one more token [B] for each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        self.position = self.position[:, -1:] + 1
        return self._forward(tokens[:, None], None if self.recurrent else self.mask)

    def staying(self, rows: int, alive: int) -> int:
        """How many of the `rows` to keep when `alive` of them have not finished."""
        return alive if alive <= KEEP_ABOVE * rows else rows

    def keep(self, rows: Tensor) -> None:
        """Only the rows [n] go on."""
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cache.reorder_cache(rows)

    def _forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """States [B, D] of the last of the new tokens `ids` [B, n]; `mask` [B, tokens] is over all tokens so far."""
        options = {self.cache_name: self.cache} | ({"position_ids": self.position} if self.has_positions else {})
        outputs = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=True, **options)
        return outputs.last_hidden_state[:, -1]


class RecomputingDecoder(Decoder):
    """Any causal language model, without a cache: each new token recomputes all, which is slow and always right."""

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """States [B, D] after prompts [B, P], padded on the left; `room` is the number of tokens to come."""
        self.ids, self.mask = likelihood.tokens_first(ids, mask)
        return self._last_states()

    def step(self, tokens: Tensor) -> Tensor:
        """States [B, D] after one more token [B] for each row."""
        self.ids, self.mask = F.pad(self.ids, (0, 1)), F.pad(self.mask, (0, 1))
        end = self.mask.sum(1, keepdim=True)
        self.ids, self.mask = self.ids.scatter(1, end, tokens[:, None]), self.mask.scatter(1, end, 1)
        return self._last_states()

    def keep(self, rows: Tensor) -> None:
        """Only the rows [n] go on."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def _last_states(self) -> Tensor:
        """States [B, D] of the last real token of each row."""
        states = self.model.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        return states[torch.arange(len(states), device=states.device), self.mask.sum(1) - 1]


class FusedDecoder(Decoder):
    """Llama and its relatives, with few large operations per token in place of many small ones.

    The prompt goes through the model's own forward pass. The tokens after it go through `step`: matrices that read the
    same input are one, attention is two matrix products for the one new query, and the residual stream and its norms
    are those of the model. The matrices are copies, adapters merged, so a decoder is good for one set of weights.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = [_fused(layer, config) for layer in model.base_model.layers]
        self.last_norm = _norm(model.base_model.norm.weight, config)

    def logits(self, states: Tensor) -> Tensor:
        """Logits [B, V] of states [B, D]; the output layer of these architectures is a matrix alone."""
        return self.model.get_output_embeddings()(states)

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """States [B, D] after prompts [B, P], padded on the left; `room` is the number of tokens to come."""
        states = super().prefill(ids, mask, room)
        self.position, self.cached = self.position[:, -1], self.cache.layers
        everywhere = torch.arange(ids.size(1) + room, device=ids.device)[None]
        self.cosine, sine = (table[0] for table in self.model.base_model.rotary_emb(states, everywhere))
        self.sine = torch.cat([-sine[:, : self.width // 2], sine[:, self.width // 2 :]], 1)
        # [B, 1, 1, T] added to attention scores: minus infinity on padding, 0 on tokens
        seen = F.pad(mask, (0, room), value=1)[:, None, None].to(states.dtype)
        self.hidden = None if mask.all() else torch.zeros_like(seen).masked_fill(seen == 0, float("-inf"))
        return states

    def step(self, tokens: Tensor) -> Tensor:
        """States [B, D] after one more token [B] for each row."""
        self.position = self.position + 1
        return self.advance(tokens)

    def advance(self, tokens: Tensor) -> Tensor:
        """States [B, D] of tokens [B] at the present position of each row."""
        cosine, sine = self.cosine[self.position][:, None], self.sine[self.position][:, None]
        x = F.embedding(tokens, self.model.get_input_embeddings().weight)
        for weights, cached in zip(self.layers, self.cached, strict=True):
            x = self._layer(x, weights, cached, cosine, sine)
        return _normed(x, self.last_norm)

    def _layer(self, x: Tensor, weights: dict[str, Any], cached: Any, cosine: Tensor, sine: Tensor) -> Tensor:
        """The residual stream [B, D] after one block; `x` [B, D] comes before it, `cosine` and `sine` are [B, 1, W]."""
        h = _normed(x, weights["attention_norm"])
        h = _product(h, *weights["qkv"]).view(len(x), -1, self.width)  # [B, H + 2 G, W]
        turning, values = h.split([self.heads + self.groups, self.groups], 1)
        if weights["head_norm"] is not None:
            turning = _normed(turning, weights["head_norm"])
        turning = turning * cosine + torch.cat(turning.chunk(2, -1)[::-1], -1) * sine
        query, key = turning.split([self.heads, self.groups], 1)
        keys, values = cached.update(key[:, :, None], values[:, :, None])
        query = query.reshape(len(x), self.groups, -1, self.width)  # heads that share keys are rows of one product
        scores = query @ keys.transpose(-1, -2) * self.width**-0.5  # [B, G, H / G, tokens]
        if self.hidden is not None:
            scores = scores + self.hidden[..., : keys.size(2)]
        h = (scores.softmax(-1) @ values).reshape(len(x), -1)
        x = x + _product(h, *weights["out"])
        h = _normed(x, weights["mlp_norm"])
        gate, up = _product(h, *weights["gate_up"]).chunk(2, -1)
        return x + _product(F.silu(gate) * up, *weights["down"])

    def keep(self, rows: Tensor) -> None:
        """Only the rows [n] go on."""
        super().keep(rows)
        self.hidden = None if self.hidden is None else self.hidden[rows]


def fusible(model: Model) -> bool:
    """Whether `FusedDecoder` knows the model."""
    config = model.config
    known_architecture = config.model_type in FUSED and config.hidden_act == "silu"
    full_attention = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    steady = (getattr(config, "rope_parameters", None) or {}).get("rope_type") in STEADY_ROPE
    windowed = config.model_type == "mistral" and config.sliding_window
    return bool(known_architecture and full_attention and steady and not windowed)


def _fused(layer: Any, config: Any) -> dict[str, Any]:
    """The weights of one block, those of matrices with the same input stacked: each (matrix, bias) as of `_stacked`."""
    attention, mlp = layer.self_attn, layer.mlp
    head_norm = None
    if hasattr(attention, "q_norm"):
        counts = ((attention.q_norm, config.num_attention_heads), (attention.k_norm, config.num_key_value_heads))
        head_norm = _norm(torch.cat([norm.weight.expand(count, -1) for norm, count in counts]), config)
    return {
        "attention_norm": _norm(layer.input_layernorm.weight, config),
        "qkv": _stacked(attention.q_proj, attention.k_proj, attention.v_proj),
        "head_norm": head_norm,
        "out": _stacked(attention.o_proj),
        "mlp_norm": _norm(layer.post_attention_layernorm.weight, config),
        "gate_up": _stacked(mlp.gate_proj, mlp.up_proj),
        "down": _stacked(mlp.down_proj),
    }


def _stacked(*projections: Any) -> tuple[Tensor, Tensor | None]:
    """The matrices of linear layers side by side [in, out], and their biases [out]; None where they have none."""
    biases = [projection.bias for projection in projections]
    bias = None if biases[0] is None else torch.cat(biases).detach()
    matrix = torch.cat([lora.merged_weight(projection) for projection in projections]).t().contiguous()
    if torch.is_autocast_enabled(matrix.device.type):  # once, rather than for every token
        dtype = torch.get_autocast_dtype(matrix.device.type)
        matrix, bias = matrix.to(dtype), None if bias is None else bias.to(dtype)
    return matrix, bias


def _product(h: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer makes of `h` [B, in]; `matrix` [in, out] is transposed beforehand: faster for few rows."""
    return h @ matrix if bias is None else torch.addmm(bias, h, matrix)


def _norm(weight: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """An RMS norm over n numbers as `_normed` takes it: weight [..., n] and epsilon [], times the root of n."""
    root = weight.size(-1) ** 0.5
    return weight.detach() * root, torch.tensor(config.rms_norm_eps**0.5 * root, device=weight.device)


def _normed(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """RMS norm of `x` [..., n] in four kernels; on CPU `F.rms_norm` takes seven and twice the time."""
    weight, smallest = norm
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), smallest) * weight


_KINDS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of models that were tried


def kind_for(model: Model) -> type[Decoder]:
    """The fastest decoder whose steps give what one forward pass gives; a model is tried once.

    Raises `UserError` where none does.
    """
    if model not in _KINDS:
        candidates = [FusedDecoder] if fusible(model) else []
        kinds = (kind for kind in (*candidates, Decoder, RecomputingDecoder) if _agrees(kind, model))
        _KINDS[model] = next(kinds, None)
    if _KINDS[model] is None:
        raise UserError(
            f"{model.config.model_type}: its states after each token are not those of a forward pass over all of them, "
            "so nothing can be sampled from it; choose another model"
        )
    return _KINDS[model]


@torch.no_grad()
def _agrees(kind: type[Decoder], model: Model) -> bool:
    """Whether a prompt and two steps, with padding and a row that leaves, give states and logits of a plain pass."""
    ids = torch.arange(1, 9, device=model.device).view(2, 4)
    mask, kept = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=model.device), torch.tensor([1], device=model.device)
    with torch.autocast(model.device.type, enabled=False):
        sequence = torch.cat([ids[1, 2:], ids[0, :2]])[None]
        expected = model.base_model(input_ids=sequence, use_cache=False).last_hidden_state[0, 1:]
        try:
            decoder = kind(model)
            states = [decoder.prefill(ids, mask, 2)[kept], decoder.step(ids[[1, 0], 0])[kept]]
            decoder.keep(kept)
            states = torch.cat([*states, decoder.step(ids[0, 1:2])])
            logits = decoder.logits(states)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            return False  # a cache of another kind than the decoder knows
        return loading.logits_agree(states, expected) and loading.logits_agree(
            logits, loading.output_logits(model, expected)
        )
