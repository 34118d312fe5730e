"""Checkpoints in GGUF: real files, written here with llama.cpp's own package, through the chain and refused."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
from checkpoint_helpers import DATE
from helpers import composed, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from threefold import chain, cli
from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.models import chat, checkpoints, loading
from threefold.stages import tokenizer as tokenizer_stage

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
IDS = torch.tensor([[9, 30, 77, 120, 200]])


@pytest.fixture
def model():
    torch.manual_seed(5)
    config = tiny_config("llama", tie_word_embeddings=False)
    config.update({"hidden_size": 64, "head_dim": 32, "intermediate_size": 96})
    return AutoModelForCausalLM.from_config(config).eval()


def gguf_name(name):
    """llama.cpp's name of a tensor of transformers' Llama."""
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.weight"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight, heads):
    """The rows of a query or key matrix in llama.cpp's order: the two halves of each head's dimensions alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(file, model, template=None, quantised=False, **more):
    """The model in GGUF; returns the weights as the file holds them, by transformers' names."""
    config, tokenizer, writer = model.config, tiny_tokenizer(), gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer, template)
    stored = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(interleaved(values, heads) if heads else values, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        stored[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    for name, values in more.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.tensor(np.array(values)) for name, values in stored.items()}


def write_tokenizer(writer, tokenizer, template):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template:
        writer.add_chat_template(template)


def settings(folder, file="tiny.gguf"):
    return composed("tracker=none", f"model.checkpoint={folder}", f"model.gguf_file={file}").model


@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_is_an_ordinary_fp32_model(tmp_path, model, quantised):
    stored = write(tmp_path / "tiny.gguf", model, chat.TEMPLATE, quantised)
    assert not quantised or any((stored[name] != value).any() for name, value in model.state_dict().items())
    tokenizer = tokenizer_stage.from_checkpoint(settings(tmp_path), DATE)
    taken = loading.from_checkpoint(settings(tmp_path), tokenizer)
    for place in (None, tmp_path / "saved"):
        if place:
            loading.save(taken, tokenizer, place)
            taken = loading.load_policy(place)
        assert {p.dtype for p in taken.parameters()} == {torch.float32}
        assert taken.state_dict().keys() == stored.keys()
        for name, value in taken.state_dict().items():
            assert torch.equal(value[: len(stored[name])], stored[name]), name  # transformers adds an <|endoftext|>
    model.load_state_dict(stored)
    torch.testing.assert_close(taken(input_ids=IDS).logits[..., :300], model(input_ids=IDS).logits)
    config = read_json(tmp_path / "saved/config.json")
    assert "quantization_config" not in config and config["max_position_embeddings"] == 128
    assert str(tmp_path) not in (tmp_path / "saved/tokenizer_config.json").read_text()


def test_its_tokenizer_and_template_are_those_of_the_file(tmp_path, model):
    write(tmp_path / "tiny.gguf", model, chat.TEMPLATE)
    tokenizer, ours = tokenizer_stage.from_checkpoint(settings(tmp_path), DATE), tiny_tokenizer()
    text = "The weather is nice;  and 雨, thank you\n"
    assert tokenizer(text)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "Hello there"}]
    assert chat.prompt_ids(tokenizer, messages) == chat.prompt_ids(ours, messages)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (chat.END, chat.PAD)


@pytest.mark.slow
def test_a_gguf_checkpoint_goes_through_the_chain(tmp_path, model):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder / "tiny.gguf", model, chat.TEMPLATE, quantised=True)
    options = ["model=hf", f"model.checkpoint={folder}", "model.gguf_file=tiny.gguf", "pretrain.tokens=0"]
    options += ["sft.epochs=1", "sampling.max_new_tokens=8", "pretrain.context=64"]
    options += [
        "data.replies.max_unusable_share=0.5"
    ]  # its tokens are short, so some dialogues are longer than its context
    cli.main(["run", "experiment=smoke", "tracker=none", f"runs={tmp_path}/runs", "target=sft", *options])
    metrics = read_json(tmp_path / "runs/smoke/sft/metrics.json")
    assert metrics["reply_bits_per_byte"] > 0
    assert metrics["template_hash"] == read_json(tmp_path / "runs/smoke/tokenizer/metrics.json")["template_hash"]
    for stage in ("pretrain", "sft"):
        assert (tmp_path / "runs/smoke" / stage / "model.safetensors").is_file()


