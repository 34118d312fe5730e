"""The fused decoder with tensors that keep shape and address, so that on a GPU a step is one CUDA graph.

Launching a step's kernels one by one takes longer than a small model needs to run them; a graph launches all at once.
B: rows, T: tokens there is room for, G: key and value heads, W: width of a head, D: width.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from threefold.models import Model
from threefold.sampling.decoding import FusedDecoder

ROOM = 64  # the room of a frame is a multiple of this many tokens, so that batches of other lengths find it again


class StaticLayer:
    """Keys and values [B, G, T, W] of one layer; a new token goes to the place `slot` [1], and all T are attended."""

    def __init__(self, like: Tensor, slot: Tensor):
        # zeros, as a hidden place counts 0 times what it holds, and that must be a number
        self.keys, self.values, self.slot = torch.zeros_like(like), torch.zeros_like(like), slot

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, G, 1, W] of one token for each row into place; returns those of all places."""
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values


@dataclass
class Frame:
    """What a step of B rows with room for T tokens reads and writes."""

    tokens: Tensor  # [B] that the step reads
    position: Tensor  # [B] of the tokens in their rows
    slot: Tensor  # [1] place of the tokens in the cache
    hidden: Tensor  # [B, 1, 1, T] minus infinity where there is padding or no token yet, 0 elsewhere
    tables: tuple[Tensor, Tensor]  # cosines and sines of the rotary embedding [T, W]
    layers: list[StaticLayer]
    graph: Any = None  # the torch.cuda.CUDAGraph of a step
    states: Any = None  # the tensor [B, D] that the graph writes


class StaticDecoder(FusedDecoder):
    """Llama and its relatives with a cache of fixed size, every step of it a CUDA graph where the model is on a GPU.

    Rows leave the batch only when half of them have finished, and finished ones fill it up to that half: there are few
    shapes, and each has a frame, with its graph, that later batches use again. On a CPU it gains nothing.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        self.frames: dict[tuple[int, int], Frame] = {}
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def prefill(self, ids: Tensor, mask: Tensor, room: int) -> Tensor:
        """States [B, D] after prompts [B, P], padded on the left; `room` is the number of tokens to come."""
        used = ids.size(1)
        states = super().prefill(ids, mask, -(-(used + room) // ROOM) * ROOM - used)
        hidden = states.new_full((len(ids), 1, 1, len(self.cosine)), float("-inf"))
        hidden[..., :used].masked_fill_(mask[:, None, None].bool(), 0.0)
        self._enter(self.position, torch.tensor([used - 1], device=ids.device), hidden, self.cached, used)
        return states

    def step(self, tokens: Tensor) -> Tensor:
        """States [B, D] after one more token [B] for each row; the next step writes over them."""
        frame = self.frame
        frame.tokens.copy_(tokens)
        frame.position.add_(1)
        frame.slot.add_(1)
        frame.hidden.index_fill_(3, frame.slot, 0.0)
        if self.pool is None:
            return self.advance(frame.tokens)
        if frame.graph is None:
            self._capture(frame)
        frame.graph.replay()
        return frame.states

    def staying(self, rows: int, alive: int) -> int:
        """How many of the `rows` to keep when `alive` of them have not finished: half, a quarter and so on."""
        while alive <= (half := (rows + 1) // 2) < rows:
            rows = half
        return rows

    def keep(self, rows: Tensor) -> None:
        """Only the rows [n] go on."""
        old = self.frame
        layers = [SimpleNamespace(keys=layer.keys[rows], values=layer.values[rows]) for layer in old.layers]
        self._enter(old.position[rows], old.slot, old.hidden[rows], layers, old.hidden.size(-1))

    def _enter(self, position: Tensor, slot: Tensor, hidden: Tensor, layers: list[Any], used: int) -> None:
        """Go on in the frame of this many rows and tokens, from copies of these and of `used` places of `layers`.

        `position` is [B], `slot` [1], `hidden` [B, 1, 1, T], and keys and values of a layer are [B, G, T, W].
        """
        shape = len(position), hidden.size(-1)
        if shape not in self.frames:
            place = slot.clone()
            fresh = [StaticLayer(layer.keys, place) for layer in layers]
            tables = self.cosine.clone(), self.sine.clone()
            self.frames[shape] = Frame(
                torch.zeros_like(position), position.clone(), place, hidden.clone(), tables, fresh
            )
        frame = self.frame = self.frames[shape]
        for target, source in ((frame.position, position), (frame.slot, slot), (frame.hidden, hidden)):
            target.copy_(source)
        for target, source in zip(frame.layers, layers, strict=True):
            target.keys[:, :, :used], target.values[:, :, :used] = source.keys[:, :, :used], source.values[:, :, :used]
        self.position, self.hidden, self.cached = frame.position, frame.hidden, frame.layers
        self.cosine, self.sine = frame.tables

    def _capture(self, frame: Frame) -> None:
        """Record the step of a frame; it runs once before, as kernels choose their workspaces when they first run."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.advance(frame.tokens)
        torch.cuda.current_stream().wait_stream(stream)
        frame.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(frame.graph, pool=self.pool):
            frame.states = self.advance(frame.tokens)
