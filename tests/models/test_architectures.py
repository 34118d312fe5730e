"""Architectures of transformers: what is sampled and scored is what a plain forward pass over one row gives."""

import pytest
import torch
from architectures import GATED, SHAPES, made
from helpers import make_ppo, random_ids, tiny_tokenizer, write_model
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from threefold.errors import UserError
from threefold.models import likelihood, loading
from threefold.sampling import decoding, sampler
from threefold.stages import ppo

PROMPTS = random_ids([3, 11, 1, 6, 20, 5], seed=1)
PAD = tiny_tokenizer().pad_token_id


@torch.no_grad()
def plain(model: torch.nn.Module, prompt: list[int], reply: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each reply token, from the model's own logits over one row without padding or cache."""
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1)[range(len(reply)), reply]


@pytest.fixture(params=list(SHAPES), scope="module")
def model(request) -> torch.nn.Module:
    return made(request.param)


def test_sampled_logprobs_are_those_of_an_unpadded_forward_pass(model):
    """A batch of prompts of other lengths: there is padding, and rows leave the batch."""
    limits = OmegaConf.create({"temperature": 0.7, "max_new_tokens": 10, "batch_size": 4, "static_cache": False})
    numbers = sampler.random_numbers(0, len(PROMPTS), limits)
    replies = sampler.sample(model, PROMPTS, limits, tiny_tokenizer(), numbers)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert reply.logprobs == pytest.approx(plain(model, prompt, reply.ids, 0.7).tolist(), abs=1e-4)


def test_reply_logprobs_are_those_of_an_unpadded_forward_pass(model):
    replies = random_ids([4, 9, 2, 1, 7, 12], seed=2)
    sums = likelihood.replies_logprobs(model, list(zip(PROMPTS, replies, strict=True)), PAD, batch_size=4)
    expected = [plain(model, p, r).sum().item() for p, r in zip(PROMPTS, replies, strict=True)]
    assert sums.tolist() == pytest.approx(expected, abs=2e-4)


LAYERS = ["qwen3", "gemma2", "granite", "cohere", "hyperclovax", "minicpm3", "modernbert-decoder", "falcon_h1", "opt"]


@pytest.mark.parametrize("model_type", LAYERS)
def test_the_output_layer_gives_the_models_own_logits_and_gradients(model_type):
    model, ids = made(model_type), torch.tensor(random_ids([7, 7]))
    expected = model(input_ids=ids, use_cache=False).logits
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = loading.output_logits(model, states)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(loading.output_logits(model, states[:, 3]), expected[:, 3], atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, own = (torch.autograd.grad(x.log_softmax(-1)[..., 5].sum(), parameters) for x in (logits, expected))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, own, strict=True))


def test_another_output_layer_than_the_models_own_is_refused(tmp_path, monkeypatch):
    model = made("granite")
    loading.require_own_logits(model)
    monkeypatch.setattr(loading, "output_logits", lambda model, states: model.get_output_embeddings()(states))
    with pytest.raises(UserError, match="granite: its output layer, given its hidden states, gives other logits"):
        loading.require_own_logits(model)
    folder = write_model(model, tmp_path / "model")
    with pytest.raises(UserError, match="granite: its output layer"):
        loading.load_policy(folder)


def test_a_trunk_under_another_name_is_said():
    """Llama 4 keeps its trunk as `model`, where transformers looks for `language_model`."""
    shape = GATED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **shape))
    with pytest.raises(UserError, match=r"^llama4_text: its trunk cannot be run apart from its output layer"):
        loading.require_own_logits(model)


@pytest.mark.parametrize("model_type", ["granite", "modernbert-decoder"])
def test_the_loss_on_pretraining_text_is_the_models_own(model_type, tmp_path):
    overrides = ["ppo.ptx_coef=1", "ppo.ptx_batch_size=3", "ppo.ptx_context=9"]
    made_ppo, model = make_ppo(tmp_path, 2, *overrides), made(model_type)
    ids = torch.tensor(random_ids([9, 9, 9]))
    made_ppo.actors.policy, made_ppo.text = model, [{"input_ids": row} for row in ids]
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert ppo.ptx_step(made_ppo, made_ppo.text, 0)["ptx_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_decoder_that_differs_from_a_forward_pass_is_not_used():
    """RWKV's state is no cache that can be passed on, and it does not know padding."""
    kinds = {name: decoding.kind_for(made(name)) for name in ("qwen3", "mamba", "lfm2", "bloom", "rwkv")}
    assert kinds == {
        "qwen3": decoding.FusedDecoder,
        **dict.fromkeys(("mamba", "lfm2", "bloom"), decoding.Decoder),
        "rwkv": decoding.RecomputingDecoder,
    }


def test_an_architecture_without_a_longest_sequence_has_room_for_every_prompt():
    limits = OmegaConf.create({"max_new_tokens": 10})
    prompts = random_ids([3, 60, 5000])
    assert sampler.with_room(prompts, made("bloom"), limits) == [0, 1, 2]
    assert sampler.with_room(prompts, made("mamba"), limits) == [0, 1, 2]
    assert sampler.with_room(prompts, made("mpt"), limits) == [0]  # 64 tokens


def test_longrope_reads_no_more_than_one_set_of_factors_holds_for():
    """Prompt and reply together stay within 16 tokens, beyond which every row of a batch is turned by other factors."""
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 4.0, 8.0, 16.0]}
    rope = factors | {"rope_type": "longrope", "rope_theta": 10000.0}
    model = made("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    assert loading.context_length(model.config) == 16
    assert loading.context_length(made("phi3").config) == 64
    limits = OmegaConf.create({"temperature": 1.0, "max_new_tokens": 8, "batch_size": 6, "static_cache": False})
    kept = sampler.with_room(PROMPTS, model, limits)
    assert [len(PROMPTS[i]) for i in kept] == [3, 1, 6, 5]
    prompts = [PROMPTS[i] for i in kept]
    replies = sampler.sample(model, prompts, limits, tiny_tokenizer(), sampler.random_numbers(0, 4, limits))
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.logprobs == pytest.approx(plain(model, prompt, reply.ids).tolist(), abs=1e-4)


@pytest.mark.parametrize("model_type", ["rwkv", "mamba", "gpt2"])
def test_what_is_saved_is_what_was_loaded(model_type, tmp_path):
    """RWKV's layers change their weights with the mode that they run in, and would be saved like that."""
    model = loading.load_policy(write_model(made(model_type), tmp_path / "model"))
    ids, prompt = torch.tensor(random_ids([9])), random_ids([4])[0]
    before = plain(model, prompt, random_ids([5], seed=3)[0])
    model.train()(input_ids=ids)
    model.eval()(input_ids=ids)
    again = loading.load_policy(write_model(model, tmp_path / "again"))
    assert torch.allclose(plain(again, prompt, random_ids([5], seed=3)[0]), before, atol=1e-5)
