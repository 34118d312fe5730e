"""Stage `ppo`: proximal policy optimisation of the SFT model against a reward, written on Accelerate.

For each rollout: sample replies, score them, penalise KL to the reference per token, estimate advantages with the
critic (or, without one, by comparing replies), and take a few epochs of clipped steps. The numbers in brackets are
details that implementations get wrong; docs/ppo.md has their sources:

 [1] Policy and reference are the SFT model; before the first step KL is 0 and every ratio is 1.
 [2] Dropout is off everywhere (models stay in evaluation mode; gradients flow all the same).
 [3] No top-k, top-p or least length; log-probabilities are taken at the sampling temperature.
 [4] The reward model scores the text up to its end token; without one a reply scores at most a penalty (Stiennon 2020).
 [5] Scores are normalised to mean 0, standard deviation 1 on the reference's samples (Ziegler et al. 2019).
 [6] The KL penalty is per token, the score counts on the last token (Ziegler et al. 2019); it can also act as a loss.
 [7] The critic is a model of its own and starts from the reward model (Stiennon et al. 2020), or shares the trunk.
 [8] GAE with gamma 1 and lambda 0.95; rewards are whitened, if asked, without shifting their mean.
 [9] Advantages of gae and reinforce++ are whitened over all reply tokens of the rollout, mean shifted.
[10] Adam's epsilon is 1e-5; learning rates fall linearly to zero (Huang et al. 2024, arXiv 2403.17031).
[11] A loss is the mean over the reply tokens of a minibatch (see `ppo.average`), however it is split.
[12] Every random draw comes from (seed, rollout), so that a resumed run draws what the undisturbed one drew.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from threefold import rewards
from threefold.errors import UserError
from threefold.evaluation import checkup
from threefold.execution import ranks
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, likelihood, loading
from threefold.ppo import actors, rollouts, safety
from threefold.ppo import advantages as estimators
from threefold.ppo.actors import Actors
from threefold.ppo.advantages import estimate
from threefold.ppo.rollouts import Prompt, Rollout, views
from threefold.rewards.learned import learned
from threefold.sampling import sampler
from threefold.training import guards, packing

MICRO_BATCH = 32  # replies per forward pass where runtime.micro_batch_size is null; bounds memory, changes no result


@dataclass
class Ppo:
    """What all steps of PPO need."""

    job: Job
    config: Any
    accelerator: Accelerator
    tokenizer: Any
    actors: Actors
    reward: rewards.RewardFunction
    optimizers: dict[str, torch.optim.Optimizer]  # of policy, and of critic where there is one
    text: packing.PackedRows | None  # pretraining text, with ppo.ptx_coef
    micro_batch_size: int  # replies per forward pass
    kl_coef: float = 0.0  # of the current rollout
    engine: actors.Engine | None = None  # that samples instead of our own sampler
    ratios: list[Tensor] = field(default_factory=list)  # of this rollout's update, per token, where they are tracked


def run(job: Job) -> dict[str, Any]:
    """Train the policy and save it, with the critic beside it."""
    prompts = plan(job)
    ppo = load(job)
    result = train(ppo, prompts)
    if ppo.accelerator.is_main_process:
        actors.save(ppo.actors, job.inputs, ppo.tokenizer, job.out)
    used = min(len(prompts), result["episodes"] // ppo.config.samples_per_prompt)
    unusable = rollouts.left_out(job, ppo.tokenizer, prompts)
    return result | {"template_hash": chat.template_hash(ppo.tokenizer), "prompts": used, "unusable": unusable}


def train(ppo: Ppo, prompts: list[Prompt]) -> dict[str, Any]:
    """Rollouts and updates, from the last checkpoint to the end or to where a guard trips; the last metrics."""
    job, config = ppo.job, ppo.config
    total = max(1, config.episodes // config.batch_size)
    first = resume(ppo)
    bar = job.progress(total * config.batch_size, "episodes", first * config.batch_size)
    result: dict[str, Any] = {"episodes": first * config.batch_size}
    for number in range(first, total):
        started = time.perf_counter()
        batch = rollouts.batch_of(prompts, number, config.batch_size, config.samples_per_prompt)
        rollout = roll_out(ppo, batch, number)
        advantages, returns, metrics = estimate(rollout, ppo.kl_coef, config)
        metrics["rollout_seconds"] = time.perf_counter() - started
        guards.require_one_distribution("engine_ratio_mean", metrics.get("engine_ratio_mean", 0.0), config)
        reason = ranks.decided(guards.tripped(metrics, config), ppo.accelerator)
        if reason is None:
            if checkpoint_due(ppo, number, first, total):  # the policy of `number` rollouts has just passed the guards
                save_checkpoint(ppo, number)
            set_learning_rates(ppo, 1 - number / total)
            ppo.ratios.clear()
            metrics |= update(ppo, rollout, advantages, returns, number)
            metrics |= {"kl_coef": ppo.kl_coef, "episodes": (number + 1) * config.batch_size}
            speed = config.batch_size / (time.perf_counter() - started)
            metrics |= {"learning_rate": config.learning_rate * (1 - number / total), "episodes_per_second": speed}
            ppo.kl_coef = estimators.next_kl_coef(ppo.kl_coef, metrics["kl"], config)
            reason = ranks.decided(guards.tripped(metrics, config), ppo.accelerator)
        if reason is not None:
            result = {"episodes": result["episodes"]} | stop(ppo, number + 1, reason, metrics)
            break
        result |= metrics
        job.log(number + 1, metrics, {"rollout": number + 1})
        if job.tracked:
            job.show(views(job, ppo.tokenizer, number + 1, batch, rollout, advantages, ppo.ratios), number + 1)
        bar.set_postfix({name: f"{metrics[name]:.3g}" for name in ("score", "kl")}, refresh=False)
        bar.update(config.batch_size)
        if number + 1 in snapshots(config.snapshots, total) and ppo.accelerator.is_main_process:
            episodes = (number + 1) * config.batch_size
            actors.save_policy(ppo.actors, job.inputs, ppo.tokenizer, job.out / "snapshots" / str(episodes))
        if config.reference_sync_every and (number + 1) % config.reference_sync_every == 0:
            actors.synchronise_reference(ppo.actors)
    bar.close()
    return result


def snapshots(count: int, total: int) -> set[int]:
    """The rollouts, of `total`, after which the policy is kept: `count` in even steps, and not the last of all."""
    return {round(total * k / (count + 1)) for k in range(1, count + 1)} - {0, total}


def stop(ppo: Ppo, rollout: int, reason: str, metrics: dict[str, float]) -> dict[str, Any]:
    """Say why training ends at `rollout`, and go back to the last good checkpoint if `ppo.on_trip` asks for it.

    Returns the finite metrics of that rollout, with the reason. Raises `UserError` where the weights are lost: numbers
    are not finite any more, and going back was not asked for.
    """
    broken = guards.broken(metrics)
    ppo.job.alert("PPO stopped", f"{ppo.job.config.run}: {reason} at rollout {rollout}")
    if ppo.config.on_trip == "stop" and broken:
        raise UserError(
            f"ppo: {reason} at rollout {rollout}; lower ppo.learning_rate or ppo.critic_learning_rate, "
            "or set ppo.on_trip=rollback to keep the last good checkpoint"
        )
    kept = "the policy stays as it is"
    if ppo.config.on_trip == "rollback":
        kept = f"back to the policy of rollout {load_checkpoint(ppo)}"
    ppo.job.say(f"stopped at rollout {rollout}: {reason}; {kept}")
    return {name: value for name, value in metrics.items() if name not in broken} | {"stopped": reason}


def plan(job: Job) -> list[Prompt]:
    """The prompts; announces, from the shapes of the models, how much time and memory training will take."""
    config, limits = job.config.ppo, job.config.sampling
    if "reward" in job.inputs and not config.ignore_gate:
        checkup.require(job.inputs["reward"], job.config.reward.gate)
    meta_models = actors.load(config, job.inputs, "meta")
    tokenizer = chat.require_same_template(job.inputs)
    prompts = rollouts.prompt_pool(job, tokenizer, meta_models.policy)
    longest = max(len(prompt.ids) for prompt in prompts) + limits.max_new_tokens
    length = sum(len(prompt.ids) for prompt in prompts) / len(prompts) + limits.max_new_tokens / 2
    trained = 1 + (meta_models.critic is not None and not meta_models.shared)
    total, micro = max(1, config.episodes // config.batch_size), micro_batch_size(job)
    tokens, new = (part * config.batch_size * total for part in (length, limits.max_new_tokens))
    work = Work(trained * config.epochs * tokens, (2 + trained) * tokens, new, (micro, int(length)), limits.batch_size)
    batch = f"about {length * config.batch_size / config.minibatches:,.0f} tokens"
    steps = total * config.minibatches * config.epochs
    job.announce(batch, steps, loading.load_policy(job.inputs["sft"], job.device.type), work)
    sampled = min(limits.batch_size, config.batch_size) if config.sampler == "own" else 0
    needed, free = safety.memory_needed(meta_models, longest, sampled, micro), safety.memory_available(job.device.type)
    for line in filter(None, (safety.memory_line(needed, free), safety.memory_shortage(needed, free))):
        job.say(line)
    return prompts


def micro_batch_size(job: Job) -> int:
    """Replies per forward pass."""
    config = job.config.ppo
    return job.config.runtime.micro_batch_size or min(MICRO_BATCH, config.batch_size // config.minibatches)


def load(job: Job) -> Ppo:
    """Models, optimisers and data [1] [2] [7]."""
    config = job.config.ppo
    tokenizer = chat.require_same_template(job.inputs)
    accelerator = Accelerator(cpu=job.device.type == "cpu", mixed_precision="bf16" if job.device.bf16 else "no")
    micro = micro_batch_size(job)
    engine = actors.load_engine(job, accelerator.num_processes, chat.end_ids(tokenizer))
    loaded = actors.load(config, job.inputs, str(accelerator.device))
    trained = {"policy": loaded.policy, "critic": loaded.critic}
    optimizers = {name: adam(model, config) for name, model in trained.items() if model is not None}
    reward = load_reward(config, loaded, tokenizer, micro, accelerator)
    with accelerator.main_process_first():  # it writes the tokens that the others read
        text = packing.shuffled_rows(job, tokenizer, config.ptx_context, config.seed) if config.ptx_coef else None
    return Ppo(job, config, accelerator, tokenizer, loaded, reward, optimizers, text, micro, config.kl_coef, engine)


def adam(model: Any, config: Any) -> torch.optim.Optimizer:
    """Adam over what is trained of a model [10]; `set_learning_rates` sets its rate."""
    return torch.optim.Adam(model.parameters(), lr=0.0, eps=config.adam_eps, fused=True)


def load_reward(
    config: Any, loaded: Actors, tokenizer: Any, batch_size: int, accelerator: Accelerator
) -> rewards.RewardFunction:
    """The reward of `ppo.reward`: the learned reward model, a rule, or a sum of both, the same in every process."""
    model = learned(loaded.reward_model, tokenizer, batch_size) if loaded.reward_model is not None else None
    gather = functools.partial(ranks.gathered, accelerator=accelerator)
    return rewards.load(config.reward, rewards.GIVEN["ppo"], model, gather)


def roll_out(ppo: Ppo, prompts: list[Prompt], number: int) -> Rollout:
    """Sample and score replies to a batch of prompts [3] [4] [5]; each process does its share and gets the whole."""
    limits, accelerator, pad = ppo.job.config.sampling, ppo.accelerator, ppo.tokenizer.pad_token_id
    policy, penalty = ppo.actors.policy, ppo.config.missing_end_penalty
    seed = int(np.random.SeedSequence([ppo.config.seed, number]).generate_state(1)[0])  # [12]
    rows = ranks.share(range(len(prompts)), accelerator)
    mine, numbers = [prompts[i] for i in rows], sampler.random_numbers(seed, len(prompts), limits)[list(rows)]
    ids, size = [p.ids for p in mine], ppo.micro_batch_size
    recompute = ppo.job.device.bf16  # where the fused decoder's log-probabilities round unlike a forward pass
    if ppo.engine is not None:  # without autocast, for the engine has a precision of its own
        replies, recompute = ppo.engine.sample(policy, ids, numbers), True
    else:
        head = ppo.actors.critic.score if ppo.actors.shared else None
        with accelerator.autocast():
            replies = sampler.sample(policy, ids, limits, ppo.tokenizer, numbers, value_head=head)
    with accelerator.autocast():
        scores = rollouts.scores(ppo.reward, rewards.name(ppo.config.reward), ppo.tokenizer, mine, replies)
        rollout = rollouts.collect(ppo.actors, mine, replies, scores, limits.temperature, pad, penalty, size, recompute)
    if accelerator.num_processes == 1:
        return rollout
    single = [rollout.take(torch.tensor([i])).to("cpu") for i in range(len(rollout))]
    return rollouts.joined(ranks.gathered(single, accelerator), pad).to(accelerator.device)


def set_learning_rates(ppo: Ppo, factor: float) -> None:
    """Scale both peak learning rates by `factor` [10]."""
    peaks = {"policy": ppo.config.learning_rate, "critic": ppo.config.critic_learning_rate}
    for name, optimizer in ppo.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = peaks[name] * factor


def update(ppo: Ppo, rollout: Rollout, advantages: Tensor, returns: Tensor, number: int) -> dict[str, float]:
    """`epochs` passes over the rollout (estimates [B, R]) in `minibatches` steps each; metrics as means over steps."""
    started, config = time.perf_counter(), ppo.config
    generator, first = np.random.default_rng([config.seed, number]), number * config.epochs * config.minibatches  # [12]
    steps: list[dict[str, float]] = []
    for _ in range(config.epochs):
        order = torch.from_numpy(generator.permutation(len(rollout))).to(rollout.scores.device)
        for rows in order.chunk(config.minibatches):
            steps.append(minibatch_step(ppo, rollout, advantages, returns, rows, first + len(steps)))
            if len(steps) == 1 and not ppo.job.device.bf16:  # bf16 rounds differently for rows in another order
                guards.require_one_distribution("first_ratio_error", steps[0]["ratio_error"], config)
    means = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    return means | {"first_ratio_error": steps[0]["ratio_error"], "update_seconds": time.perf_counter() - started}


def minibatch_step(
    ppo: Ppo, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, step: int
) -> dict[str, float]:
    """Step number `step` of training, on the replies `rows` [b] of B; metrics as means over their tokens [11]."""
    config, tokens, totals, largest = ppo.config, rollout.mask[rows].sum().item(), {}, [0.0]
    weights = torch.zeros_like(rollout.scores)
    weights[rows] = estimators.reply_weights(rollout.mask[rows].sum(1).to(weights), config.average)
    for chosen in rollout.by_length(ranks.share(rows, ppo.accelerator), ppo.micro_batch_size):
        part = rollout.take(chosen)
        for loss, sums in losses(ppo, part, advantages[chosen], returns[chosen], weights[chosen]):
            (loss / tokens).backward()
            largest.append(sums.pop("ratio_error", 0.0))
            totals |= {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    means = {name: value / tokens for name, value in ranks.summed(totals, ppo.accelerator).items()}
    if ppo.text is not None:
        means |= ptx_step(ppo, ppo.text, step)
    frozen = {"policy"} if step < config.critic_warmup * config.epochs * config.minibatches else set()
    return means | optimise(ppo, frozen) | {"ratio_error": ranks.highest(max(largest), ppo.accelerator)}


def losses(
    ppo: Ppo, part: Rollout, advantages: Tensor, returns: Tensor, weights: Tensor | None = None
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """The policy's loss and then the critic's, summed over the N reply tokens of `part`, and sums of metrics.

    `advantages` and `returns` are [B, R], with R at least that of `part`; `weights` [B] are factors of the policy's
    losses of each reply. A backward pass comes between the two losses, so that only one model's activations are in
    memory; on a shared trunk they are one loss.
    """
    used, chosen = ppo.actors, part.mask.bool()
    advantages, returns = (t[:, : chosen.size(1)][chosen] for t in (advantages, returns))
    with ppo.accelerator.autocast():
        states = rollouts.token_states(used.policy, part)  # [N, D]
        logprobs = rollouts.reply_logprobs(used.policy, part, states, ppo.job.config.sampling.temperature)
    weights = torch.ones_like(logprobs) if weights is None else weights[:, None].expand_as(part.mask)[chosen]
    loss, sums = policy_loss(ppo, logprobs, part, advantages, weights)
    if used.shared:
        value, of_critic = value_loss(ppo, states, part, returns)
        loss, sums = loss + value, sums | of_critic
    yield loss, sums
    if used.critic is not None and not used.shared:
        with ppo.accelerator.autocast():
            states = rollouts.token_states(used.critic, part)
        yield value_loss(ppo, states, part, returns)


def policy_loss(
    ppo: Ppo, logprobs: Tensor, part: Rollout, advantages: Tensor, weights: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The clipped loss of N tokens, all tensors being [N], and the KL loss [6]: weighted sum, and sums of metrics."""
    config, chosen = ppo.config, part.mask.bool()
    old, reference = part.logprobs[chosen], part.reference_logprobs[chosen]
    policy, clipped = estimators.policy_losses(logprobs, old, advantages, config.clip_range)
    log_ratio = (logprobs - old).detach()
    if ppo.job.tracked:
        ppo.ratios.append(log_ratio.exp())
    sums = {"policy_loss": policy, "clip_share": clipped, "update_kl": torch.expm1(log_ratio) - log_ratio}
    loss = (policy * weights).sum()
    if config.kl_in == "loss":
        sums["kl_loss"] = estimators.kl_per_token(logprobs, reference, config.kl_estimator)
        loss = loss + ppo.kl_coef * (sums["kl_loss"] * weights).sum()
    return loss, estimators.summed(sums) | {"ratio_error": log_ratio.exp().sub(1).abs().max().item()}


