"""The sampler beside transformers' `generate`: tokens per second of a 3M-parameter model on one thread.

Two kinds of replies: all of one length (no end token), and ending by themselves as PPO's do. `generate` runs as it is,
and returning log-probabilities, as PPO needs them and as the sampler always does.
Command: make bench-sampler
"""

import argparse
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from paired import Round, contest, show
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from threefold.execution import device
from threefold.sampling import sampler

PROMPT, MOST, TEMPERATURE = 32, 64, 0.7  # tokens of a prompt, most tokens of a reply
PAD, END = 0, 1
PLAIN = "generate"
SHAPE = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 6, "vocab_size": 2048, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def model_of(model_type: str, ending: bool) -> nn.Module:
    """A random model whose replies end with probability 1/32 per token, or never."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE, head_dim=32, pad_token_id=PAD, eos_token_id=END, dtype="float32")
    model = AutoModelForCausalLM.from_config(config).eval()
    head = nn.Linear(SHAPE["hidden_size"], SHAPE["vocab_size"])
    head.weight, head.bias.data = model.get_output_embeddings().weight, torch.zeros(SHAPE["vocab_size"])
    head.bias.data[END] = TEMPERATURE * np.log(SHAPE["vocab_size"] / 31) if ending else -1e4
    model.set_output_embeddings(head)
    return model


def by_generate(model: nn.Module, prompts: torch.Tensor, logprobs: bool) -> int:
    """Sample with `generate`; the tokens of replies, their end tokens included."""
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": TEMPERATURE}
    options |= {"return_dict_in_generate": True, "output_logits": logprobs, "max_new_tokens": MOST}
    found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    replies = found.sequences[:, PROMPT:]
    if logprobs:
        scaled = torch.stack(found.logits, 1) / TEMPERATURE
        scaled.log_softmax(-1).gather(-1, replies[..., None])
    ends = (replies == END).long()
    return int((ends.cumsum(1) - ends == 0).sum())


def by_sampler(model: nn.Module, prompts: torch.Tensor, seed: int) -> int:
    """Sample with ours; the tokens of replies."""
    limits = {"temperature": TEMPERATURE, "max_new_tokens": MOST, "batch_size": len(prompts), "static_cache": False}
    limits = OmegaConf.create(limits)
    numbers = sampler.random_numbers(seed, len(prompts), limits)
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=END)
    return sum(len(r.ids) for r in sampler.sample(model, prompts.tolist(), limits, tokenizer, numbers))


def contests(rounds: int, model_type: str = "llama") -> dict[str, list[Any]]:
    """The contests of both kinds of replies at three batches, each shown when it is done."""
    made = {}
    for ending, batch in itertools.product((False, True), (128, 32, 1)):
        entries = contest(ways(model_of(model_type, ending), batch), rounds, PLAIN)
        title = f"sampling, replies {'ending' if ending else 'of one length'}, batch {batch}"
        show(title, "tokens", PLAIN, entries)
        made[title] = entries
    return made


def ways(model: nn.Module, batch: int) -> dict[str, Callable[[], Round]]:
    """`generate`, `generate` with log-probabilities, and ours, each round on the same prompts."""

    def on_prompts(sample: Callable[[torch.Tensor, int], int]) -> Callable[[], Round]:
        numbers = itertools.count()

        def prepare() -> Round:
            number = next(numbers)
            torch.manual_seed(number)
            prompts = torch.randint(2, SHAPE["vocab_size"], (batch, PROMPT))
            return lambda: sample(prompts, number)

        return prepare

    return {
        PLAIN: on_prompts(lambda prompts, _: by_generate(model, prompts, False)),
        "generate, log-probabilities": on_prompts(lambda prompts, _: by_generate(model, prompts, True)),
        "Threefold": on_prompts(lambda prompts, number: by_sampler(model, prompts, number)),
    }


def main() -> None:
    """Take turns, so that all see the same moods of the machine; medians of tokens per second and of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model-type", default="llama", help="architecture: llama, qwen3, qwen2, mistral, ...")
    given = parser.parse_args()
    device.set_up(OmegaConf.create({"device": "cpu", "threads": 1, "keep_freed_memory": True}), "fp32")
    contests(given.rounds, given.model_type)


if __name__ == "__main__":
    main()
