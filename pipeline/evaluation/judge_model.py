"""A local judge model: of two replies to a prompt, which one a causal language model calls the better.

Every pair is asked twice, with the replies in both orders, since models prefer a place (Wang et al. 2023, arXiv
2305.17926; Zheng et al. 2023, arXiv 2306.05685). The verdict is read from the probabilities of two words; nothing is
sampled. P: prompts, M: models.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from threefold.columns import Message
from threefold.errors import UserError
from threefold.evaluation.judge_template import question
from threefold.models import chat, checkpoints, likelihood, loading, template


@dataclass(frozen=True)
class Pair:
    """Two different replies to prompt number `prompt`, by the models `one` and `other`."""

    prompt: int
    one: str
    other: str


@dataclass(frozen=True)
class Verdict:
    """The probability that the reply of `pair.one` is better, when it was shown as A and when it was shown as B."""

    pair: Pair
    as_a: float
    as_b: float

    @property
    def mean(self) -> float:
        """The mean of both orders, in which a preference for a place cancels."""
        return (self.as_a + self.as_b) / 2

    def won(self, margin: float) -> float:
        """1 where `pair.one` wins, 0 where it loses, one half for a tie: a mean within `margin` of one half."""
        return 0.5 if abs(self.mean - 0.5) <= margin else float(self.mean > 0.5)


class JudgeModel:
    """A causal language model with the question that it is asked; `config` is `evaluate.judge_model`."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: Any):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.question = question(config.template, tuple(config.verdicts))
        self.verdicts = verdict_tokens(tokenizer, list(config.verdicts))
        _require_template(tokenizer, config)

    def ids(self, prompt: list[Message], reply_a: str, reply_b: str) -> list[int]:
        """Token ids of the question, up to where the verdict stands; special tokens are taken out of the texts."""
        message = {"role": "user", "content": self.question(prompt, reply_a, reply_b)}
        if self.config.chat:
            return chat.prompt_ids(self.tokenizer, [message])
        return self.tokenizer(chat.without_special(self.tokenizer, [message])[0]["content"])["input_ids"]

    @torch.inference_mode()
    def probabilities(self, questions: list[list[int]], bar: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Of each question [Q] the probability of the first verdict among the two, and that of both among all words.

        Questions are batched by length, so that batches hold little padding.
        """
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        first, both = np.zeros(len(questions)), np.zeros(len(questions))
        for start in range(0, len(order), self.config.batch_size):
            batch = order[start : start + self.config.batch_size]
            logits = likelihood.next_logits(self.model, [questions[i] for i in batch], self.verdicts[0])
            logprobs = logits.log_softmax(-1)[:, self.verdicts]
            first[batch], both[batch] = logprobs.softmax(-1)[:, 0].cpu(), logprobs.exp().sum(-1).cpu()
            if bar is not None:
                bar.update(len(batch))
        if not np.isfinite(first).all():
            raise UserError(f"evaluate.judge_model.path={self.config.path}: its probabilities are no finite numbers")
        return first, both


def load(config: Any, device: Any, template_date: str) -> JudgeModel:
    """The judge model of `evaluate.judge_model`, in bf16 where `device` computes in it; no code of the model's runs."""
    tokenizer = _checked_tokenizer(config, template_date)
    dtype = torch.bfloat16 if device.bf16 else torch.float32
    model = checkpoints.load(
        AutoModelForCausalLM, config.path, _name(config), dtype=dtype, revision=config.revision or "main"
    )
    return JudgeModel(model.to(device.type).eval(), tokenizer, config)


def check(config: Any, template_date: str) -> None:
    """Check verdicts and template of the judge's checkpoint before anything is sampled; raises `UserError`."""
    tokenizer = _checked_tokenizer(config, template_date)
    _require_template(tokenizer, config)
    verdict_tokens(tokenizer, list(config.verdicts))


def weight_bytes(folder: str) -> int:
    """Size of the weights in a model folder; 0 for a name on the hub."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _checked_tokenizer(config: Any, template_date: str) -> Any:
    checkpoints.check(config.path, _name(config), config.revision)
    tokenizer = chat.load_tokenizer(config.path, _name(config), revision=config.revision or "main")
    template.settle(tokenizer, template_date)
    return tokenizer


def _name(config: Any) -> str:
    return f"evaluate.judge_model.path={config.path}"


def _require_template(tokenizer: Any, config: Any) -> None:
    if config.chat and not tokenizer.chat_template:
        raise UserError(f"evaluate.judge_model.chat=true: {config.path} has no chat template; set it to false")


def verdict_tokens(tokenizer: Any, words: list[str]) -> list[int]:
    """The one token of each verdict word. Raises `UserError` where a word has several, or both have the same."""
    tokens = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, ids in zip(words, tokens, strict=True):
        if len(ids) != 1:
            raise UserError(
                f"evaluate.judge_model.verdicts: {word!r} is {len(ids)} tokens for this model; choose a word of one"
            )
    if tokens[0] == tokens[1]:
        raise UserError(f"evaluate.judge_model.verdicts: {words[0]!r} and {words[1]!r} are the same token")
    return [ids[0] for ids in tokens]


def pairs(replies: dict[str, list[str]], prompts: int) -> tuple[list[Pair], list[Pair]]:
    """Each two models' replies to the first `prompts` prompts: those that differ, and those that are the same."""
    different: list[Pair] = []
    same: list[Pair] = []
    for i in range(prompts):
        for one, other in itertools.combinations(replies, 2):
            (same if replies[one][i] == replies[other][i] else different).append(Pair(i, one, other))
    return different, same


def judge(
    model: JudgeModel, prompts: list[list[Message]], replies: dict[str, list[str]], asked: list[Pair], bar: Any = None
) -> tuple[list[Verdict], dict[str, Any]]:
    """A verdict on each pair whose two questions fit the model's context, and what there is to know of the judge.

    Raises `UserError` where none fits.
    """
    sides = [(prompts[p.prompt], replies[p.one][p.prompt], replies[p.other][p.prompt]) for p in asked]
    questions = [(model.ids(prompt, a, b), model.ids(prompt, b, a)) for prompt, a, b in sides]
    longest = loading.context_length(model.model.config)
    fits = [i for i, both in enumerate(questions) if max(map(len, both)) <= longest]
    if asked and not fits:
        raise UserError(f"evaluate.judge_model: every question is longer than the model's context of {longest} tokens")
    first, mass = model.probabilities([ids for i in fits for ids in questions[i]], bar)
    verdicts = [Verdict(asked[i], first[2 * n], 1 - first[2 * n + 1]) for n, i in enumerate(fits)]
    return verdicts, bias(verdicts) | {
        "verdict_share": float(mass.mean()) if len(mass) else None,
        "too_long": len(asked) - len(fits),
    }


def bias(verdicts: list[Verdict]) -> dict[str, Any]:
    """How often the order decides: `flipped_share` of pairs whose verdict changes with it, and `first_share`.

    `first_share` is the share of questions, two to a pair, on which the reply shown as A is preferred; 0.5 is no bias.
    """
    if not verdicts:
        return {"pairs": 0, "flipped_share": None, "first_share": None}
    as_a, as_b = np.array([v.as_a for v in verdicts]), np.array([v.as_b for v in verdicts])
    return {
        "pairs": len(verdicts),
        "flipped_share": float(np.mean((as_a > 0.5) != (as_b > 0.5))),
        "first_share": float(np.mean([as_a > 0.5, as_b < 0.5])),
    }


def wins(verdicts: list[Verdict], same: list[Pair], models: list[str], prompts: int, margin: float) -> np.ndarray:
    """Wins [P, M, M] as the arena counts them; equal replies are a tie that nobody was asked about."""
    counted, at = np.zeros((prompts, len(models), len(models))), {name: i for i, name in enumerate(models)}
    won = [(v.pair, v.won(margin)) for v in verdicts] + [(pair, 0.5) for pair in same]
    for pair, share in won:
        counted[pair.prompt, at[pair.one], at[pair.other]] = share
        counted[pair.prompt, at[pair.other], at[pair.one]] = 1 - share
    return counted


def rows(verdicts: list[Verdict], margin: float) -> list[dict[str, Any]]:
    """The verdicts as lines of verdicts.jsonl; `prompt` is the number of the row in samples.jsonl, from 0."""
    return [
        {
            "prompt": v.pair.prompt,
            "model_a": v.pair.one,
            "model_b": v.pair.other,
            "as_a": v.as_a,
            "as_b": v.as_b,
            "winner": {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}[v.won(margin)],
        }
        for v in verdicts
    ]
