"""Next-token loss of Llama and its relatives in few passes over memory, for training in fp32 on a CPU.

On a small model the passes of norms, rotary embedding and cross-entropy take a fifth of a step and more. Here a norm's
weight goes into the matrices behind it, gradients of one tensor are added up by the products that make them, and logits
exist for some rows at a time, as in Liger-Kernel's fused loss (Hsu et al. 2024). Products go through oneDNN, which on
processors with AVX-512 is faster than MKL for matrices this narrow.

B: rows, T: tokens of a row, N: B·T, D: width, H: heads, G: key and value heads, W: width of a head, V: vocabulary.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutputWithPast

from threefold.execution.device import Device
from threefold.sampling import decoding

LOGITS = 2**20  # logits that exist at a time: 4 MiB, which stay in a processor's cache
ROWS = 128  # rows of a product with the output layer, at least
IGNORED = -100  # the label of a token that no loss counts


def serves(model: Any, device: Device) -> bool:
    """Whether this module computes what the model does, and is the faster way on `device`."""
    if device.type != "cpu" or device.bf16 or device.sharded or not decoding.fusible(model):
        return False
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    plain = all(type(layer) is torch.nn.Linear and layer.bias is None for layer in layers)
    return plain and not getattr(model.config, "attention_dropout", 0.0)


@contextmanager
def installed(model: Any) -> Generator[None]:
    """Let `model` compute its training loss by `loss`; its weights and everything else stay its own."""

    def forward(input_ids: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(loss=loss(model, input_ids, labels, num_items_in_batch))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def loss(model: Any, ids: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """Cross-entropy of each next token of `labels` [B, T], summed and divided by `count`, or by how many there are.

    `ids` [B, T] have no padding, or have it on the right with labels that are `IGNORED`.
    """
    base, (rows, tokens) = model.base_model, ids.shape
    x = model.get_input_embeddings()(ids).view(rows * tokens, -1)
    cosine, sine = (table[0, :, None] for table in base.rotary_emb(x, torch.arange(tokens, device=x.device)[None]))
    half = cosine.size(-1) // 2
    turn = cosine, torch.cat([-sine[..., :half], sine[..., half:]], -1)
    for layer in base.layers:
        x = _block(layer, x, (rows, tokens), turn)
    wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    count = (wanted != IGNORED).sum() if count is None else count
    norm = base.norm
    matrix, trained = model.get_output_embeddings().weight, torch.is_grad_enabled()
    return _OutputLoss.apply(x, norm.weight, norm.variance_epsilon, matrix, wanted, count, trained)


def _block(layer: Any, x: Tensor, shape: tuple[int, int], turn: tuple[Tensor, Tensor]) -> Tensor:
    """The residual stream [N, D] after one block."""
    attention, mlp = layer.self_attn, layer.mlp
    norm, projections = layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
    x, *heads = _NormedProducts.apply(x, norm.weight, norm.variance_epsilon, *(p.weight for p in projections))
    query, key, value = (states.view(*shape, -1, attention.head_dim) for states in heads)
    query = _turned(query, getattr(attention, "q_norm", None), turn).transpose(1, 2)
    key = _turned(key, getattr(attention, "k_norm", None), turn).transpose(1, 2)
    shared = query.size(1) != key.size(1)
    h = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), is_causal=True, enable_gqa=shared)
    x = _Added.apply(x, h.transpose(1, 2).reshape(len(x), -1), attention.o_proj.weight)
    norm = layer.post_attention_layernorm
    x, gate, up = _NormedProducts.apply(x, norm.weight, norm.variance_epsilon, mlp.gate_proj.weight, mlp.up_proj.weight)
    return _Added.apply(x, F.silu(gate) * up, mlp.down_proj.weight)


def _turned(x: Tensor, norm: Any, turn: tuple[Tensor, Tensor]) -> Tensor:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    return _Turned.apply(x, weight, eps, *turn)


def _product(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """`x` [N, in] times the transpose of `weight` [out, in], plus `added` [N, out]."""
    if not torch.backends.mkldnn.is_available():
        return x @ weight.t() if added is None else torch.addmm(added, x, weight.t())
    if added is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, None, "add")


def _scale(x: Tensor, eps: float) -> Tensor:
    """What an RMS norm multiplies `x` [..., n] by, before its weight: [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()


class _NormedProducts(Function):
    """The residual stream [N, D] as it is, and its RMS norm times the transpose of each of some matrices [out, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *matrices: Tensor) -> tuple[Tensor, ...]:
        scale = _scale(x, eps)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight, *matrices)
        return x, *(_product(unit, matrix * weight) for matrix in matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_stream: Tensor, *outer: Tensor) -> tuple[Tensor | None, ...]:
        unit, scale, weight, *matrices = ctx.saved_tensors
        of_weight, of_matrices = torch.zeros_like(weight), []
        of_unit: Any = None
        for gradient, matrix in zip(outer, matrices, strict=True):
            of_unit = _product(gradient, (matrix * weight).t().contiguous(), of_unit)
            weighted = gradient.t() @ unit
            of_weight += torch.linalg.vecdot(weighted, matrix, dim=0)
            of_matrices.append(weighted.mul_(weight))
        along = torch.linalg.vecdot(of_unit, unit)[:, None].mul_(scale).div_(-unit.size(-1))
        return torch.addcmul(of_stream, of_unit, scale).addcmul_(unit, along), of_weight, None, *of_matrices


class _Added(Function):
    """The residual stream [N, D] plus `h` [N, in] times the transpose of a matrix [D, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(h, matrix)
        return _product(h, matrix, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        h, matrix = ctx.saved_tensors
        return gradient, _product(gradient, matrix.t().contiguous()), gradient.t() @ h


class _Turned(Function):
    """Heads [B, T, H, W] after their RMS norm, if they have one, and the rotary embedding.

    Cosines and sines are [T, 1, W], the first half of the sines negative.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, cosine: Tensor, sine: Tensor) -> Tensor:
        if weight is not None:
            scale = _scale(x, eps)
            x = x * scale
            ctx.save_for_backward(cosine, sine, weight, x, scale)
            cosine, sine = cosine * weight, sine * weight.roll(x.size(-1) // 2)
        else:
            ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine, *normed = ctx.saved_tensors
        back = _turn(gradient, cosine, -sine)
        if not normed:
            return back, None, None, None, None
        weight, unit, scale = normed
        both = back * unit
        along = (both @ weight)[..., None].mul_(scale).div_(-unit.size(-1))
        return back.mul_(weight).mul_(scale).addcmul_(unit, along), both.sum((0, 1, 2)), None, None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.size(-1) // 2
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half])
    turned[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return turned


class _OutputLoss(Function):
    """Cross-entropy of labels [N] by the RMS norm of `x` [N, D] and an output layer [V, D], divided by `count`.

    Gradients are computed at once, while the logits of some rows exist; none are where it is not `trained`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, matrix: Tensor, labels: Tensor, count: Any, trained: bool
    ) -> Tensor:  # fmt: skip
        scale = _scale(x, eps)
        unit, weighted = x * scale, matrix * weight
        columns, of_matrix, total = weighted.t().contiguous(), torch.zeros_like(matrix), x.new_zeros(())
        of_unit, rows = [], max(ROWS, LOGITS // len(matrix))
        for some, wanted in zip(unit.split(rows), labels.split(rows), strict=True):
            counted, wanted = (wanted != IGNORED)[:, None], wanted.clamp(min=0)[:, None]
            logprobs = _product(some, weighted).log_softmax(-1)
            total -= (logprobs.gather(-1, wanted) * counted).sum()
            if not trained:
                continue
            errors = logprobs.exp_().scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=x.dtype))
            errors.mul_(counted / count)
            of_unit.append(_product(errors, columns))
            of_matrix.addmm_(errors.t(), some)
        if not trained:
            return total / count
        of_weight = torch.linalg.vecdot(of_matrix, matrix, dim=0)
        gradient = torch.cat(of_unit)
        along = torch.linalg.vecdot(gradient, unit)[:, None].div_(-unit.size(-1))
        ctx.save_for_backward(gradient.addcmul_(unit, along).mul_(scale), of_weight, of_matrix.mul_(weight))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_matrix = ctx.saved_tensors
        return of_x * gradient, of_weight * gradient, None, of_matrix * gradient, None, None, None
