"""Replies sampled from a policy, with the log-probability of every token recorded as it is drawn.

B: prompts sampled at once, T: tokens so far, V: vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import DynamicCache

from pipeline.errors import UserError
from pipeline.likelihood import left_padded, positions


@dataclass
class Reply:
    """A sampled reply: token ids, the end token included if it was drawn, and their log-probabilities."""

    ids: list[int]
    logprobs: list[float]
    ended: bool


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: list[list[int]],
    sampling: DictConfig,
    tokenizer: Any,
    generator: torch.Generator,
    bar: Any = None,
) -> list[Reply]:
    """One reply to each prompt (token ids), in the order of the prompts.

    Tokens are drawn from softmax(logits / temperature) without top-k, top-p or a least length, and their
    log-probabilities are those of that same distribution. Prompts are batched by length, so that batches hold little
    padding. `bar` is a progress bar that counts samples.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[Reply | None] = [None] * len(prompts)
    for start in range(0, len(order), sampling.batch_size):
        batch = order[start : start + sampling.batch_size]
        drawn = _sample_batch(model, [prompts[i] for i in batch], sampling, tokenizer, generator)
        for i, reply in zip(batch, drawn, strict=True):
            replies[i] = reply
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.close()
    return replies


def with_room(prompts: list[list[int]], model: nn.Module, sampling: DictConfig) -> list[int]:
    """Numbers of the prompts (token ids) that leave room for a reply. Raises `UserError` when none does."""
    room = model.config.max_position_embeddings - sampling.max_new_tokens
    found = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not found:
        raise UserError(f"sampling.max_new_tokens={sampling.max_new_tokens}: leaves no room for any prompt")
    return found


def _sample_batch(
    model: nn.Module, prompts: list[list[int]], sampling: DictConfig, tokenizer: Any, generator: torch.Generator
) -> list[Reply]:
    replies = [Reply([], [], False) for _ in prompts]
    alive = list(range(len(prompts)))
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    position, cache = positions(mask), DynamicCache()
    for _ in range(sampling.max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens, logprobs = draw(logits, sampling.temperature, generator)
        for row, token, logprob in zip(alive, tokens.tolist(), logprobs.tolist(), strict=True):
            replies[row].ids.append(token)
            replies[row].logprobs.append(logprob)
            replies[row].ended = token == tokenizer.eos_token_id
        going = torch.tensor([i for i, row in enumerate(alive) if not replies[row].ended], device=model.device)
        if not len(going):
            break
        if len(going) < len(alive):  # finished rows leave the batch
            alive = [alive[i] for i in going.tolist()]
            cache.batch_select_indices(going)
            tokens, mask, position = tokens[going], mask[going], position[going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position[:, -1:] + 1
    return replies


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token [B] from each row of logits [B, V], and its log-probability [B]."""
    logprobs = (logits.float() / temperature).log_softmax(-1)
    tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def seeded(seed: int, device: torch.device | str) -> torch.Generator:
    """A random generator of its own on `device`."""
    return torch.Generator(device=device).manual_seed(seed)
