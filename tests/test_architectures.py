"""Architectures of transformers: what is sampled and scored is what a plain forward pass over one row gives."""

import pytest
import torch
from helpers import make_ppo, perturb, random_ids, tiny_tokenizer, write_model
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import decoding, likelihood, models, sampling
from pipeline.errors import UserError
from stages import ppo

PROMPTS = random_ids([3, 11, 1, 6, 20, 5], seed=1)
PAD = tiny_tokenizer().pad_token_id
COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
GATED = COMMON | {"intermediate_size": 24, "num_key_value_heads": 1}
NORMAL = {"initializer_range": 0.2}
# windows are shorter than prompts and replies, and scales and caps far from 1, so that each of them matters
SHAPES = {
    "llama": GATED,
    "qwen3": GATED | {"head_dim": 8},
    "mistral": GATED | {"sliding_window": 4},
    "gpt2": COMMON,
    "gpt_neo": {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "window_size": 4, "max_position_embeddings": 64,
    },
    "gpt_neox": COMMON | {"intermediate_size": 24},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4},
    "opt": COMMON | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "falcon": COMMON | {"new_decoder_architecture": False},
    "phi": COMMON | {"intermediate_size": 24},
    "phi3": GATED,
    "stablelm": GATED,
    "olmo2": GATED,
    "olmo3": GATED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "starcoder2": GATED | {"sliding_window": None},
    "gemma": GATED | {"head_dim": 8},
    "gemma2": GATED | {
        "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8,
    },
    "gemma3_text": GATED | {
        "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "granite": GATED | {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": GATED | {"logit_scale": 0.25},
    "cohere2": GATED | {"logit_scale": 0.25, "sliding_window": 4},
    "hyperclovax": GATED | {"logits_scaling": 0.25},
    "minicpm3": GATED | {
        "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "dim_model_base": 4,
    },
    "nanochat": GATED | {"final_logit_softcapping": 2.0},
    "modernbert-decoder": COMMON | {"intermediate_size": 24, "local_attention": 4, "global_attn_every_n_layers": 2},
    "mixtral": GATED | {"num_local_experts": 2, "sliding_window": None},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "mamba2": {
        "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 8, "attention_hidden_size": 16, "context_length": 64},
    "xlstm": {"hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
    "recurrent_gemma": {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "lru_width": 16,
        "attention_window_size": 64, "logits_soft_cap": 2.0,
    },
    "lfm2": GATED | {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": GATED | {
        "mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_chunk_size": 8,
        "lm_head_multiplier": 0.25,
    },
    "jamba": GATED | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False,
    },
    "qwen3_next": GATED | {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1,
    },
}  # fmt: skip


def made(model_type: str, **options) -> torch.nn.Module:
    ids = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": tiny_tokenizer().eos_token_id}
    shape = NORMAL | SHAPES[model_type] | {"vocab_size": len(tiny_tokenizer())} | ids | options
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, dtype="float32")).eval()
    perturb(model, 0.05)  # norms and biases of new models are all the same
    return model


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
    numbers = sampling.random_numbers(0, len(PROMPTS), limits)
    replies = sampling.sample(model, PROMPTS, limits, tiny_tokenizer(), numbers)
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
    logits = models.output_logits(model, states)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(models.output_logits(model, states[:, 3]), expected[:, 3], atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, own = (torch.autograd.grad(x.log_softmax(-1)[..., 5].sum(), parameters) for x in (logits, expected))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, own, strict=True))


def test_another_output_layer_than_the_models_own_is_refused(tmp_path, monkeypatch):
    model = made("granite")
    models.require_own_logits(model)
    monkeypatch.setattr(models, "output_logits", lambda model, states: model.get_output_embeddings()(states))
    with pytest.raises(UserError, match="granite: its output layer, given its hidden states, gives other logits"):
        models.require_own_logits(model)
    folder = write_model(model, tmp_path / "model")
    with pytest.raises(UserError, match="granite: its output layer"):
        models.load_policy(folder)


def test_a_trunk_under_another_name_is_said():
    """Llama 4 keeps its trunk as `model`, where transformers looks for `language_model`."""
    shape = GATED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 24, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **shape))
    with pytest.raises(UserError, match=r"^llama4_text: its trunk cannot be run apart from its output layer"):
        models.require_own_logits(model)


@pytest.mark.parametrize("model_type", ["granite", "modernbert-decoder"])
def test_the_loss_on_pretraining_text_is_the_models_own(model_type, tmp_path):
    overrides = ["ppo.ptx_coef=1", "ppo.ptx_batch_size=3", "ppo.ptx_context=9"]
    made_ppo, model = make_ppo(tmp_path, 2, *overrides), made(model_type)
    ids = torch.tensor(random_ids([9, 9, 9]))
    made_ppo.actors.policy, made_ppo.text = model, [{"input_ids": row} for row in ids]
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert ppo.ptx_step(made_ppo, 0)["ptx_loss"] == pytest.approx(expected, rel=1e-5)


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
    assert sampling.with_room(prompts, made("bloom"), limits) == [0, 1, 2]
    assert sampling.with_room(prompts, made("mamba"), limits) == [0, 1, 2]
    assert sampling.with_room(prompts, made("mpt"), limits) == [0]  # 64 tokens


def test_longrope_reads_no_more_than_one_set_of_factors_holds_for():
    """Prompt and reply together stay within 16 tokens, beyond which every row of a batch is turned by other factors."""
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 4.0, 8.0, 16.0]}
    rope = factors | {"rope_type": "longrope", "rope_theta": 10000.0}
    model = made("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    assert models.context_length(model.config) == 16
    assert models.context_length(made("phi3").config) == 64
    limits = OmegaConf.create({"temperature": 1.0, "max_new_tokens": 8, "batch_size": 6, "static_cache": False})
    kept = sampling.with_room(PROMPTS, model, limits)
    assert [len(PROMPTS[i]) for i in kept] == [3, 1, 6, 5]
    prompts = [PROMPTS[i] for i in kept]
    replies = sampling.sample(model, prompts, limits, tiny_tokenizer(), sampling.random_numbers(0, 4, limits))
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.logprobs == pytest.approx(plain(model, prompt, reply.ids).tolist(), abs=1e-4)


@pytest.mark.parametrize("model_type", ["rwkv", "mamba", "gpt2"])
def test_what_is_saved_is_what_was_loaded(model_type, tmp_path):
    """RWKV's layers change their weights with the mode that they run in, and would be saved like that."""
    model = models.load_policy(write_model(made(model_type), tmp_path / "model"))
    ids, prompt = torch.tensor(random_ids([9])), random_ids([4])[0]
    before = plain(model, prompt, random_ids([5], seed=3)[0])
    model.train()(input_ids=ids)
    model.eval()(input_ids=ids)
    again = models.load_policy(write_model(model, tmp_path / "again"))
    assert torch.allclose(plain(again, prompt, random_ids([5], seed=3)[0]), before, atol=1e-5)
