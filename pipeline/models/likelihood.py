"""Log-probabilities, scores and bits per byte of token sequences.

B: batch, P: prompt tokens, R: reply tokens, T: tokens, V: vocabulary, D: width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.models import Model, loading


def left_padded(sequences: list[list[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Sequences as [B, T] with padding on the left, and the attention mask [B, T]."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def right_padded(
    sequences: list[list[int]], pad: int, device: torch.device | str, length: int = 0
) -> tuple[Tensor, Tensor]:
    """Sequences as [B, T] with padding on the right (T at least `length`), and the mask of real tokens [B, T]."""
    longest = max(length, *map(len, sequences))
    ids = torch.tensor([s + [pad] * (longest - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=device)
    return ids, mask


def tokens_first(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T] with padding anywhere, and their mask, with all padding moved to the right.

    No causal model sees it there, whether its positions are learned, rotary or ALiBi, or its state is recurrent.
    """
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def reply_states(model: Model, prompt: Tensor, prompt_mask: Tensor, reply: Tensor, reply_mask: Tensor) -> Tensor:
    """Hidden states [B, R, D] of the text before each reply token; prompts [B, P] are padded left, replies right."""
    ids, mask = tokens_first(torch.cat([prompt, reply[:, :-1]], 1), torch.cat([prompt_mask, reply_mask[:, :-1]], 1))
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows, last = torch.arange(len(ids), device=ids.device)[:, None], prompt_mask.sum(1, keepdim=True) - 1
    return states[rows, last + torch.arange(reply.size(1), device=ids.device)]


def reply_logits(model: Model, prompt: Tensor, prompt_mask: Tensor, reply: Tensor, reply_mask: Tensor) -> Tensor:
    """Logits [B, R, V] that predict each reply token."""
    return loading.output_logits(model, reply_states(model, prompt, prompt_mask, reply, reply_mask)).float()


def next_logits(model: Model, sequences: list[list[int]], pad: int) -> Tensor:
    """Logits [B, V] of the token after each sequence."""
    ids, mask = right_padded(sequences, pad, model.device)
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return loading.output_logits(model, states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]).float()


def log_probabilities(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token of `ids` [...] under `logits` [..., V] at `temperature`."""
    logits = logits if temperature == 1 else logits / temperature
    return -F.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none").view_as(ids)


@torch.no_grad()
def scores(model: Model, sequences: list[list[int]], pad: int, batch_size: int = 128, bar: Any = None) -> list[float]:
    """The reward model's raw score [N] of each token sequence; batched by length, so that they hold little padding.

    `bar` is a progress bar that counts sequences, here and below.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    raw_scores = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = right_padded([sequences[i] for i in chosen], pad, model.device)
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(chosen), device=ids.device), mask.sum(1) - 1]
        for i, score in zip(chosen, model.score(last)[:, 0].tolist(), strict=True):
            raw_scores[i] = score
        advance(bar, len(chosen))
    return raw_scores


@torch.no_grad()
def replies_logprobs(
    model: Model, pairs: list[tuple[list[int], list[int]]], pad: int, batch_size: int = 64, bar: Any = None
) -> Tensor:
    """Summed log-probability [N] of each reply given its prompt, at temperature 1; pairs are (prompt, reply) ids."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    sums = torch.zeros(len(pairs))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompt, prompt_mask = left_padded([pairs[i][0] for i in batch], pad, model.device)
        reply, reply_mask = right_padded([pairs[i][1] for i in batch], pad, model.device)
        logprobs = log_probabilities(reply_logits(model, prompt, prompt_mask, reply, reply_mask), reply, 1.0)
        sums[batch] = (logprobs * reply_mask).sum(1).cpu()
        advance(bar, len(batch))
    return sums


@torch.no_grad()
def kl(
    policy: Model, reference: Model, prompts: list[list[int]], replies: list[list[int]], temperature: float,
    pad: int, batch_size: int = 64, bar: Any = None,
) -> float:  # fmt: skip
    """KL(policy, reference) in nats per reply, at `temperature`, from replies that the policy sampled.

    At each token the divergence of the two next-token distributions is summed exactly over the vocabulary, and added
    up over the reply: unbiased like the mean log ratio, with less variance.
    """
    total = 0.0
    for start in range(0, len(prompts), batch_size):
        prompt, prompt_mask = left_padded(prompts[start : start + batch_size], pad, policy.device)
        reply, mask = right_padded(replies[start : start + batch_size], pad, policy.device)
        ours, theirs = (
            (reply_logits(model, prompt, prompt_mask, reply, mask) / temperature).log_softmax(-1)
            for model in (policy, reference)
        )
        total += ((ours.exp() * (ours - theirs)).sum(-1) * mask).sum().item()
        advance(bar, len(prompt))
    return total / len(prompts)


@torch.no_grad()
def texts_nats(model: Model, texts: list[list[int]], context: int, batch_size: int = 64, bar: Any = None) -> float:
    """Total negative log-likelihood, in nats, of tokenised texts, each after its first token.

    Windows of `context` tokens overlap by half, and each token counts once, with at least half a window before it
    (but for a text's start). `bar` counts tokens.
    """
    stride = context // 2
    windows = [(ids[s : s + context], s) for ids in texts for s in range(0, max(1, len(ids) - stride), stride)]
    windows.sort(key=lambda window: len(window[0]))
    total = 0.0
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        inputs, mask = right_padded([ids for ids, _ in batch], 0, model.device)
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        nats = -log_probabilities(logits.float(), inputs.roll(-1, 1), 1.0)[:, :-1] * mask[:, 1:]
        total += sum(
            row[context - stride - 1 if start else 0 :].sum().item()
            for row, (_, start) in zip(nats, batch, strict=True)
        )
        advance(bar, sum(min(context - stride if start else context, len(ids)) for ids, start in batch))
    return total


def advance(bar: Any, count: int) -> None:
    """Move a progress bar on, where there is one."""
    if bar is not None:
        bar.update(count)


def bits_per_byte(nats: float, texts: list[str]) -> float:
    """Nats over all `texts` as bits per UTF-8 byte."""
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)
