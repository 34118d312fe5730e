"""What keeps a PPO run safe: the memory that it takes is known beforehand, and its checkpoints are whole or not there.

checkpoints/rollout-<n>/state.pt    weights and optimisers after n rollouts
checkpoints/rollout-<n>/state.json  the rollouts done and what else goes on from there
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from threefold.models.ensemble import Ensemble
from threefold.ppo.actors import Actors
from threefold.sampling.decoding import FUSED

KEPT_WIDTHS, KEPT_INNER, KEPT_LOGITS = 14, 4, 3  # vectors of a token that a block of Qwen3, its MLP and the loss keep
FLOAT = 4  # bytes; weights, gradients, optimisers and caches are fp32 but where autocast makes them smaller


def memory_needed(actors: Actors, tokens: int, sampled: int, micro_batch_size: int) -> dict[str, int]:
    """Bytes by what takes them; the models may be on the device "meta".

    `tokens` is the most that prompt and reply have, `sampled` the replies sampled at once, `micro_batch_size` those of
    one forward and backward pass. Weights, gradients and Adam's two moments are exact. The cache is that of full-length
    replies. Activations are about what autograd keeps of one forward pass.
    """
    config = actors.policy.config
    needed = {f"{name} weights": size for name, size in _weights(actors).items()}
    for name, trained in (("policy", actors.policy), ("critic", actors.critic)):
        if trained is not None:
            size = FLOAT * sum(p.numel() for p in trained.parameters())
            needed[f"{name} gradient and Adam"] = 3 * size
    attention = getattr(config, "num_attention_heads", None)  # None for recurrent models, whose states do not grow
    heads = getattr(config, "num_key_value_heads", None) or attention or 0
    width = getattr(config, "head_dim", None) or config.hidden_size // (attention or 1)
    if config.model_type in FUSED:
        needed["sampler's copies"] = needed["policy weights"]
    needed["cache"] = 2 * FLOAT * config.num_hidden_layers * sampled * tokens * heads * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = config.num_hidden_layers * (KEPT_WIDTHS * config.hidden_size + KEPT_INNER * inner)
    needed["activations"] = FLOAT * micro_batch_size * tokens * (per_token + KEPT_LOGITS * config.vocab_size)
    return needed


def _weights(actors: Actors) -> dict[str, int]:
    """Bytes of the weights of each model; what two models share counts where it is seen first."""
    seen: set[int] = set()
    sizes = {}
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
            sizes[name.replace("_", " ")] = sum(p.numel() * p.element_size() for p in new.values())
    return sizes


def memory_line(needed: dict[str, int], free: int) -> str:
    """The statement on one line; `free` are the bytes that are free."""
    parts = ", ".join(f"{name} {_readable(size)}" for name, size in needed.items())
    return f"memory: about {_readable(sum(needed.values()))} of {_readable(free)} free: {parts}"


def _readable(size: int) -> str:
    """Bytes with the unit that suits them."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u or n == "kB")
    return f"{size / unit:.3g} {name}"


def memory_available(device: str) -> int:
    """Bytes that are free: of the GPU where `device` is cuda, otherwise this process's share of the machine's."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_shortage(needed: dict[str, int], free: int) -> str | None:
    """What to do when this will not fit into `free` bytes, or None."""
    if sum(needed.values()) <= free:
        return None
    return "this will not fit: lower runtime.micro_batch_size or sampling.batch_size, or set ppo.lora_rank"


def save_state(folder: Path, parts: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the `state_dict` of every part, and `state` with its key `rollouts`; older checkpoints go then."""
    complete = folder / f"rollout-{state['rollouts']}"
    if complete.exists():  # this run was killed after writing it, and has come here again
        return
    fresh = complete.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    torch.save({name: part.state_dict() for name, part in parts.items()}, fresh / "state.pt")
    (fresh / "state.json").write_text(json.dumps(state))
    fresh.rename(complete)
    for other in folder.glob("rollout-*"):
        if other != complete:
            shutil.rmtree(other)


def load_state(folder: Path, parts: dict[str, Any]) -> dict[str, Any] | None:
    """Give every part its state in the last whole checkpoint; returns `state`, or None when there is no checkpoint."""
    files = [file for file in folder.glob("rollout-*/state.json") if file.parent.suffix != ".part"]
    states = [json.loads(file.read_text()) for file in files]
    if not states:
        return None
    last = max(states, key=lambda state: state["rollouts"])
    saved = torch.load(folder / f"rollout-{last['rollouts']}" / "state.pt", weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return last
