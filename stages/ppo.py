"""Stage `ppo`: proximal policy optimisation of the SFT model against the reward model, written on Accelerate.

For each rollout: sample replies, score them, penalise KL to the reference per token, estimate advantages with the
critic (or, without one, by comparing replies), and take a few epochs of clipped steps. The numbers in brackets are
details that implementations get wrong:

 [1] Policy and reference are the SFT model; before the first step KL is 0 and every ratio is 1.
 [2] Dropout is off everywhere (models stay in evaluation mode; gradients flow all the same).
 [3] No top-k, top-p or least length; log-probabilities are taken at the sampling temperature.
 [4] The reward model scores the text up to its end token; without one a fixed penalty counts (Stiennon et al. 2020).
 [5] Scores are normalised to mean 0, standard deviation 1 on the reference's samples (Ziegler et al. 2019).
 [6] The KL penalty is per token, the score counts on the last token (Ziegler et al. 2019); it can also act as a loss.
 [7] The critic is a model of its own and starts from the reward model (Stiennon et al. 2020).
 [8] GAE with gamma 1 and lambda 0.95; rewards are whitened, if asked, without shifting their mean.
 [9] Advantages of gae and reinforce++ are whitened over all reply tokens of the rollout, mean shifted.
[10] Adam's epsilon is 1e-5; learning rates fall linearly to zero (Huang et al. 2024, arXiv 2403.17031).
[11] A loss is the mean over the reply tokens of a minibatch, however it is split into forward passes.
[12] Every random draw comes from (seed, rollout), so that a resumed run draws what the undisturbed one drew.
"""

import json
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import rewards
from pipeline import chat, data, estimators, guards, models, rollouts, sampling
from pipeline.errors import UserError
from pipeline.job import Job
from pipeline.rollouts import Prompt, Reward, Rollout

MICRO_BATCH = 32  # replies per forward pass where runtime.micro_batch_size is null; bounds memory, changes no result


@dataclass
class Ppo:
    """The models of PPO, of which `policy` and `critic` are trained, and what all its steps need.

    Without a critic (`ppo.advantage` other than gae) `critic` and its optimiser are None.
    """

    job: Job
    config: Any
    accelerator: Accelerator
    tokenizer: Any
    policy: Any
    reference: Any
    critic: Any
    reward: Reward
    policy_optimizer: Any
    critic_optimizer: Any
    micro: int  # replies per forward pass
    kl_coef: float = 0.0  # of the current rollout


def run(job: Job) -> dict[str, Any]:
    """Train the policy and save it, with the critic beside it."""
    ppo = load(job)
    prompts = prompt_pool(ppo)
    result = train(ppo, prompts)
    models.save(ppo.accelerator.unwrap_model(ppo.policy), ppo.tokenizer, job.out)
    if ppo.critic is not None:
        models.save(ppo.accelerator.unwrap_model(ppo.critic), ppo.tokenizer, job.out / "critic")
    return result | {"template_hash": chat.template_hash(ppo.tokenizer), "prompts": len(prompts)}