def test_the_file_in_the_folder_is_taken_and_not_one_in_the_working_directory(tmp_path, model, monkeypatch):
    (tmp_path / "here").mkdir()
    write(tmp_path / "tiny.gguf", model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    write(tmp_path / "here/tiny.gguf", model)
    monkeypatch.chdir(tmp_path / "here")
    taken = loading.from_checkpoint(settings(tmp_path), tokenizer_stage.from_checkpoint(settings(tmp_path), DATE))
    assert taken.lm_head.weight.abs().sum() > 0


def test_the_content_of_the_file_is_in_the_fingerprint(tmp_path, model):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder in folders:
        folder.mkdir()
        if folder.name == "other":
            model.lm_head.weight.data.zero_()
        write(folder / "tiny.gguf", model)
    one, same, other = (
        chain.fingerprint_parts(composed("model.gguf_file=tiny.gguf", f"model.checkpoint={folder}"), "pretrain")
        for folder in folders
    )
    assert one == same and one["model.checkpoint"] != other["model.checkpoint"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("other.gguf", "model.gguf_file=other.gguf: .* has no such file; it has short.gguf, text.gguf, tiny.gguf"),
        ("../tiny.gguf", "must be the name of a file in model.checkpoint"),
        ("text.gguf", "model.gguf_file=text.gguf: .*cannot be loaded"),
        ("short.gguf", "model.gguf_file=short.gguf: .*cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line(tmp_path, model, file, line):
    write(tmp_path / "tiny.gguf", model)
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "short.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:4000])
    for call in (
        lambda model: tokenizer_stage.from_checkpoint(model, DATE),
        lambda model: loading.from_checkpoint(model, tiny_tokenizer()),
    ):
        with pytest.raises(UserError, match=line) as caught:
            call(settings(tmp_path, file))
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_found_before_the_first_stage(tmp_path, model):
    write(tmp_path / "tiny.gguf", model)
    config = composed("tracker=none", f"model.checkpoint={tmp_path}", "model.gguf_file=tny.gguf")
    with pytest.raises(UserError, match=r"has no such file; it has tiny\.gguf"):
        chain.check(config, chain.plan(config, ["tokenizer"]))
    without = composed("tracker=none", f"model.checkpoint={tmp_path}")
    with pytest.raises(UserError, match=r"has GGUF files only; set model\.gguf_file=tiny\.gguf"):
        chain.check(without, chain.plan(without, ["tokenizer"]))
    as_folder = composed("tracker=none", f"model.checkpoint={tmp_path}/tiny.gguf")
    with pytest.raises(UserError, match=f"set model.checkpoint={tmp_path} and model.gguf_file=tiny.gguf"):
        chain.check(as_folder, chain.plan(as_folder, ["tokenizer"]))


def test_tensors_that_transformers_would_skip_are_refused(tmp_path, model):
    """rope_freqs.weight holds Llama 3's frequencies; without them every logit is another."""
    for name, values in (("rope_freqs.weight", np.ones(16)), ("blk.0.attn_q.bias", np.ones(64))):
        write(tmp_path / "tiny.gguf", model, **{name: values.astype(np.float32)})
        with pytest.raises(UserError, match=f"{name} has no place in LlamaForCausalLM"):
            loading.from_checkpoint(settings(tmp_path), tiny_tokenizer())


def test_without_the_package_a_line_names_it(tmp_path, model, monkeypatch):
    write(tmp_path / "tiny.gguf", model)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match=r"needs the package gguf; install it with `pip install 'threefold\[gguf\]'`"):
        checkpoints.check_gguf(settings(tmp_path))
