"""PPO of this project beside a straightforward one: speed, what each measure brings, and the gain that both reach.

The straightforward one samples with `generate`, computes log-probabilities again from whole sequences, and holds four
separate models. Models, prompts, batch, minibatches, epochs, learning rates and KL coefficient are the same.
Command: make bench-ppo. One thread; it makes the demo's reward model first if it is not there.
"""

import argparse
import itertools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from paired import Round, contest, show
from rich.console import Console
from rich.table import Table
from torch import Tensor

from threefold import chain, rewards
from threefold.config.compose import compose
from threefold.evaluation import held_out
from threefold.execution.job import Job, quiet_libraries
from threefold.fileio import read_json
from threefold.models import chat, ensemble, likelihood, loading
from threefold.ppo import advantages as estimators
from threefold.ppo import rollouts
from threefold.ppo.advantages import estimate
from threefold.sampling import sampler
from threefold.stages import evaluate, ppo

CHUNK = 32  # rows per forward pass
# a value head alone wants a higher rate, and so does the trunk that it shares
SHARED = ("ppo.critic=shared", "ppo.critic_learning_rate=0.01", "ppo.learning_rate=0.0005")


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, T] that count real tokens only, whichever side the padding is on."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Plain:
    """PPO as one would write it first. B: replies, T: tokens of prompt and reply, R: reply tokens, V: vocabulary."""

    def __init__(self, job: Job):
        self.config, self.limits = job.config.ppo, job.config.sampling
        self.tokenizer = chat.require_same_template(job.inputs)
        self.policy, self.reference = (loading.load_policy(job.inputs["sft"]) for _ in range(2))
        self.critic, self.reward_model = (loading.load_reward_model(job.inputs["reward"]) for _ in range(2))
        rates = ((self.policy, self.config.learning_rate), (self.critic, self.config.critic_learning_rate))
        self.optimizers = [torch.optim.Adam(m.parameters(), lr, eps=self.config.adam_eps) for m, lr in rates]
        self.peaks = [lr for _, lr in rates]

    def rollout(self, prompts: list[list[int]], number: int, total: int) -> None:
        """Sample, score and train on one batch of prompts."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * (1 - number / total)
        torch.manual_seed(self.config.seed * 1000 + number)
        with torch.no_grad():
            ids, attention, mask, width = self.sample(prompts)
            chunks = torch.arange(len(ids)).split(CHUNK)
            old, reference, values = (
                torch.cat([forward(model, ids[c], attention[c], width) for c in chunks]) * mask
                for model, forward in (
                    (self.policy, self.logprobs),
                    (self.reference, self.logprobs),
                    (self.critic, self.values),
                )
            )
            scores = torch.cat([self.scores(ids[c], attention[c]) for c in chunks])
            ended = (ids[:, width:] == self.tokenizer.eos_token_id).any(1)
            scores = torch.where(ended, scores, scores.clamp(max=self.config.missing_end_penalty))
        rewards = estimators.token_rewards(scores, old - reference, self.config.kl_coef, mask)
        advantages, returns = estimators.gae(rewards, values, mask, self.config.gamma, self.config.gae_lambda)
        advantages = estimators.whiten(advantages, mask)
        for _ in range(self.config.epochs):
            for rows in torch.randperm(len(ids)).chunk(self.config.minibatches):
                given = [x[rows] for x in (ids, attention, mask, old, values, advantages, returns)]
                self.step(*given, width)

    def sample(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Sequences [B, T], their attention mask [B, T], the mask of reply tokens [B, R], and the prompts' width."""
        prompt, prompt_mask = likelihood.left_padded(prompts, self.tokenizer.pad_token_id, "cpu")
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": self.limits.temperature}
        ids = self.policy.generate(
            prompt, attention_mask=prompt_mask, max_new_tokens=self.limits.max_new_tokens, **options
        )
        ends = (ids[:, prompt.size(1) :] == self.tokenizer.eos_token_id).long()
        mask = (ends.cumsum(1) - ends == 0).long()
        return ids, torch.cat([prompt_mask, mask], 1), mask, prompt.size(1)

    def logprobs(self, model: Any, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """Log-probabilities [B, R] of the reply tokens."""
        position = positions(attention)
        logits = model(input_ids=ids, attention_mask=attention, position_ids=position, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1] / self.limits.temperature, -1)
        return logprobs.gather(-1, ids[:, 1:, None])[:, width - 1 :, 0]

    def values(self, model: Any, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """Values [B, R] of the text before each reply token."""
        position = positions(attention)
        states = model.base_model(input_ids=ids, attention_mask=attention, position_ids=position, use_cache=False)
        return ensemble.normalised(model, model.score(states.last_hidden_state)[:, width - 1 : -1, 0])

    def scores(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Normalised scores [B] at the last token."""
        position = positions(attention)
        states = self.reward_model.base_model(input_ids=ids, attention_mask=attention, position_ids=position)
        last = attention.size(1) - 1 - attention.flip(1).argmax(1)
        raw = self.reward_model.score(states.last_hidden_state)[torch.arange(len(ids)), last, 0]
        return ensemble.normalised(self.reward_model, raw)

    def step(
        self, ids: Tensor, attention: Tensor, mask: Tensor, old: Tensor, old_values: Tensor, advantages: Tensor,
        returns: Tensor, width: int,
    ) -> None:  # fmt: skip
        """One optimiser step of policy and critic on a minibatch."""
        logprobs = self.logprobs(self.policy, ids, attention, width)
        values = self.values(self.critic, ids, attention, width)
        policy, _ = estimators.policy_losses(logprobs, old, advantages, self.config.clip_range)
        value, _ = estimators.value_losses(values, old_values, returns, self.config.value_clip_range)
        loss = estimators.masked_mean(policy + self.config.value_coef * value, mask)
        loss.backward()
        for model, optimizer in zip((self.policy, self.critic), self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


class Ours:
    """The stage's own functions, one rollout at a time."""

    def __init__(self, job: Job):
        self.made = ppo.load(job)
        self.policy = self.made.actors.policy

    def prompts(self) -> list[rollouts.Prompt]:
        """The pool of prompts of the stage."""
        return rollouts.prompt_pool(self.made.job, self.made.tokenizer, self.policy)

    def rollout(self, prompts: list[rollouts.Prompt], number: int, total: int) -> None:
        """Sample, score and train on one batch of prompts."""
        rollout = ppo.roll_out(self.made, prompts, number)
        advantages, returns, _ = estimate(rollout, self.made.kl_coef, self.made.config)
        ppo.set_learning_rates(self.made, 1 - number / total)
        ppo.update(self.made, rollout, advantages, returns, number)


def with_generate(model: Any, prompts: list[list[int]], limits: Any, tokenizer: Any, numbers: Tensor, **options: Any):
    """`sampling.sample` by `generate`, with a second pass for log-probabilities and values."""
    prompt, mask = likelihood.left_padded(prompts, tokenizer.pad_token_id, "cpu")
    torch.manual_seed(int(numbers[0, 0] * 1e6))
    with torch.no_grad():
        chosen = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": limits.temperature}
        ids = model.generate(prompt, attention_mask=mask, max_new_tokens=limits.max_new_tokens, **chosen)
    replies = [cut(row, tokenizer.eos_token_id) for row in ids[:, prompt.size(1) :].tolist()]
    return scored_again(model, prompts, replies, limits, tokenizer, **options)


def cut(ids: list[int], end: int) -> list[int]:
    """A reply up to its end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


@torch.no_grad()
def scored_again(
    model: Any, prompts: list[list[int]], replies: list[list[int]], limits: Any, tokenizer: Any, value_head: Any = None
) -> list[sampler.Reply]:
    """Replies with log-probabilities and values from a forward pass over prompt and reply."""
    found = []
    for start in range(0, len(prompts), CHUNK):
        rows = slice(start, start + CHUNK)
        prompt, prompt_mask = likelihood.left_padded(prompts[rows], tokenizer.pad_token_id, "cpu")
        reply, mask = likelihood.right_padded(replies[rows], tokenizer.pad_token_id, "cpu")
        states = likelihood.reply_states(model, prompt, prompt_mask, reply, mask)
        logprobs = likelihood.log_probabilities(model.get_output_embeddings()(states), reply, limits.temperature)
        values = value_head(states)[..., 0] if value_head else torch.zeros_like(logprobs)
        for i, ids in enumerate(replies[rows]):
            ended, n = ids[-1] == tokenizer.eos_token_id, len(ids)
            found.append(sampler.Reply(ids, logprobs[i, :n].tolist(), ended, values[i, :n].tolist()))
    return found


def again(sample: Callable[..., list[sampler.Reply]]) -> Callable[..., list[sampler.Reply]]:
    """Our sampler, its log-probabilities and values thrown away and computed by a second pass."""

    def sampled(model, prompts, limits, tokenizer, numbers, **options):
        replies = sample(model, prompts, limits, tokenizer, numbers, **options)
        return scored_again(model, prompts, [reply.ids for reply in replies], limits, tokenizer, **options)

    return sampled


def in_given_order(self: rollouts.Rollout, rows: Tensor, size: int) -> list[Tensor]:
    """`Rollout.by_length` without looking at the length."""
    return list(rows.split(size))


@contextmanager
def without(measure: str):
    """Our PPO without one of its measures."""
    replaced = {
        "own sampler": mock.patch.object(sampler, "sample", with_generate),
        "log-probabilities kept from sampling": mock.patch.object(sampler, "sample", again(sampler.sample)),
        "bucketing by length": mock.patch.object(rollouts.Rollout, "by_length", in_given_order),
    }
    with replaced.get(measure, nullcontext()):
        yield


def job_for(folder: Path, seed: int, *overrides: str) -> Job:
    """The demo's PPO stage on one thread, its models made if they are not there."""
    config = compose(["experiment=demo", "target=reward", "dependents=false", "tracker=none", "runtime.threads=1"])
    chain.bring_up_to_date(config)
    config = compose(["experiment=demo", "tracker=none", "runtime.threads=1", f"ppo.seed={seed}", *overrides])
    planned = chain.plan(config, ["tokenizer", "pretrain", "sft", "comparisons", "reward"])
    inputs = {name: planned[name].artifact.folder for name in ("sft", "reward")}
    for created in (folder / "out", folder / "checkpoints"):
        created.mkdir(parents=True)
    return Job("ppo", config, inputs, folder / "out", folder / "checkpoints")


def gold(policy: Any, job: Job) -> float:
    """Mean score of the demo's judge over replies to held-out prompts."""
    tokenizer = chat.require_same_template(job.inputs)
    job = Job("evaluate", job.config, {**job.inputs, "comparisons": comparisons_of(job)}, job.out, job.checkpoints)
    examples, _ = held_out.prompts(job, tokenizer, policy, job.config.evaluate.prompts, job.config.evaluate.seed)
    prompts = [chat.prompt_ids(tokenizer, example.prompt) for example in examples]
    numbers = sampler.random_numbers(job.config.evaluate.seed, len(prompts), job.config.sampling)
    replies = sampler.sample(policy, prompts, job.config.sampling, tokenizer, numbers)
    texts = [chat.reply_text(tokenizer, reply.ids) for reply in replies]
    judge = rewards.load(job.config.evaluate.judge)
    return float(np.mean(evaluate.applicable(evaluate.judged_by(judge, examples, texts), "judge")))


def comparisons_of(job: Job) -> Path:
    """The comparisons that the reward model was trained on."""
    parents = read_json(job.inputs["reward"] / "manifest.json")["parents"]
    return job.inputs["reward"].with_name(f"comparisons-{parents['comparisons']}")


def main() -> None:
    """Time every variant on the same rollouts, then train both to the end with several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rollouts of each variant; 0 is none")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison of gains; 0 is none")
    parser.add_argument("--rollouts", type=int, default=5, help="rollouts of each of these")
    given = parser.parse_args()
    quiet_libraries()
    with TemporaryDirectory() as folder:
        if given.rounds:
            contests(Path(folder), given.rounds)
        if given.seeds:
            gains(Path(folder), given.seeds, given.rollouts)


PLAIN = "straightforward"
MEASURES = ("own sampler", "log-probabilities kept from sampling", "bucketing by length")


def contests(folder: Path, rounds: int) -> dict[str, list[Any]]:
    """Episodes per second of each variant, all in turn on the same prompts, against the straightforward one."""
    shared, separate = job_for(folder / "shared", 1, *SHARED), job_for(folder / "separate", 1)
    variants = {PLAIN: (Plain(separate), ""), "Threefold": (Ours(shared), "")}
    variants["without shared trunk"] = (Ours(separate), "")
    variants |= {f"without {measure}": (Ours(shared), measure) for measure in MEASURES}
    prompts, size = variants["Threefold"][0].prompts(), shared.config.ppo.batch_size

    def way(variant: Any, measure: str) -> Callable[[], Round]:
        numbers = itertools.count()

        def prepare() -> Round:
            number = next(numbers)
            batch = rollouts.batch_of(prompts, number, size)

            def work() -> float:
                with without(measure):
                    variant.rollout([p.ids for p in batch] if isinstance(variant, Plain) else batch, number, 100)
                return size

            return work

        return prepare

    entries = contest({name: way(*variant) for name, variant in variants.items()}, rounds, PLAIN)
    show(f"PPO, rollouts of {size} replies each", "episodes", PLAIN, entries)
    return {"ppo": entries}


def gains(folder: Path, seeds: int, count: int) -> None:
    """Gold mean after `count` rollouts of both, from the same prompts, for each seed."""
    rows: dict[str, list[float]] = {"SFT model": [], "straightforward": [], "ours": []}
    for seed in range(1, seeds + 1):
        jobs = {
            "ours": job_for(folder / f"o{seed}", seed, *SHARED),
            "straightforward": job_for(folder / f"s{seed}", seed),
        }
        rows["SFT model"].append(gold(loading.load_policy(jobs["ours"].inputs["sft"]), jobs["ours"]))
        prompts = Ours(jobs["ours"]).prompts()
        for name, job in jobs.items():
            variant = Ours(job) if name == "ours" else Plain(job)
            for number in range(count):
                batch = rollouts.batch_of(prompts, number, job.config.ppo.batch_size)
                variant.rollout(batch if name == "ours" else [p.ids for p in batch], number, count)
            rows[name].append(gold(variant.policy, job))
    table = Table("policy", *(f"seed {seed}" for seed in range(1, seeds + 1)), "mean", title="gold mean, held out")
    for name, found in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in found), f"{np.mean(found):.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
