"""A tiny model of every architecture that the tests know."""

import torch
from helpers import perturb, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

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
    ids = {
        "pad_token_id": tiny_tokenizer().pad_token_id,
        "bos_token_id": 1,
        "eos_token_id": tiny_tokenizer().eos_token_id,
    }
    shape = NORMAL | SHAPES[model_type] | {"vocab_size": len(tiny_tokenizer())} | ids | options
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, dtype="float32")).eval()
    perturb(model, 0.05)  # norms and biases of new models are all the same
    return model
