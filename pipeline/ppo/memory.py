"""What PPO will take of memory, said before its models are loaded."""

import os

import psutil
import torch

from threefold.models.ensemble import Ensemble
from threefold.ppo.actors import Actors
from threefold.sampling.decoding import FUSED

KEPT_WIDTHS, KEPT_INNER, KEPT_LOGITS = 14, 4, 3  # vectors of a token that a block of Qwen3, its MLP and the loss keep
FLOAT = 4  # bytes; weights, gradients, optimisers and caches are fp32 but where autocast makes them smaller


def statement(actors: Actors, tokens: int, sampled: int, micro: int) -> dict[str, int]:
    """Bytes by what takes them; the models may be on the device "meta".

    `tokens` is the most that prompt and reply have,
    `sampled` the replies sampled at once, `micro` those of one forward and backward pass. Weights, gradients and
    Adam's two moments are exact, the cache is that of full-length replies, and activations are about what autograd
    keeps of one forward pass.
    """
    config = actors.policy.config
    found = {f"{name} weights": size for name, size in _weights(actors).items()}
    for name, trained in (("policy", actors.policy), ("critic", actors.critic)):
        if trained is not None:
            size = FLOAT * sum(p.numel() for p in trained.parameters())
            found[f"{name} gradient and Adam"] = 3 * size
    attention = getattr(config, "num_attention_heads", None)  # None for recurrent models, whose states do not grow
    heads = getattr(config, "num_key_value_heads", None) or attention or 0
    width = getattr(config, "head_dim", None) or config.hidden_size // (attention or 1)
    if config.model_type in FUSED:
        found["sampler's copies"] = found["policy weights"]
    found["cache"] = 2 * FLOAT * config.num_hidden_layers * sampled * tokens * heads * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = config.num_hidden_layers * (KEPT_WIDTHS * config.hidden_size + KEPT_INNER * inner)
    found["activations"] = FLOAT * micro * tokens * (per_token + KEPT_LOGITS * config.vocab_size)
    return found


def _weights(actors: Actors) -> dict[str, int]:
    """Bytes of the weights of each model; what two models share counts where it is seen first."""
    seen: set[int] = set()
    found = {}
    for name in ("policy", "reference", "critic", "reward_model"):
        actor = getattr(actors, name)
        if actor is None:
            continue
        parameters = []
        for model in actor.members if isinstance(actor, Ensemble) else [actor]:
            parameters += [*getattr(model, "base", model).parameters(), *model.parameters()]
        new = {id(p): p for p in parameters if id(p) not in seen}
        seen |= set(new)
        if new:
            found[name.replace("_", " ")] = sum(p.numel() * p.element_size() for p in new.values())
    return found


def line(found: dict[str, int], free: int) -> str:
    """The statement on one line; `free` are the bytes that are free."""
    parts = ", ".join(f"{name} {_readable(size)}" for name, size in found.items())
    return f"memory: about {_readable(sum(found.values()))} of {_readable(free)} free: {parts}"


def _readable(size: int) -> str:
    """Bytes with the unit that suits them."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u or n == "kB")
    return f"{size / unit:.3g} {name}"


def available(device: str) -> int:
    """Bytes that are free: of the GPU where `device` is cuda, otherwise this process's share of the machine's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shortage(found: dict[str, int], free: int) -> str | None:
    """What to do when this will not fit into `free` bytes, or None."""
    if sum(found.values()) <= free:
        return None
    return "this will not fit: lower runtime.micro_batch_size or sampling.batch_size, or set ppo.lora_rank"
