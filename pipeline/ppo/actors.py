"""The models of PPO: policy, reference, critic and reward model, each a model of its own or sharing a base.

ppo.critic=separate: four models. ppo.critic=shared: three, and the critic is a value head on the policy.
ppo.lora_rank: the SFT model alone, as it is, is the reference, with adapters it is policy and critic; the reward model
is one more adapter where stage `reward` trained one (reward.lora_rank), otherwise it is a model of its own, and the
critic is an adapter on that.

vLLM as the engine that samples PPO's replies: in this process, on the policy's GPU, with the policy's weights.

The interface is that of vLLM 0.29 to 0.33: docs.vllm.ai, pages `LLM`, `SamplingParams` and `Reproducibility`.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from threefold import rewards
from threefold.errors import UserError
from threefold.execution.job import Job
from threefold.models import ensemble, loading, lora
from threefold.models.ensemble import Ensemble
from threefold.sampling.sampler import Reply
from threefold.schema.stages import SamplingConfig


@dataclass
class Actors:
    """The models of PPO; `policy` and `critic` are trained. Each has the interface of a transformers model or its part.

    `critic` is None without one (`ppo.advantage` other than gae), `reward_model` with a reward by rules alone; the
    members of an ensemble but the first are models of their own in any case.
    """

    policy: Any
    reference: Any
    critic: Any
    reward_model: Ensemble | None

    @property
    def shared(self) -> bool:
        """Whether the critic is a value head on the policy's own hidden states."""
        return isinstance(self.critic, ValueHead)


class ValueHead:
    """A critic that is one linear layer on the policy's last hidden states; its first values are 0."""

    def __init__(self, policy: Any):
        self.policy = policy
        self.score = nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.device)
        nn.init.zeros_(self.score.weight)
        self.config = copy.copy(policy.config)
        self.config.score_mean, self.config.score_std = 0.0, 1.0
        self.parameters, self.state_dict = self.score.parameters, self.score.state_dict
        self.load_state_dict = self.score.load_state_dict

    @property
    def base_model(self) -> nn.Module:
        """The policy's trunk."""
        return self.policy.base_model


def load(config: Any, inputs: dict[str, Path], device: str) -> Actors:
    """The models that the section `ppo` of the configuration asks for, fp32, in evaluation mode."""
    policy = loading.load_policy(inputs["sft"], device)
    learned = rewards.uses_model(config.reward)
    if config.lora_rank is not None:
        return _adapted(policy, config, inputs, device)
    reference = loading.load_policy(inputs["sft"], device)
    reward_model = ensemble.load(inputs["reward"], device) if learned else None
    critic = None
    if config.advantage == "gae" and config.critic == "shared":
        critic = ValueHead(policy)
    elif config.advantage == "gae":
        critic = (
            loading.load_reward_model(inputs["reward"], device)
            if learned
            else loading.new_critic(inputs["sft"], device)
        )
    return Actors(policy, reference, critic, reward_model)


def _adapted(base: nn.Module, config: Any, inputs: dict[str, Path], device: str) -> Actors:
    """Adapters on the SFT model `base`, and on the reward model where that is a model of its own."""
    fresh = (config.lora_rank, config.lora_alpha, config.seed)
    lora.add_adapter(base, "policy", *fresh)
    actors = Actors(lora.Adapted(base, "policy"), lora.Adapted(base, None), None, None)
    if config.reference_sync_every:
        lora.add_adapter(base, "reference", *fresh)
        actors.reference = lora.Adapted(base, "reference")
    if rewards.uses_model(config.reward):
        first = _adapted_reward_model(base, inputs["reward"], fresh, device)
        others = [loading.load_reward_model(folder, device) for folder in ensemble.other_members(inputs["reward"])]
        actors.reward_model = ensemble.joined([first, *others])
    if config.advantage == "gae":
        actors.critic = ValueHead(actors.policy) if config.critic == "shared" else _adapted_critic(base, actors, fresh)
    return actors


def _adapted_reward_model(base: nn.Module, folder: Path, fresh: tuple[int, float, int], device: str) -> lora.Adapted:
    """The first reward model of an artifact: an adapter on the base, or a model of its own, with one for a critic."""
    saved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if (folder / lora.SAVED).is_file():
        reward_model = lora.Adapted(base, "reward", lora.load_adapter(base, "reward", folder), (0.0, 1.0))
    else:
        model = loading.load_reward_model(folder, device)
        lora.add_adapter(model, "critic", *fresh)
        reward_model = lora.Adapted(model, None, cast(nn.Module, model.score))
    config = reward_model.config
    config.score_mean, config.score_std = saved.score_mean, saved.score_std
    config.ensemble = getattr(saved, "ensemble", None)
    return reward_model


def _adapted_critic(base: nn.Module, actors: Actors, fresh: tuple[int, float, int]) -> lora.Adapted:
    """A critic that starts from the reward model, or without one from the SFT model with values of 0."""
    if actors.reward_model is None:
        lora.add_adapter(base, "critic", *fresh)
        return lora.Adapted(base, "critic", ValueHead(actors.policy).score)
    start = actors.reward_model.members[0]
    scale = (start.config.score_mean, start.config.score_std)
    score = copy.deepcopy(start.score).requires_grad_()
    if start.adapter is None:
        return lora.Adapted(start.base, "critic", score, scale)
    lora.copy_adapter(base, "reward", "critic")
    return lora.Adapted(base, "critic", score, scale)


def synchronise_reference(actors: Actors) -> None:
    """Make the reference what the policy is now."""
    weights = actors.policy.state_dict()
    if isinstance(actors.reference, lora.Adapted):
        weights = {name.replace(".policy.", ".reference."): value for name, value in weights.items()}
    actors.reference.load_state_dict(weights)


