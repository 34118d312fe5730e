"""Ten steps of every training stage on inputs that are written here: no sample and no earlier stage decides them.

Weights come from NumPy's generator, which gives the same bits on every processor; torch's own differ in the last bits.
To write the figures anew, after a change that is meant to move them:
PYTHONPATH=tests/support python tests/whole/test_golden.py
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROMPTS, SENTENCES, make_job, make_ppo, tiny_policy, tiny_reward_model, tiny_tokenizer
from torch import nn

from threefold.data import preferences
from threefold.data.preferences import Pair
from threefold.data.reading import Example
from threefold.evaluation import held_out
from threefold.fileio import read_lines
from threefold.models import chat
from threefold.ppo import rollouts
from threefold.ppo.advantages import estimate
from threefold.sampling.sampler import Reply
from threefold.stages import dpo, ppo, pretrain, reward, sft
from threefold.training.packing import PackedRows

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
STEPS, BATCH = 10, 4
WORDS = " ".join(SENTENCES).split()


def weighted(model: nn.Module, seed: int, noise: float) -> nn.Module:
    """The model with weights drawn by NumPy, each changed by a random share `noise` of itself."""
    generator, disturbance = np.random.default_rng(seed), np.random.default_rng(seed + 100)
    with torch.no_grad():
        for p in model.parameters():
            drawn = generator.standard_normal(p.shape) * 0.2 + (p.ndim == 1)
            p.copy_(torch.from_numpy(drawn * (1 + noise * disturbance.standard_normal(p.shape))))
    return model


def sentence(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, generator.integers(1, 12)))


def pairs() -> list[Pair]:
    generator = np.random.default_rng(5)
    prompts = [[{"role": "user", "content": sentence(generator)}] for _ in range(STEPS * BATCH)]
    return [Pair(prompt, sentence(generator), sentence(generator), 0.5, "samples") for prompt in prompts]


def logged(job, *keys: str) -> dict[str, list[float]]:
    rows = read_lines(job.out / "log.jsonl")
    return {key: [row[key] for row in rows] for key in keys}


def pretraining(folder: Path, noise: float, *overrides: str) -> dict[str, list[float]]:
    job = make_job("pretrain", folder, f"pretrain.batch_size={BATCH}", "pretrain.context=16", *overrides)
    stream = np.random.default_rng(6).integers(7, 60, 16 * 23 + 5).astype(np.uint16)  # goes over it twice
    pretrain.fit(job, weighted(tiny_policy(), 1, noise), PackedRows(stream, 16, STEPS * BATCH), STEPS)
    return logged(job, "loss", "grad_norm")


def finetuning(folder: Path, noise: float, *overrides: str) -> dict[str, list[float]]:
    job = make_job("sft", folder, f"sft.batch_size={BATCH}", "sft.learning_rate=0.003", *overrides)
    examples = [Example(pair.prompt, pair.chosen) for pair in pairs()]
    rows = [sft.labelled(*ids) for ids in held_out.reply_pairs(tiny_tokenizer(), examples)]
    sft.fit(job, weighted(tiny_policy(), 2, noise), tiny_tokenizer(), rows, BATCH)
    return logged(job, "loss", "grad_norm")


def rewarding(folder: Path, noise: float, *overrides: str) -> dict[str, list[float]]:
    job = make_job("reward", folder, f"reward.batch_size={BATCH}", "reward.learning_rate=0.003", *overrides)
    rows = preferences.tokenised(tiny_tokenizer(), pairs(), 512)
    reward.fit(job, weighted(tiny_reward_model(), 3, noise), tiny_tokenizer(), rows, BATCH)
    return logged(job, "loss", "grad_norm")


def preferring(folder: Path, noise: float, *overrides: str) -> dict[str, list[float]]:
    job = make_job("dpo", folder, f"dpo.batch_size={BATCH}", "dpo.learning_rate=0.003", *overrides)
    rows = preferences.tokenised(tiny_tokenizer(), pairs(), 512)
    dpo.fit(job, weighted(tiny_policy(), 4, noise), tiny_tokenizer(), rows, BATCH)
    return logged(job, "loss", "grad_norm")


def optimising(folder: Path, noise: float, *overrides: str) -> dict[str, list[float]]:
    """Ten minibatches of PPO on replies that were not sampled."""
    options = ["ppo.epochs=5", "ppo.learning_rate=0.003", "ppo.critic_learning_rate=0.003", "ppo.max_grad_norm=1.0"]
    made = make_ppo(folder, BATCH, *options, *overrides)
    for seed, model in ((5, made.actors.policy), (5, made.actors.reference), (6, made.actors.critic)):
        weighted(model, seed, noise)
    made.optimizers = {name: ppo.adam(getattr(made.actors, name), made.config) for name in made.optimizers}
    generator, tokenizer = np.random.default_rng(7), tiny_tokenizer()
    texts = [chat.reply_ids(tokenizer, prompt.messages, sentence(generator)) for prompt in PROMPTS]
    replies = [Reply(ids, [0.0] * len(ids), True, [0.0] * len(ids)) for ids in texts]
    scores = generator.standard_normal(len(PROMPTS)).tolist()
    with torch.no_grad(), made.accelerator.autocast():
        rollout = rollouts.collect(
            made.actors, PROMPTS, replies, scores, 1.0, tokenizer.pad_token_id, None, BATCH, recompute_logprobs=True
        )
    advantages, returns, _ = estimate(rollout, 0.05, made.config)
    ppo.set_learning_rates(made, 1.0)
    halves = itertools.cycle(torch.arange(len(PROMPTS)).chunk(2))
    steps = [ppo.minibatch_step(made, rollout, advantages, returns, next(halves), step) for step in range(STEPS)]
    return {key: [step[key] for step in steps] for key in ("policy_loss", "value_loss", "grad_norm")}


STAGES = {
    "pretrain": pretraining, "sft": finetuning, "reward": rewarding, "dpo": preferring, "ppo": optimising,
}  # fmt: skip


def figures(noise: float, *overrides: str) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        return {stage: trained(Path(folder) / stage, noise, *overrides) for stage, trained in STAGES.items()}


def near(golden: dict[str, list[float]], share: float) -> dict[str, object]:
    return {name: pytest.approx(values, rel=share, abs=share / 10) for name, values in golden.items()}


# Seen on a processor with AVX2: differences of 2e-6 between kernels (ATEN_CPU_CAPABILITY), of 2e-5 where every weight
# changes by a random millionth, which is more than any rounding does to one; of 2e-2 in losses under bf16.
FP32, BF16 = 2e-4, 0.1


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_golden_ones(tmp_path, stage, noise):
    """Also with weights that differ by a millionth: a figure that rounding could move much is no golden one."""
    assert STAGES[stage](tmp_path, noise) == near(json.loads(GOLDEN.read_text())[stage], FP32)


# The same ten steps written out: AdamW on one unpadded row after the other, in double precision


def logprob(model: nn.Module, prompt: list[int], reply: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(reply)), reply]


def score(model: nn.Module, ids: list[int]) -> torch.Tensor:
    return model.score(model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1])


def sft_loss(model: nn.Module, rows: list[dict], _: nn.Module) -> torch.Tensor:
    return -torch.cat([logprob(model, row["prompt_ids"], row["chosen_ids"]) for row in rows]).mean()


def reward_loss(model: nn.Module, rows: list[dict], _: nn.Module) -> torch.Tensor:
    chosen, rejected = (
        torch.cat([score(model, row["prompt_ids"] + row[f"{side}_ids"]) for row in rows])
        for side in ("chosen", "rejected")
    )
    return (nn.functional.softplus(rejected - chosen) + 0.01 * (chosen + rejected) ** 2).mean()


def dpo_loss(model: nn.Module, rows: list[dict], reference: nn.Module) -> torch.Tensor:
    def change(row: dict, side: str) -> torch.Tensor:
        given = row["prompt_ids"], row[f"{side}_ids"]
        return logprob(model, *given).sum() - logprob(reference, *given).sum().detach()

    margins = torch.stack([change(row, "chosen") - change(row, "rejected") for row in rows])
    return nn.functional.softplus(-0.1 * margins).mean()


@pytest.mark.parametrize(
    ("stage", "made", "seed", "loss_of"),
    [
        ("sft", tiny_policy, 2, sft_loss),
        ("reward", tiny_reward_model, 3, reward_loss),
        ("dpo", tiny_policy, 4, dpo_loss),
    ],
)
def test_golden_losses_are_those_of_a_plain_loop(stage, made, seed, loss_of):
    """The learning rate falls linearly from 0.003, gradients are clipped at norm 1, and there is no weight decay."""
    model, reference = (weighted(made(), seed, 0.0).double() for _ in range(2))
    rows, losses = preferences.tokenised(tiny_tokenizer(), pairs(), 512).rows, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / STEPS)
        loss = loss_of(model, rows[step * BATCH : (step + 1) * BATCH], reference)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == near(json.loads(GOLDEN.read_text())[stage], FP32)["loss"]


# Processors


SETTINGS = [
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_losses_are_the_golden_ones_on_every_kind_of_processor(tmp_path, setting, precision):
    """In a process of its own, as torch reads these variables when it starts."""
    if precision == "bf16" and len(setting) != 1:
        pytest.skip("bf16 is slow on such processors; other cases have it")
    unset = {name: value for name, value in os.environ.items() if name not in {n for s in SETTINGS for n in s}}
    support = str(Path(__file__).parents[1] / "support")  # which pytest alone has on its path
    environment = unset | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": support} | setting
    threads = f"runtime.threads={environment['OMP_NUM_THREADS']}"
    command = [sys.executable, __file__, str(tmp_path / "losses.json"), f"precision={precision}", threads]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    golden, losses = (json.loads(file.read_text()) for file in (GOLDEN, tmp_path / "losses.json"))
    if precision == "fp32":
        assert losses == {stage: near(golden[stage], FP32) for stage in STAGES}
    for stage in STAGES:
        assert losses[stage][LOSS.get(stage, "loss")] == near(golden[stage], BF16)[LOSS.get(stage, "loss")], stage


LOSS = {"ppo": "policy_loss"}


if __name__ == "__main__":
    file, *overrides = sys.argv[1:] or [str(GOLDEN)]
    Path(file).write_text(json.dumps(figures(0.0, *overrides), indent=1) + "\n")