def value_loss(ppo: Ppo, states: Tensor, part: Rollout, returns: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The weighted value loss of the critic's states [N, D] and `returns` [N]: sum over tokens, and metrics."""
    with ppo.accelerator.autocast():
        values = rollouts.reply_values(ppo.actors.critic, states)
    old = part.values[part.mask.bool()]
    value, clipped = estimators.value_losses(values, old, returns, ppo.config.value_clip_range)
    return ppo.config.value_coef * value.sum(), estimators.summed({"value_loss": value, "value_clip_share": clipped})


def ptx_step(ppo: Ppo, text: packing.PackedRows, step: int) -> dict[str, float]:
    """Gradient of `ptx_coef` times the language-model loss on rows of pretraining text (Ouyang et al. 2022)."""
    config, policy = ppo.config, ppo.actors.policy
    rows = [(step * config.ptx_batch_size + i) % len(text) for i in range(config.ptx_batch_size)]
    mine, tokens, total = ranks.share(rows, ppo.accelerator), len(rows) * (config.ptx_context - 1), 0.0
    for start in range(0, len(mine), ppo.micro_batch_size):
        batch = [text[row]["input_ids"] for row in mine[start : start + ppo.micro_batch_size]]
        ids = torch.stack(batch).to(policy.device)  # [B, T]
        with ppo.accelerator.autocast():
            states = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = loading.output_logits(policy, states).float()
        loss = -likelihood.log_probabilities(logits, ids[:, 1:], 1.0).sum()
        (config.ptx_coef * loss / tokens).backward()
        total += loss.item()
    return {"ptx_loss": ranks.summed({"ptx_loss": total}, ppo.accelerator)["ptx_loss"] / tokens}


def optimise(ppo: Ppo, frozen: set[str]) -> dict[str, float]:
    """Sum the gradients over processes, clip them and take a step of every optimiser but the `frozen`; the norms."""
    norms = {}
    for name, optimizer in ppo.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ranks.sum_gradients(parameters, ppo.accelerator)
        norm = torch.nn.utils.clip_grad_norm_(parameters, ppo.config.max_grad_norm or float("inf")).item()
        norms["grad_norm" if name == "policy" else f"{name}_grad_norm"] = 0.0 if name in frozen else norm
        if name not in frozen:
            optimizer.step()
        optimizer.zero_grad()  # of a frozen one as well
    return norms


def parts(ppo: Ppo) -> dict[str, Any]:
    """What a checkpoint holds: weights that are trained (and a reference that follows them), and optimisers."""
    held = {"policy": ppo.actors.policy, "critic": ppo.actors.critic}
    if ppo.config.reference_sync_every:
        held["reference"] = ppo.actors.reference
    held |= {f"{name}_optimizer": optimizer for name, optimizer in ppo.optimizers.items()}
    return {name: part for name, part in held.items() if part is not None}


def checkpoint_due(ppo: Ppo, number: int, first: int, total: int) -> bool:
    """Whether to write a checkpoint after `number` rollouts; where guards go back to the last one, after each."""
    if ppo.config.on_trip == "rollback":
        return number == 0 or number > first
    return number > first and number % max(1, total // (ppo.job.config.runtime.checkpoints + 1)) == 0


def save_checkpoint(ppo: Ppo, number: int) -> None:
    """Write everything that training after `number` rollouts goes on from."""
    if ppo.accelerator.is_main_process:
        safety.save_state(ppo.job.checkpoints, parts(ppo), {"rollouts": number, "kl_coef": ppo.kl_coef})
    ppo.accelerator.wait_for_everyone()


def load_checkpoint(ppo: Ppo) -> int:
    """Go on from the last whole checkpoint, if there is one; returns the rollouts behind it."""
    state = safety.load_state(ppo.job.checkpoints, parts(ppo))
    if state is None:
        return 0
    ppo.kl_coef = state["kl_coef"]
    return state["rollouts"]


def resume(ppo: Ppo) -> int:
    """Load the last checkpoint and cut the step log there; returns the rollouts that are done."""
    done = load_checkpoint(ppo)
    ppo.accelerator.wait_for_everyone()  # before the main process writes another
    if done:
        ppo.job.say(f"continues after {done:,} rollouts")
    ppo.job.steps.rewind(done)
    return done
