"""Muon for hidden matrices with AdamW for everything else, as one optimiser.

`torch.optim.Muon` orthogonalises in bf16 one matrix at a time; without bf16 instructions that halves the speed of
training. Here matrices of one shape are orthogonalised together, in fp32 where the device has no fast bf16. Where
processes share out the weights (launch.mode=fsdp2), each brings a whole update together and keeps its own rows of it.
"""

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import _functional

from threefold.training import fused

# coefficients of the quintic Newton-Schulz iteration, five steps (Jordan et al. 2024, "Muon")
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
OBLONG = 1.5  # how many times as long as wide a matrix is for which its gram matrix saves work


def orthogonalise(updates: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with their singular values moved to about 1, in the dtype given."""
    tall = updates.size(-2) > updates.size(-1)
    x = updates.mT if tall else updates
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    small = x.dtype != torch.bfloat16 and x.size(-1) >= OBLONG * x.size(-2)
    x = _by_gram_matrix(x) if small else _directly(x)
    return x.mT if tall else x


def _directly(x: Tensor) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram_matrix(x: Tensor) -> Tensor:
    """The same with all steps on matrices [N, rows, rows]: each is a polynomial of the gram matrix, and these commute.

    It needs more digits than bf16 has, as a gram matrix has the squares of the singular values.
    """
    a, b, c = QUINTIC
    gram = x @ x.mT
    product = torch.eye(x.size(-2), dtype=x.dtype, device=x.device).expand_as(gram)
    for step in range(STEPS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # a step is a times the identity, and this
        product = torch.baddbmm(product, rest, product, beta=a)
        if step < STEPS - 1:
            once = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(once, rest, once, beta=a)
    return product @ x


def gather(matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] that processes share out, brought together in each of them; any other as it is."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def shared_as(p: Tensor, update: Tensor) -> Tensor:
    """This process's part of `update`, of the shape of `p`, where `p` is shared out; otherwise `update`."""
    if not isinstance(p, DTensor):
        return update
    return distribute_tensor(update.contiguous(), p.device_mesh, p.placements, src_data_rank=None)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the matrices of the blocks, AdamW on embeddings, output layer, norms and biases.

    Both learning rates are scaled by the same schedule. Muon: Nesterov momentum 0.95, updates scaled by
    sqrt(max(1, outputs / inputs)), matrices that are stored as one (query, key and value) each by itself. AdamW: betas
    (0.8, 0.95), eps 1e-10, no weight decay (nanochat's values).
    """

    def __init__(self, model: nn.Module, matrix_lr: float, lr: float, bf16: bool):
        matrices, others = split_parameters(model)
        muon = {"params": matrices, "lr": matrix_lr, "muon": True}
        adamw = {"params": others, "lr": lr, "muon": False, "fused": True}  # fused: its state is loaded beside it
        super().__init__([muon, adamw], {})
        layouts = fused.layouts(model)
        self.layouts = [layouts[p] for p in matrices]
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # ty: ignore[incompatible-method-override]  no closure, no loss
        """One update of every parameter that has a gradient."""
        muon, adamw = self.param_groups
        self._muon(muon["params"], muon["lr"])
        self._adamw([p for p in adamw["params"] if p.grad is not None], adamw["lr"])

    def _muon(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        alike = defaultdict(list)
        for p, layout in zip(parameters, self.layouts, strict=True):
            if p.grad is not None:
                alike[p.shape, layout].append(p)
        for (_, layout), members in alike.items():
            updates = torch.stack([gather(self._nesterov(p, momentum)) for p in members])
            updates = fused.each_part(updates, layout, self._scaled)
            for p, update in zip(members, updates, strict=True):
                p.add_(shared_as(p, update), alpha=-lr)

    def _scaled(self, updates: Tensor) -> Tensor:
        """Updates [N, outputs, inputs] orthogonalised, so that outputs change alike whatever the shape."""
        scale = max(1.0, updates.size(1) / updates.size(2)) ** 0.5
        return orthogonalise(updates.to(self.dtype)).to(updates.dtype) * scale

    def _nesterov(self, p: Tensor, momentum: float) -> Tensor:
        """The update of `p` before it is orthogonalised, of its shape."""
        state, gradient = self.state[p], cast(Tensor, p.grad)
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)

    def _adamw(self, parameters: list[Tensor], lr: float) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(zeros, step=torch.zeros((), device=p.device))
        states = [self.state[p] for p in parameters]
        _functional.adamw(
            parameters, [cast(Tensor, p.grad) for p in parameters],
            [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            fused=True, amsgrad=False, beta1=0.8, beta2=0.95, lr=lr, weight_decay=0.0, eps=1e-10, maximize=False,
        )  # fmt: skip


def split_parameters(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices inside the blocks, and all other parameters (embeddings, output layer, norms, biases)."""
    outer = [*(m for m in model.modules() if isinstance(m, nn.Embedding)), model.get_output_embeddings()]
    inner = fused.layouts(model).keys() - {p for m in outer if m for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if p in inner], [p for p in trained if p not in inner]
