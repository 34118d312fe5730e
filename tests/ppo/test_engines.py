"""vLLM as PPO's sampler, against a stand-in that has the part of vLLM's interface that is used, and nothing else.

Where that part is documented, for vLLM 0.29 to 0.33:
  LLM(model, dtype, gpu_memory_utilization), LLM.generate(prompts, sampling_params, use_tqdm),
  LLM.apply_model(func), LLM.reset_prefix_cache()      https://docs.vllm.ai/en/stable/api/vllm/entrypoints/llm/
  LLM(generation_config, logprobs_mode, max_num_seqs)  https://docs.vllm.ai/en/stable/configuration/engine_args/
  SamplingParams(...)                                  https://docs.vllm.ai/en/stable/api/vllm/sampling_params/
  TokensPrompt(prompt_token_ids)                       https://docs.vllm.ai/en/stable/api/vllm/inputs/
  RequestOutput.outputs, CompletionOutput.token_ids, .logprobs
                                                       https://docs.vllm.ai/en/stable/api/vllm/outputs/
  Logprob.logprob                                      https://docs.vllm.ai/en/stable/api/vllm/logprobs/
  model.load_weights((name, tensor), ...)              https://docs.vllm.ai/en/stable/contributing/model/basic/
  VLLM_ENABLE_V1_MULTIPROCESSING                       https://docs.vllm.ai/en/stable/usage/reproducibility/
"""

import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from documents import documented
from helpers import PROMPTS, make_job, perturb, plain_logprobs, plain_score, tiny_policy, tiny_tokenizer, write_model
from ppo_kinds import KINDS, LORA, SHARED, inputs, trained
from torch import nn

from threefold.errors import UserError
from threefold.models import loading
from threefold.ppo import actors
from threefold.ppo.advantages import estimate
from threefold.sampling import sampler
from threefold.stages import ppo

END = tiny_tokenizer().eos_token_id


class SamplingParams:
    """Names and types of the parameters that are used; vLLM's own defaults would do harm where one is left out."""

    def __init__(
        self, *, temperature: float, max_tokens: int, stop_token_ids: list[int], ignore_eos: bool, logprobs: int,
        detokenize: bool, seed: int,
    ):  # fmt: skip
        assert 0 <= seed < 2**63 and logprobs == 0 and ignore_eos and not detokenize
        self.temperature, self.max_tokens, self.stop_token_ids, self.seed = (
            temperature,
            max_tokens,
            stop_token_ids,
            seed,
        )


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict:  # a TypedDict in vLLM
    return {"prompt_token_ids": prompt_token_ids}


class Model:
    """A model inside a vLLM worker: parameters of its own, which take a checkpoint's names and tensors."""

    def __init__(self, folder: str):
        self.inner = loading.load_policy(folder)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = dict(self.inner.named_parameters()), set()
        for name, tensor in weights:
            assert own[name].shape == tensor.shape and not tensor.requires_grad
            own[name].copy_(tensor)
            loaded.add(name)
        return loaded


class LLM:
    """Samples token by token from a model of its own. Prefixes stay in its cache until that is reset."""

    last = None

    def __init__(
        self, model: str, *, generation_config: str, dtype: str,
        gpu_memory_utilization: float, max_num_seqs: int, logprobs_mode: str,
    ):  # fmt: skip
        assert generation_config == "vllm" and dtype in ("float32", "bfloat16")
        assert 0 < gpu_memory_utilization <= 1 and max_num_seqs > 0 and logprobs_mode == "processed_logprobs"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.model, self.cached = Model(model), {}
        LLM.last = self

    def apply_model(self, func: Callable) -> list:
        return [func(self.model)]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.cached.clear()
        return True

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list:
        assert len(prompts) == len(sampling_params) and not use_tqdm and not torch.is_autocast_enabled("cpu")
        drawn = [self._drawn(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]
        return [SimpleNamespace(outputs=[completion]) for completion in drawn]

    @torch.no_grad()
    def _drawn(self, prompt: list[int], params: SamplingParams) -> SimpleNamespace:
        generator, ids, logprobs = torch.Generator().manual_seed(params.seed), [], []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in params.stop_token_ids):
            text = tuple(prompt + ids)
            if text not in self.cached:
                self.cached[text] = self.model.inner(input_ids=torch.tensor([text])).logits[0, -1]
            found = (self.cached[text] / params.temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(found.exp(), 1, generator=generator)))
            logprobs.append({ids[-1]: SimpleNamespace(logprob=found[ids[-1]].item())})
        return SimpleNamespace(token_ids=ids, logprobs=logprobs)


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, TokensPrompt
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


