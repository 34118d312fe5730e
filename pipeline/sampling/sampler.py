"""Replies sampled from a policy, with the log-probability of every token recorded as it is drawn.

B: prompts sampled at once, N: prompts, R: most reply tokens, V: vocabulary, D: width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from threefold.errors import UserError
from threefold.models import Model, loading
from threefold.models.likelihood import left_padded
from threefold.sampling import decoding
from threefold.sampling.decoding import Decoder, FusedDecoder
from threefold.sampling.static_decoding import StaticDecoder
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
    log-probabilities are those of that same distribution. Prompts are batched by length, so that batches hold little
    padding. `uniforms` [N, R] has the random numbers of each reply, so that a reply does not depend on its batch. `bar`
    is a progress bar that counts samples; `value_head` maps states [B, D] to values [B, 1].
    """
    uniforms, decoder = uniforms.to(model.device), decoder_for(model, sampling)
    how = sampling.temperature, tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        ids, mask = left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, model.device)
        drawn = _sample_batch(decoder, value_head, ids, mask, uniforms[batch], *how)
        for i, *row in zip(batch, *(tensor.tolist() for tensor in drawn), strict=True):
            replies[i] = _reply(*row, tokenizer.eos_token_id)
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
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Tokens, log-probabilities and values, all [B, R]; what follows a reply's end token means nothing."""
    most, rows = uniforms.size(1), torch.arange(len(ids), device=ids.device)
    tokens = torch.full(uniforms.shape, end, device=ids.device)
    logprobs, values = (torch.zeros(uniforms.shape, device=ids.device) for _ in range(2))
    alive = torch.ones_like(rows, dtype=torch.bool)
    states = decoder.prefill(ids, mask, most - 1)
    for t in range(most):
        drawn, logprobs[rows, t] = draw(decoder.logits(states), temperature, uniforms[rows, t])
        tokens[rows, t] = drawn
        if value_head is not None:
            values[rows, t] = value_head(states)[:, 0].float()
        alive &= drawn != end
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


def _reply(ids: list[int], logprobs: list[float], values: list[float], end: int) -> Reply:
    ended = end in ids
    length = ids.index(end) + 1 if ended else len(ids)
    return Reply(ids[:length], logprobs[:length], ended, values[:length])


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
