"""Replies sampled from a policy, with the log-probability of every token recorded as it is drawn.

B: prompts sampled at once, N: prompts, R: most reply tokens, V: vocabulary, D: width.

The fused decoder with tensors that keep shape and address, so that on a GPU a step is one CUDA graph.

Launching a step's kernels one by one takes longer than a small model needs to run them; a graph launches all at once.
B: rows, T: tokens there is room for, G: key and value heads, W: width of a head, D: width.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from threefold.errors import UserError
from threefold.models import Model, chat, loading
from threefold.models.likelihood import left_padded
from threefold.sampling import decoding
from threefold.sampling.decoding import Decoder, FusedDecoder
from threefold.schema.stages import SamplingConfig


@dataclass
class Reply:
    """A sampled reply: token ids, the end token included if it was drawn, and their log-probabilities.

    `values` are those of the text before each token; 0 without a value head.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
    values: list[float]


@torch.inference_mode()
def sample(
    model: Model,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    tokenizer: Any,
    uniforms: Tensor,
    bar: Any = None,
    value_head: nn.Module | None = None,
) -> list[Reply]:
    """One reply to each prompt (token ids), in the order of the prompts.

    Tokens are drawn from softmax(logits / temperature) without top-k, top-p or a least length, and their
    log-probabilities are those of that same distribution. A reply ends at any of `chat.end_ids`. Prompts are batched by
    length, so that batches hold little padding. `uniforms` [N, R] has the random numbers of each reply, so that a reply
    does not depend on its batch. `bar` is a progress bar that counts samples; `value_head` maps states [B, D] to values
    [B, 1].
    """
    uniforms, decoder = uniforms.to(model.device), decoder_for(model, sampling)
    ends = chat.end_ids(tokenizer)
    how = sampling.temperature, torch.tensor(ends, device=model.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        ids, mask = left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        drawn = _sample_batch(decoder, value_head, ids, mask, uniforms[batch], *how)
        for i, *row in zip(batch, *(tensor.tolist() for tensor in drawn), strict=True):
            replies[i] = _reply(*row, ends)
        if bar is not None:
            bar.update(len(batch))
    return [replies[i] for i in range(len(prompts))]


def decoder_for(model: Model, sampling: SamplingConfig) -> Decoder:
    """The fastest decoder that is right for the model, or the one with a static cache where that is asked for."""
    if sampling.static_cache:
        require_static(model)
    kind = decoding.kind_for(model)
    return StaticDecoder(model) if sampling.static_cache and kind is FusedDecoder else kind(model)


def require_static(model: Model) -> None:
    """Raises `UserError` where the model cannot be sampled from with a static cache."""
    if not decoding.fusible(model):
        raise UserError(
            f"sampling.static_cache=true: not for {model.config.model_type} of this form; set it to false "
            f"(known: {', '.join(decoding.FUSED)}, with full attention and SiLU)"
        )


def with_room(prompts: list[list[int]], model: Model, sampling: SamplingConfig) -> list[int]:
    """Numbers of the prompts (token ids) that leave room for a reply. Raises `UserError` when none does."""
    room = loading.context_length(model.config) - sampling.max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting:
        raise UserError(f"sampling.max_new_tokens={sampling.max_new_tokens}: leaves no room for any prompt")
    return fitting


def _sample_batch(
    decoder: Decoder, value_head: nn.Module | None, ids: Tensor, mask: Tensor, uniforms: Tensor, temperature: float,
    ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens, log-probabilities and values, all [B, R]; what follows the first of the tokens `ends` means nothing."""
    most, rows = uniforms.size(1), torch.arange(len(ids), device=ids.device)
    tokens = ends[0].repeat(uniforms.shape)
    logprobs, values = (torch.zeros(uniforms.shape, device=ids.device) for _ in range(2))
    alive = torch.ones_like(rows, dtype=torch.bool)
    states = decoder.prefill(ids, mask, most - 1)
    for t in range(most):
        drawn, logprobs[rows, t] = draw(decoder.logits(states), temperature, uniforms[rows, t])
        tokens[rows, t] = drawn
        if value_head is not None:
            values[rows, t] = value_head(states)[:, 0].float()
        alive &= (drawn[:, None] != ends).all(1)
        left = int(alive.sum())
        if left == 0 or t + 1 == most:
            break
        staying = decoder.staying(len(rows), left)
        if staying < len(rows):  # finished rows leave the batch
            going = (~alive).byte().argsort(stable=True)[:staying]
            decoder.keep(going)
            rows, alive, drawn = rows[going], alive[going], drawn[going]
        states = decoder.step(drawn)
    return tokens, logprobs, values


def _reply(ids: list[int], logprobs: list[float], values: list[float], ends: list[int]) -> Reply:
    length = next((i for i, token in enumerate(ids, start=1) if token in ends), None)
    return Reply(ids[:length], logprobs[:length], length is not None, values[:length])


def draw(logits: Tensor, temperature: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A token [B] from each row of logits [B, V] by inverting its distribution at `uniforms` [B] in [0, 1).

    Returns the tokens and their log-probabilities [B].
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=logits.size(-1) - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def random_numbers(seed: int, replies: int, sampling: SamplingConfig) -> Tensor:
    """Uniform random numbers [N, R] for `sample`; the CPU draws them, so that they are the same for all devices."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(replies, sampling.max_new_tokens, dtype=torch.float64, generator=generator)


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