def loaded(folder, *overrides: str, model_type: str = "qwen3") -> ppo.Ppo:
    """PPO with the engine; the device is a GPU until the engine is there."""
    options = ["ppo.batch_size=12", "ppo.minibatches=2", "sampling.max_new_tokens=10", "ppo.sampler=vllm", *overrides]
    job = make_job("ppo", folder, *options)
    job.inputs |= inputs(folder, model_type=model_type)
    write_model(often_ending(tiny_policy(model_type)), folder / "sft")
    engine = actors.load_engine(on_gpu(job), 1, [END])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actors, "load_engine", lambda *_: engine)
        return ppo.load(job)


def on_gpu(job) -> SimpleNamespace:
    return SimpleNamespace(config=job.config, inputs=job.inputs, device=SimpleNamespace(type="cuda", bf16=False))


@torch.no_grad()
def often_ending(model: nn.Module) -> nn.Module:
    """The model with an end token that is likely after the prompts, so that some replies end by themselves."""
    states = [model.base_model(input_ids=torch.tensor([p.ids])).last_hidden_state[0, -1] for p in PROMPTS]
    mean = torch.stack(states).mean(0)
    model.get_output_embeddings().weight[END] = 4 * mean / mean.square().sum()
    return model


def replies_of(rollout) -> list[list[int]]:
    return [rollout.reply[row][rollout.mask[row].bool()].tolist() for row in range(len(rollout))]


def merged(made: ppo.Ppo, folder) -> nn.Module:
    """The policy as the stage saves it, which merges adapters by a way of its own."""
    actors.save(made.actors, made.job.inputs, tiny_tokenizer(), folder)
    return loading.load_policy(folder)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_has_the_policys_weights_also_after_an_update(tmp_path, vllm, kind, model_type):
    made = loaded(tmp_path, *KINDS[kind], model_type=model_type)
    before = {name: p.clone() for name, p in LLM.last.model.inner.named_parameters()}
    trained(made)
    made.engine.synchronise(made.actors.policy)
    saved = dict(merged(made, tmp_path / "saved").named_parameters())
    for name, parameter in LLM.last.model.inner.named_parameters():
        torch.testing.assert_close(parameter, saved[name], atol=1e-6, rtol=1e-6)
    assert any((saved[name] - before[name]).abs().max() > 1e-4 for name in saved)


def test_every_rollout_synchronises_first(tmp_path, vllm):
    made = loaded(tmp_path)
    ppo.roll_out(made, PROMPTS, 0)
    perturb(made.actors.policy, 0.1)  # the same prompts: old keys and values would show
    rollout = ppo.roll_out(made, PROMPTS, 0)
    torch.testing.assert_close(rollout.sampled_logprobs, rollout.logprobs, atol=1e-4, rtol=1e-4)


def test_replies_have_their_end_token_lengths_and_flags(tmp_path, vllm):
    made = loaded(tmp_path)
    limits = made.job.config.sampling
    replies = made.engine.sample(
        made.actors.policy, [p.ids for p in PROMPTS], sampler.random_numbers(1, len(PROMPTS), limits)
    )
    assert {reply.ended for reply in replies} == {True, False}
    for reply in replies:
        assert reply.ended == (reply.ids[-1] == END) and END not in reply.ids[:-1]
        assert reply.ended or len(reply.ids) == limits.max_new_tokens
        assert len(reply.ids) == len(reply.logprobs) == len(reply.values)


def test_replies_are_repeatable_and_equal_prompts_get_different_ones(tmp_path, vllm):
    made = loaded(tmp_path)
    same = [PROMPTS[1]] * 12
    first, again, other = (replies_of(ppo.roll_out(made, same, number)) for number in (3, 3, 4))
    assert first == again != other
    assert len({tuple(reply) for reply in first}) > 6


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_values_of_a_rollout_are_the_policys_own(tmp_path, vllm, kind, monkeypatch):
    made = trained(loaded(tmp_path, *KINDS[kind]))
    monkeypatch.setattr(made.engine, "synchronise", lambda policy: None)
    perturb(LLM.last.model.inner, 0.05)
    LLM.last.cached.clear()
    rollout, policy = ppo.roll_out(made, PROMPTS, 0), merged(made, tmp_path / "saved")
    critic = loading.load_reward_model(tmp_path / "saved" / "critic")
    temperature, mean, std = made.job.config.sampling.temperature, critic.config.score_mean, critic.config.score_std
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies_of(rollout), strict=True)):
        ours = plain_logprobs(policy, prompt.ids, reply, temperature)
        theirs = plain_logprobs(LLM.last.model.inner, prompt.ids, reply, temperature)
        torch.testing.assert_close(rollout.logprobs[row, : len(reply)], ours, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rollout.sampled_logprobs[row, : len(reply)], theirs, atol=1e-4, rtol=1e-4)
        values = [(plain_score(critic, prompt.ids + reply[:t]) - mean) / std for t in range(len(reply))]
        assert rollout.values[row, : len(reply)].tolist() == pytest.approx(values, abs=1e-3)
        assert not rollout.logprobs[row, len(reply) :].any() and not rollout.values[row, len(reply) :].any()


