"""Pretraining as one would write it: a loop in the manner of nanoGPT, and one over a model of transformers.

B: rows, T: tokens of a row, D: width, V: vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A block of GPT-2 without biases, as nanoGPT has it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.joined, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        heads = (part.view(rows, tokens, self.heads, -1).transpose(1, 2) for part in
                 self.joined(self.norms[0](x)).split(width, 2))  # fmt: skip
        h = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class NanoGPT(nn.Module):
    """GPT-2 in nanoGPT's form: learnt positions, embedding and output layer of the same weights; gives the loss."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.output = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )
        self.output.weight = self.tokens.weight

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Mean cross-entropy of `wanted` [B, T] after `ids` [B, T]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


class Loop:
    """Steps of AdamW at nanoGPT's values; batches are drawn at random places of `stream`."""

    def __init__(self, model: nn.Module, stream: Tensor, batch: int, context: int, total: int, bf16: bool):
        self.model, self.stream, self.batch, self.context = model, stream, batch, context
        self.total, self.step, self.device = total, 0, next(model.parameters()).device
        self.autocast = {"device_type": self.device.type, "dtype": torch.bfloat16, "enabled": bf16}
        self.generator = torch.Generator().manual_seed(0)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def run(self, steps: int) -> float:
        """Take so many steps; the tokens of them. The rate rises for 2 % of the total, and falls by a cosine."""
        for _ in range(steps):
            self.step += 1
            done = self.step / self.total
            rate = 1e-3 * min(self.step / max(1, 0.02 * self.total), 0.1 + 0.45 * (1 + math.cos(math.pi * done)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._loss().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return steps * self.batch * self.context

    def _loss(self) -> Any:
        places = torch.randint(len(self.stream) - self.context - 1, (self.batch,), generator=self.generator)
        rows = torch.stack([self.stream[place : place + self.context + 1] for place in places]).to(self.device)
        with torch.autocast(**self.autocast):
            if isinstance(self.model, NanoGPT):
                return self.model(rows[:, :-1], rows[:, 1:])
            return self.model(input_ids=rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss
