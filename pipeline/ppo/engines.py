"""vLLM as the engine that samples PPO's replies: in this process, on the policy's GPU, with the policy's weights.

The interface is that of vLLM 0.29 to 0.33: docs.vllm.ai, pages `LLM`, `SamplingParams` and `Reproducibility`.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold.errors import UserError
from threefold.execution.job import Job
from threefold.models import lora
from threefold.sampling.sampler import Reply
from threefold.schema.stages import SamplingConfig


class Engine:
    """A vLLM engine that starts with the weights of the model folder `folder`.

    `memory_share` is its share of the GPU's memory, cache included, `end` the token that ends a reply. The engine
    keeps its weights in bf16 where `bf16` says that the policy computes in it, and in fp32 otherwise.
    """

    def __init__(self, folder: Path, sampling: SamplingConfig, memory_share: float, bf16: bool, end: int):
        # in this process the policy's tensors are handed over as they are, and the schedule is the same every time
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM then sends nothing about its use
        import vllm  # ty: ignore[import-not-found]  an extra that few install

        self.vllm, self.sampling, self.end = vllm, sampling, end
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
            stop_token_ids=[self.end],  # the token that stops a reply is part of its ids
            ignore_eos=True,  # no other token ends it
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            seed=seed,
        )

    def _reply(self, drawn: Any) -> Reply:
        ids = list(drawn.token_ids)
        logprobs = [candidates[token].logprob for token, candidates in zip(ids, drawn.logprobs, strict=True)]
        return Reply(ids, logprobs, ids[-1] == self.end, [0.0] * len(ids))


def load(job: Job, processes: int, end: int) -> Engine | None:
    """The engine that `ppo.sampler` asks for, None for our own sampler. Raises `UserError` where vLLM cannot run."""
    config = job.config
    if config.ppo.sampler == "own":
        return None
    if job.device.type != "cuda":
        raise UserError("ppo.sampler=vllm: needs a GPU, and this stage runs on CPU; set ppo.sampler=own")
    if processes > 1:
        raise UserError(f"ppo.sampler=vllm: serves one process, and there are {processes}; set ppo.sampler=own")
    try:
        return Engine(job.inputs["sft"], config.sampling, config.ppo.vllm_memory_share, job.device.bf16, end)
    except ImportError as error:
        raise UserError(
            f"ppo.sampler=vllm: cannot import vllm ({str(error).splitlines()[0]}); install it with "
            "`pip install 'threefold[vllm]'`, or set ppo.sampler=own, which needs nothing"
        ) from error