def test_values_of_a_shared_trunk_are_not_zero(tmp_path, vllm):
    made = loaded(tmp_path, *SHARED)
    made.actors.critic.score.weight.data.normal_(std=0.3)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies_of(rollout), strict=True)):
        with torch.no_grad():
            states = made.actors.policy.base_model(input_ids=torch.tensor([prompt.ids + reply])).last_hidden_state[0]
            values = made.actors.critic.score(states[len(prompt.ids) - 1 : -1])[:, 0]
        assert values.abs().max() > 1e-2
        torch.testing.assert_close(rollout.values[row, : len(reply)], values, atol=1e-4, rtol=1e-4)


def test_ratio_metrics_are_zero_for_equal_weights_and_exact_for_others(tmp_path, vllm, monkeypatch):
    made = loaded(tmp_path)
    equal = estimate(ppo.roll_out(made, PROMPTS, 0), 0.05, made.config)[2]
    assert 0 <= equal["engine_ratio_mean"] <= equal["engine_ratio_max"] < 1e-4
    monkeypatch.setattr(made.engine, "synchronise", lambda policy: None)
    perturb(LLM.last.model.inner, 0.05)
    LLM.last.cached.clear()
    rollout = ppo.roll_out(made, PROMPTS, 0)
    found, errors = estimate(rollout, 0.05, made.config)[2], []
    for prompt, reply in zip(PROMPTS, replies_of(rollout), strict=True):
        ours, theirs = (
            plain_logprobs(model, prompt.ids, reply, 0.8) for model in (made.actors.policy, LLM.last.model.inner)
        )
        errors += (ours - theirs).exp().sub(1).abs().tolist()
    assert made.job.config.sampling.temperature == 0.8 and max(errors) > 0.05
    assert found["engine_ratio_mean"] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    assert found["engine_ratio_max"] == pytest.approx(max(errors), rel=1e-3)


@pytest.mark.parametrize("options", [[], LORA + SHARED])
def test_training_logs_the_documented_metrics(tmp_path, vllm, options):
    made = loaded(tmp_path, "ppo.episodes=24", "ppo.min_score_std=null", *options)
    result = ppo.train(made, PROMPTS)
    extra = {"engine_ratio_mean", "engine_ratio_max"}
    assert set(result) == documented("ppo steps") | extra and extra <= documented("ppo steps of variants")
    assert result["engine_ratio_max"] < 1e-3 and result["first_ratio_error"] < 1e-3


def test_our_own_sampler_has_no_ratio_metrics(tmp_path):
    job = make_job("ppo", tmp_path, "ppo.batch_size=12", "sampling.max_new_tokens=4")
    job.inputs |= inputs(tmp_path)
    made = ppo.load(job)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    assert made.engine is None and torch.equal(rollout.sampled_logprobs, rollout.logprobs)
    assert "engine_ratio_mean" not in estimate(rollout, 0.05, made.config)[2]


def test_without_vllm_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # what an import of it then finds
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    job = make_job("ppo", tmp_path, "ppo.sampler=vllm")
    job.inputs["sft"] = tmp_path
    with pytest.raises(UserError, match=r"pip install 'threefold\[vllm\]'.*ppo.sampler=own.*nothing") as error:
        actors.load_engine(on_gpu(job), 1, [END])
    assert "\n" not in str(error.value)


def test_vllm_is_refused_without_a_gpu_and_for_several_processes(tmp_path, vllm):
    job = make_job("ppo", tmp_path, "ppo.sampler=vllm")
    job.inputs["sft"] = tmp_path
    with pytest.raises(UserError, match=r"needs a GPU.*ppo.sampler=own"):
        actors.load_engine(job, 1, [END])
    with pytest.raises(UserError, match=r"one process.*ppo.sampler=own"):
        actors.load_engine(on_gpu(job), 2, [END])


def test_the_stand_in_refuses_names_that_vllm_does_not_have(vllm, tmp_path):
    with pytest.raises(TypeError):
        LLM(str(tmp_path), gpu_memory_share=0.3)
    with pytest.raises(TypeError):
        SamplingParams(max_new_tokens=3)
    with pytest.raises(TypeError):
        TokensPrompt(token_ids=[3])