def train(ppo: Ppo, prompts: list[Prompt]) -> dict[str, Any]:
    """Rollouts and updates, from the last checkpoint to the end or to where a guard trips; the last metrics."""
    job, config = ppo.job, ppo.config
    total = max(1, config.episodes // config.batch_size)
    announce(ppo, prompts, total)
    first, ppo.kl_coef = resume(ppo)
    if first == 0 and config.on_trip == "rollback":
        save_checkpoint(ppo, 0)
    bar = job.progress(total * config.batch_size, "episodes", first * config.batch_size)
    result: dict[str, Any] = {"episodes": first * config.batch_size}
    for number in range(first, total):
        rollout = roll_out(ppo, batch_of(prompts, number, config.batch_size, config.samples_per_prompt), number)
        advantages, returns, metrics = estimate(rollout, ppo.kl_coef, config)
        reason = guards.tripped(metrics, config)
        if reason is None:
            set_learning_rates(ppo, 1 - number / total)
            metrics |= update(ppo, rollout, advantages, returns, number)
            metrics |= {"kl_coef": ppo.kl_coef, "episodes": (number + 1) * config.batch_size}
            ppo.kl_coef = next_kl_coef(ppo.kl_coef, metrics["kl"], config)
            reason = guards.tripped(metrics, config)
        if reason is not None:
            result = {"episodes": result["episodes"]} | stop(ppo, number + 1, reason, metrics)
            break
        result |= metrics
        job.log(number + 1, metrics)
        bar.update(config.batch_size)
        if (number + 1) % max(1, total // (job.config.runtime.checkpoints + 1)) == 0 and number + 1 < total:
            save_checkpoint(ppo, number + 1)
    bar.close()
    return result


def stop(ppo: Ppo, rollout: int, reason: str, metrics: dict[str, float]) -> dict[str, Any]:
    """Say why training ends at `rollout`, and go back to the last good checkpoint if `ppo.on_trip` asks for it.

    Returns the finite metrics of that rollout, with the reason. Raises `UserError` where the weights are lost: numbers
    are not finite any more, and going back was not asked for.
    """
    broken = guards.broken(metrics)
    if ppo.config.on_trip == "stop" and broken:
        raise UserError(
            f"ppo: {reason} at rollout {rollout}; lower ppo.learning_rate or ppo.critic_learning_rate, "
            "or set ppo.on_trip=rollback to keep the last good checkpoint"
        )
    kept = "the policy stays as it is"
    if ppo.config.on_trip == "rollback":
        kept = f"back to the policy of rollout {load_checkpoint(ppo)[0]}"
    ppo.job.say(f"stopped at rollout {rollout}: {reason}; {kept}")
    return {name: value for name, value in metrics.items() if name not in broken} | {"stopped": reason}


def load(job: Job) -> Ppo:
    """Policy and reference are the SFT model [1], the critic starts from the reward model [7]; no dropout [2].

    With a reward by rule there is no reward model, and the critic starts from the SFT model.
    """
    config = job.config.ppo
    tokenizer = chat.require_same_template(job.inputs)
    accelerator = Accelerator(cpu=job.device.type == "cpu", mixed_precision="bf16" if job.device.bf16 else "no")
    policy, reference = (models.load_policy(job.inputs["sft"], job.device.type) for _ in range(2))
    micro = job.config.runtime.micro_batch_size or min(MICRO_BATCH, config.batch_size // config.minibatches)
    adam = {"eps": config.adam_eps, "fused": True}
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, **adam)  # [10]
    policy, policy_optimizer = accelerator.prepare(policy, policy_optimizer)
    critic = critic_optimizer = None
    if config.advantage == "gae":
        critic = load_critic(job)
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_learning_rate, **adam)
        critic, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
    return Ppo(
        job,
        config,
        accelerator,
        tokenizer,
        policy,
        reference,
        critic,
        load_reward(job, tokenizer, micro),
        policy_optimizer,
        critic_optimizer,
        micro,
    )


def load_reward(job: Job, tokenizer: Any, micro: int) -> Reward:
    """The learned reward model, or the reward by rule of `ppo.reward`."""
    function = job.config.ppo.reward.function
    if function is not None:
        return rollouts.rule_reward(rewards.load(job.config.ppo.reward), function, tokenizer)
    reward_model = models.load_reward_model(job.inputs["reward"], job.device.type)
    return rollouts.model_reward(reward_model, tokenizer, micro)


def load_critic(job: Job) -> Any:
    """A model of the value of a text, on the scale of the normalised score [7]."""
    if job.config.ppo.reward.function is None:
        return models.load_reward_model(job.inputs["reward"], job.device.type)
    return models.new_critic(job.inputs["sft"], job.device.type)


def prompt_pool(ppo: Ppo) -> list[Prompt]:
    """The training split's prompts that leave room for a reply, in an order that the seed decides."""
    found = data.prompts(ppo.job.config.data.replies, "train", ppo.job.config.data.dialogue)
    wanted = data.draw(found, ppo.config.episodes, ppo.config.seed)
    ids = [chat.prompt_ids(ppo.tokenizer, example.prompt) for example in wanted]
    fitting = sampling.with_room(ids, ppo.policy, ppo.job.config.sampling)
    return [Prompt(ids[i], wanted[i].prompt[-1]["content"], wanted[i].reply) for i in fitting]


def announce(ppo: Ppo, prompts: list[Prompt], total: int) -> None:
    """One line: device, precision, effective batch in tokens, estimated time."""
    config = ppo.config
    length = sum(len(prompt.ids) for prompt in prompts) / len(prompts) + ppo.job.config.sampling.max_new_tokens / 2
    trained = 1 + (ppo.critic is not None)
    passes = 6 * trained * config.epochs + 2 * (
        2 + trained
    )  # updated; sampled, and scored by reference, reward, critic
    flops = passes * models.parameter_count(ppo.policy) * length * config.batch_size * total
    batch = f"about {length * config.batch_size / config.minibatches:,.0f} tokens"
    ppo.job.announce(batch, total * config.minibatches * config.epochs, flops)


def batch_of(prompts: list[Prompt], number: int, size: int, samples: int = 1) -> list[Prompt]:
    """The prompts of the `size` replies of rollout `number`, each `samples` times in a row, from the pool in its order.

    The pool starts over at its end.
    """
    distinct = size // samples
    return [prompts[(number * distinct + i) % len(prompts)] for i in range(distinct) for _ in range(samples)]


def roll_out(ppo: Ppo, prompts: list[Prompt], number: int) -> Rollout:
    """Sample and score replies to a batch of prompts [3] [4] [5]."""
    seed = int(np.random.SeedSequence([ppo.config.seed, number]).generate_state(1)[0])  # [12]
    with ppo.accelerator.autocast():
        return rollouts.collect(
            ppo.policy, ppo.reference, ppo.critic, ppo.reward, prompts, ppo.job.config.sampling, ppo.tokenizer,
            sampling.seeded(seed), ppo.config.missing_end_penalty, ppo.micro,
        )  # fmt: skip


def estimate(rollout: Rollout, kl_coef: float, config: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages and returns, both [B, R], and the rollout's metrics."""
    mask = rollout.mask
    kl = {
        name: estimators.kl_per_token(rollout.logprobs, rollout.reference_logprobs, name) * mask
        for name in ("k1", "k2", "k3")
    }
    k1, k3 = kl["k1"], kl["k3"]
    penalty = kl_coef if config.kl_in == "reward" else 0.0
    rewards = estimators.token_rewards(rollout.scores, kl[config.kl_estimator], penalty, mask)  # [6]
    advantages, returns = advantages_of(rewards, rollout, config)
    metrics = {
        "score": rollout.scores.mean().item(),
        "score_std": rollout.scores.std().item(),
        "reward": rewards.sum(1).mean().item(),
        "kl": k1.sum(1).mean().item(),
        "kl_k3": k3.sum(1).mean().item(),
        "reply_tokens": mask.sum(1).float().mean().item(),
        "ended_share": rollout.ended.mean().item(),
    }
    if config.advantage == "gae":
        metrics["explained_variance"] = estimators.explained_variance(rollout.values, returns, mask).item()
    return advantages, returns, metrics


def advantages_of(rewards: Tensor, rollout: Rollout, config: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, R], of per-token rewards [B, R] by the estimator of the configuration."""
    mask = rollout.mask
    if config.whiten_rewards:
        rewards = estimators.whiten(rewards, mask, shift_mean=False)
    returns = estimators.returns_to_go(rewards, mask, config.gamma)
    if config.advantage == "gae":
        advantages, returns = estimators.gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)  # [8]
        return estimators.whiten(advantages, mask), returns  # [9]
    if config.advantage == "reinforce++":
        return estimators.whiten(returns, mask), returns  # [9]
    compare = estimators.rloo if config.advantage == "rloo" else estimators.grpo
    return compare(rewards.sum(1), config.samples_per_prompt)[:, None] * mask, returns


def next_kl_coef(kl_coef: float, kl: float, config: Any) -> float:
    """The KL coefficient for the next rollout."""
    if config.kl_controller == "fixed":
        return kl_coef
    return estimators.adapted_kl_coef(kl_coef, kl, config.kl_target, config.batch_size, config.kl_horizon)


def set_learning_rates(ppo: Ppo, factor: float) -> None:
    """Scale both peak learning rates by `factor` [10]."""
    peaks = [(ppo.policy_optimizer, ppo.config.learning_rate)]
    if ppo.critic is not None:
        peaks.append((ppo.critic_optimizer, ppo.config.critic_learning_rate))
    for optimizer, peak in peaks:
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


def update(ppo: Ppo, rollout: Rollout, advantages: Tensor, returns: Tensor, number: int) -> dict[str, float]:
    """`epochs` passes over the rollout in `minibatches` optimiser steps each; mean metrics over all steps."""
    generator = np.random.default_rng([ppo.config.seed, number])  # [12]
    steps = []
    for _ in range(ppo.config.epochs):
        order = torch.from_numpy(generator.permutation(len(rollout))).to(rollout.scores.device)
        for rows in order.chunk(ppo.config.minibatches):
            steps.append(minibatch_step(ppo, rollout, advantages, returns, rows, number >= ppo.config.critic_warmup))
    means = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    return means | {"first_ratio_error": steps[0]["ratio_error"]}


def minibatch_step(
    ppo: Ppo, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, train_policy: bool
) -> dict[str, float]:
    """One optimiser step of policy and critic on the replies `rows`, in forward passes of similar lengths [11]."""
    tokens, found = rollout.mask[rows].sum().item(), []
    for part in rollouts.by_length(rollout.take(rows), ppo.micro):
        chosen = rows[part]
        loss, metrics = losses(ppo, rollout.take(chosen), advantages[chosen], returns[chosen])
        ppo.accelerator.backward(loss / tokens)
        found.append(metrics)
    means = {key: sum(metrics[key] for metrics in found) / tokens for key in found[0] if key != "ratio_error"}
    trained = []
    if ppo.critic is not None:
        trained.append((ppo.critic, ppo.critic_optimizer, "critic_grad_norm"))
    if train_policy:
        trained.append((ppo.policy, ppo.policy_optimizer, "grad_norm"))
    norms = {"grad_norm": 0.0}
    for model, optimizer, name in trained:
        norms[name] = float(
            ppo.accelerator.clip_grad_norm_(model.parameters(), ppo.config.max_grad_norm or float("inf"))
        )
        optimizer.step()
    ppo.policy_optimizer.zero_grad()  # the gradient of a policy that waits for its critic goes as well
    if ppo.critic is not None:
        ppo.critic_optimizer.zero_grad()
    return means | norms | {"ratio_error": max(metrics["ratio_error"] for metrics in found)}


def losses(ppo: Ppo, part: Rollout, advantages: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss summed over the reply tokens of `part`, and sums of the metrics."""
    config, mask = ppo.config, part.mask
    advantages, returns = advantages[:, : mask.size(1)], returns[:, : mask.size(1)]
    with ppo.accelerator.autocast():
        logprobs, entropy = rollouts.reply_logprobs(ppo.policy, part, ppo.job.config.sampling.temperature)
    policy, clipped = estimators.policy_losses(logprobs, part.logprobs, advantages, config.clip_range)
    log_ratio = (logprobs - part.logprobs).detach() * mask
    sums = {"policy_loss": policy, "clip_share": clipped, "entropy": entropy}
    sums["update_kl"] = torch.expm1(log_ratio) - log_ratio
    loss = (policy * mask).sum()
    if config.kl_in == "loss":  # [6]
        sums["kl_loss"] = estimators.kl_per_token(logprobs, part.reference_logprobs, config.kl_estimator)
        loss = loss + ppo.kl_coef * (sums["kl_loss"] * mask).sum()
    if ppo.critic is not None:
        with ppo.accelerator.autocast():
            values = rollouts.reply_values(ppo.critic, part)
        value, sums["value_clip_share"] = estimators.value_losses(values, part.values, returns, config.value_clip_range)
        sums["value_loss"] = value
        loss = loss + config.value_coef * (value * mask).sum()
    found = {key: (value.detach() * mask).sum().item() for key, value in sums.items()}
    return loss, found | {"ratio_error": log_ratio.exp().sub(1).abs().max().item()}


def save_checkpoint(ppo: Ppo, number: int) -> None:
    """Write both models, both optimisers and the KL coefficient after `number` rollouts; older checkpoints go then."""
    folder = ppo.job.checkpoints / f"rollout-{number}"
    fresh = folder.with_suffix(".part")
    ppo.accelerator.save_state(str(fresh))
    (fresh / "state.json").write_text(json.dumps({"rollouts": number, "kl_coef": ppo.kl_coef}))
    fresh.rename(folder)
    for other in ppo.job.checkpoints.glob("rollout-*"):
        if other != folder:
            shutil.rmtree(other)


def resume(ppo: Ppo) -> tuple[int, float]:
    """Load the last whole checkpoint, if there is one; returns the rollouts done and the KL coefficient."""
    for unfinished in ppo.job.checkpoints.glob("rollout-*.part"):
        shutil.rmtree(unfinished)
    done, kl_coef = load_checkpoint(ppo)
    if done:
        ppo.job.say(f"continues after {done:,} rollouts")
    ppo.job.steps.rewind(done)
    return done, kl_coef


def load_checkpoint(ppo: Ppo) -> tuple[int, float]:
    """Load the last whole checkpoint; the rollouts it has behind it, and its KL coefficient. None is 0 rollouts."""
    states = [json.loads(file.read_text()) for file in ppo.job.checkpoints.glob("rollout-*/state.json")]
    state = max(states, key=lambda s: s["rollouts"], default={"rollouts": 0, "kl_coef": ppo.config.kl_coef})
    if states:
        ppo.accelerator.load_state(str(ppo.job.checkpoints / f"rollout-{state['rollouts']}"))
    return state["rollouts"], state["kl_coef"]