def save_policy(actors: Actors, inputs: dict[str, Path], tokenizer: Any, out: Path) -> None:
    """Write the policy as it is now as a model folder, an adapter merged into the SFT model."""
    policy = actors.policy
    if isinstance(policy, lora.Adapted):
        policy = lora.merge_into(loading.load_policy(inputs["sft"]), policy.base, "policy")
    loading.save(policy, tokenizer, out)


def save(actors: Actors, inputs: dict[str, Path], tokenizer: Any, out: Path) -> None:
    """Write the policy as a model folder, adapters merged (and by themselves in adapter/), the critic in critic/."""
    critic = actors.critic
    save_policy(actors, inputs, tokenizer, out)
    if isinstance(actors.policy, lora.Adapted):
        actors.policy.base_model  # noqa: B018  switches the policy's adapter on: that is the one which is saved
        actors.policy.base.save_pretrained(out / "adapter")
    if isinstance(critic, ValueHead):
        saved = loading.new_critic(out)
    elif isinstance(critic, lora.Adapted):
        start = loading.new_critic(inputs["sft"]) if critic.base is actors.policy.base else None
        start = start or loading.load_reward_model(inputs["reward"])
        saved = lora.merge_into(start, critic.base, "critic")
    if isinstance(critic, ValueHead | lora.Adapted):
        saved.score.load_state_dict(critic.score.state_dict())
        saved.config.score_mean, saved.config.score_std = critic.config.score_mean, critic.config.score_std
        critic = saved
    if critic is not None:
        loading.save(critic, tokenizer, out / "critic")


class Engine:
    """A vLLM engine that starts with the weights of the model folder `folder`.

    `memory_share` is its share of the GPU's memory, cache included, `ends` the tokens that end a reply. The engine
    keeps its weights in bf16 where `bf16` says that the policy computes in it, and in fp32 otherwise.
    """

    def __init__(self, folder: Path, sampling: SamplingConfig, memory_share: float, bf16: bool, ends: list[int]):
        # in this process the policy's tensors are handed over as they are, and the schedule is the same every time
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM then sends nothing about its use
        import vllm  # ty: ignore[import-not-found]  an extra that few install

        self.vllm, self.sampling, self.ends = vllm, sampling, ends
        self.llm = vllm.LLM(
            model=str(folder),
            generation_config="vllm",  # neither top-k, top-p nor end tokens of the folder's generation_config.json
            dtype="bfloat16" if bf16 else "float32",
            gpu_memory_utilization=memory_share,
            max_num_seqs=sampling.batch_size,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
        )

    @torch.no_grad()
    def synchronise(self, policy: Any) -> None:
        """Give the engine the policy's weights, adapters merged, and have it forget keys and values of the old ones."""
        if isinstance(policy, lora.Adapted):
            weights = lora.merged_weights(policy.base, policy.adapter)
        else:
            weights = ((name, parameter.detach()) for name, parameter in policy.named_parameters())
        self.llm.apply_model(lambda model: model.load_weights(weights))
        if not self.llm.reset_prefix_cache():
            raise UserError("ppo.sampler=vllm: vLLM did not reset its prefix cache; set ppo.sampler=own")

    def sample(self, policy: Any, prompts: list[list[int]], uniforms: Tensor) -> list[Reply]:
        """One reply of the policy, as it is now, to each prompt (token ids), in the order of the prompts.

        Log-probabilities are vLLM's own, and there are no values. A reply's seed is its first number of `uniforms`
        [N, R] in [0, 1), so that it is repeatable as far as vLLM is: on the same GPU and version.
        """
        self.synchronise(policy)
        seeds = (uniforms[:, 0] * 2**53).long().tolist()  # every float64 in [0, 1) as an integer of its own
        outputs = self.llm.generate(
            [self.vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts],
            [self._params(seed) for seed in seeds],
            use_tqdm=False,
        )
        return [self._reply(output.outputs[0]) for output in outputs]

    def _params(self, seed: int) -> Any:
        return self.vllm.SamplingParams(
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_new_tokens,
            stop_token_ids=self.ends,  # the token that stops a reply is part of its ids
            ignore_eos=True,  # no other token ends it
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            seed=seed,
        )

    def _reply(self, drawn: Any) -> Reply:
        ids = list(drawn.token_ids)
        logprobs = [candidates[token].logprob for token, candidates in zip(ids, drawn.logprobs, strict=True)]
        return Reply(ids, logprobs, ids[-1] in self.ends, [0.0] * len(ids))


def load_engine(job: Job, processes: int, ends: list[int]) -> Engine | None:
    """The engine that `ppo.sampler` asks for, None for our own sampler. Raises `UserError` where vLLM cannot run."""
    config = job.config
    if config.ppo.sampler == "own":
        return None
    if job.device.type != "cuda":
        raise UserError("ppo.sampler=vllm: needs a GPU, and this stage runs on CPU; set ppo.sampler=own")
    if processes > 1:
        raise UserError(f"ppo.sampler=vllm: serves one process, and there are {processes}; set ppo.sampler=own")
    try:
        return Engine(job.inputs["sft"], config.sampling, config.ppo.vllm_memory_share, job.device.bf16, ends)
    except ImportError as error:
        raise UserError(
            f"ppo.sampler=vllm: cannot import vllm ({str(error).splitlines()[0]}); install it with "
            "`pip install 'threefold[vllm]'`, or set ppo.sampler=own, which needs nothing"
        ) from error
