"""Checkpoints of elsewhere: loaded whole, or refused in one line. No network; every checkpoint is made here."""

import json
import shutil

import pytest
import torch
from checkpoint_helpers import DATE, edit, hf, refused, settings, take
from helpers import composed, make_job, tiny_config, tiny_policy, tiny_reward_model, tiny_tokenizer, write_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from threefold import chain
from threefold.artifacts import digests
from threefold.evaluation import judge_model
from threefold.models import checkpoints, loading
from threefold.stages import tokenizer as tokenizer_stage

IDS = torch.tensor([[9, 30, 77, 120, 200]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tiny_policy("llama", tie_word_embeddings=False), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "checkpoint")


def edit_weights(folder, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def without_layer(weights):
    return {key: value for key, value in weights.items() if ".layers.1." not in key}


def with_a_head(weights):
    return weights | {"v_head.summary.weight": torch.zeros(1, 16)}


def cut(weights):
    return weights | {"model.layers.0.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"][:5]}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without_layer, "model.layers.1.input_layernorm.weight, .* and 6 more of LlamaForCausalLM is not in the"),
        (lambda weights: weights | {"lm_head.weight": None}, "lm_head.weight of LlamaForCausalLM is not in the"),
        (with_a_head, "v_head.summary.weight has no place in LlamaForCausalLM"),
        (cut, r"up_proj.weight has the shape \(5, 16\), and config.json asks for \(32, 16\)"),
    ],
)
def test_every_tensor_is_loaded_and_none_made_up(folder, change, line):
    edit_weights(folder, lambda weights: {k: v for k, v in change(weights).items() if v is not None})
    refused(line, take, folder)
    refused(line, loading.load_policy, folder)


def test_the_whole_of_a_checkpoint_is_taken_in_fp32(folder, base):
    """Sharded, in bf16, embeddings tied or not, and padded beyond the tokenizer."""
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_policy("llama", tie_word_embeddings=tied)
            model.resize_token_embeddings(320, mean_resizing=False)
            model.to(dtype)
            expected = {key: value.float() for key, value in model.state_dict().items()}
            place = folder.parent / f"{tied}-{dtype}"
            shutil.copytree(base, place, ignore=shutil.ignore_patterns("*.safetensors"))
            model.save_pretrained(place, max_shard_size="5KB")
            assert len(list(place.glob("model-*.safetensors"))) > 1
            taken = take(place)
            assert taken.state_dict().keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in taken.state_dict().items())
            assert taken.get_input_embeddings().num_embeddings == 320
            loading.save(taken, tiny_tokenizer(), place / "again")
            assert json.loads((place / "again/config.json").read_text())["dtype"] == "float32"


def spoil_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-*")).unlink()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (spoil_json, "config.json' is not a valid JSON file"),
        (remove("config.json"), "has no config.json with a model_type"),
        (remove("tokenizer.json"), "its tokenizer: cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a'), "its tokenizer: cannot be loaded"),
        (truncate, "model.safetensors is damaged"),
        (remove("model.safetensors"), r"has no weights \(model.safetensors\)"),
        (lose_a_shard, "cannot be loaded .*model-00002-of"),
        (pickled, r"its weights are pickled \(pytorch_model.bin\).*convert them to safetensors"),
        (lambda folder: edit(folder, model_type="unheard"), "its architecture, unheard, is unknown to transformers 5"),
        (lambda folder: edit(folder, hidden_size="wide"), "cannot be loaded .*hidden_size"),
        (lambda folder: edit(folder, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
        (lambda folder: edit(folder, architectures=["LlamaForSequenceClassification"]), "is a reward model or another"),
    ],
)
def test_a_broken_checkpoint_is_one_line(folder, spoil, line, capfd):
    spoil(folder)
    refused(line, take, folder)
    assert "LOAD REPORT" not in capfd.readouterr().err  # transformers' own table


@pytest.mark.parametrize(
    ("spoil", "line"),
    [(truncate, "model.safetensors"), (remove("config.json"), "config.json"), (spoil_json, "config.json")],
)
def test_a_broken_artifact_is_one_line(folder, spoil, line):
    spoil(folder)
    for load in (loading.load_policy, loading.load_reward_model, loading.new_critic):
        assert refused(line, load, folder).startswith(f"{folder}: ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nobody/no-such-model", "model.checkpoint=nobody/no-such-model: cannot be loaded"),
        ("./missing", "no such folder"),
        ("~/missing", "no such folder"),
        ("/missing/folder/of/mine", "no such folder"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(name, line):
    refused(line, take, name)
    refused(line, loading.from_checkpoint, settings(name), tiny_tokenizer())


def test_reward_models_encoders_and_encoder_decoders_are_no_policies(tmp_path, base):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=300, initializer_range=0.2, **shape))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=16, **small))
    for name, model, line in [
        ("reward", tiny_reward_model("llama"), r"a reward model or another classifier \(LlamaForSequenceC"),
        ("bert", bert, r"is no causal language model \(BertForMaskedLM\)"),
        ("bart", bart, r"is no causal language model \(BartForConditionalGeneration\)"),
        ("t5", t5, r"is no causal language model \(T5ForConditionalGeneration\)"),
    ]:
        folder = write_model(model, tmp_path / name)
        refused(line, tokenizer_stage.from_checkpoint, settings(folder), DATE)
        refused(line, loading.from_checkpoint, settings(folder), tiny_tokenizer())
        judge = composed("evaluate.judge_model.path=" + str(folder)).evaluate.judge_model
        refused(f"evaluate.judge_model.path=.*{line}", judge_model.check, judge, DATE)


def test_what_config_json_says_nothing_of_shows_in_the_model(tmp_path):
    """A reward model without `architectures`, tied or not, and an encoder that says that it is a decoder's class."""
    for tied in (True, False):
        config = tiny_config("llama", tie_word_embeddings=tied, num_labels=1)
        folder = write_model(LlamaForSequenceClassification(config), tmp_path / f"reward-{tied}")
        edit(folder, architectures=None)
        refused("is a reward model or another classifier", take, folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = AutoModelForCausalLM.from_config(BertConfig(vocab_size=300, initializer_range=0.2, **shape))
    folder = write_model(encoder, tmp_path / "encoder")
    refused(r"no causal language model \(BertLMHeadModel\): its tokens see later", take, folder)


IMAGES = {"vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}}


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5", "llama4", "mllama"])
def test_a_model_of_text_and_images_is_one_line(folder, kind):
    """transformers makes one as a causal language model, and its configuration has no hidden_size, no longest text."""
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": kind, "text_config": config, "architectures": ["AnyForConditionalGeneration"], **IMAGES}
    (folder / "config.json").write_text(json.dumps(whole))
    line = r"is a model of text and images \(AnyForConditionalGeneration\); save its language model by itself"
    refused(line, loading.check_checkpoint, settings(folder))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_causal_models_are_let_through(tmp_path, kind):
    take(write_model(tiny_policy(kind), tmp_path / kind))


def test_settings_of_sampling_that_do_not_go_together_do_not_keep_a_model_from_being_saved(folder):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    loading.save(take(folder), tiny_tokenizer(), folder / "saved")
    assert (folder / "saved/model.safetensors").is_file()


# --- new tokens


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_the_mean_of_the_others_and_nothing_is_drawn(tmp_path, tied):
    model = tiny_policy("llama", tie_word_embeddings=tied)
    model.resize_token_embeddings(290, mean_resizing=False)  # the tokenizer has 300
    model.lm_head.weight.data.mul_(1.0 if tied else 3.0)
    folder = write_model(model, tmp_path / "short")
    taken = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        taken.append(take(folder))
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        old = getattr(model, layer)().weight
        first, second = (getattr(model, layer)().weight for model in taken)
        assert first.shape == (300, 16) and torch.equal(first, second) and torch.equal(first[:290], old)
        torch.testing.assert_close(first[290:], old.double().mean(0).float().expand(10, -1))
    same = taken[0].get_input_embeddings().weight is taken[0].get_output_embeddings().weight
    assert same == tied and taken[0].config.vocab_size == 300


def test_rows_reach_the_highest_id_of_a_tokenizer_with_gaps(folder):
    class Gaps:
        pad_token_id = eos_token_id = 0

        def get_vocab(self):
            return {"a": 0, "b": 410}

        def __len__(self):
            return 2

    assert loading.from_checkpoint(settings(folder), Gaps()).get_input_embeddings().num_embeddings == 411


# --- adapters


def adapter(base, folder, task="CAUSAL_LM", **options):
    model = loading.load_policy(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type=task, **options)
    torch.manual_seed(3)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_merged_into_its_base(base, tmp_path):
    adapted = adapter(base, tmp_path / "adapter").eval()
    taken = take(tmp_path / "adapter")  # the base's tokenizer, as the folder has none
    expected, unchanged = adapted(input_ids=IDS).logits, loading.load_policy(base)(input_ids=IDS).logits
    torch.testing.assert_close(taken(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - unchanged).abs().max() > 0.1
    loading.save(taken, tiny_tokenizer(), tmp_path / "saved")
    torch.testing.assert_close(
        loading.load_policy(tmp_path / "saved")(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5
    )


def test_an_adapter_with_tokens_of_its_own_brings_their_rows(base, tmp_path):
    grown = loading.load_policy(base)
    grown.resize_token_embeddings(304, mean_resizing=False)
    adapted = get_peft_model(
        grown, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    for parameter in adapted.parameters():
        parameter.data.add_(0.01 * parameter.requires_grad)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    taken = take(tmp_path / "adapter")
    torch.testing.assert_close(taken(input_ids=IDS + 99).logits, adapted.eval()(input_ids=IDS + 99).logits)


def test_the_base_of_an_adapter_is_in_the_fingerprint(base, tmp_path):
    def digest():
        digests.file_digest.cache_clear()
        return chain.fingerprint_parts(hf(tmp_path / "adapter"), "tokenizer")["model.checkpoint"]

    base = shutil.copytree(base, tmp_path / "base")
    adapter(base, tmp_path / "adapter")
    before = digest()
    assert digest() == before
    edit_weights(base, lambda weights: {key: value + 1 for key, value in weights.items()})
    assert digest() != before


def test_an_adapter_without_its_base_or_its_weights_is_one_line(base, tmp_path):
    folder = tmp_path / "adapter"
    adapter(base, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if ".layers.1." not in key}, file)
    refused("and 1 more of the adapter does not fit its base model", take, folder)
    file.unlink()
    refused("is an adapter without adapter_model.safetensors", take, folder)
    save_file(weights, file)
    settings_file = folder / "adapter_config.json"
    named = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(named | {"base_model_name_or_path": str(tmp_path / "gone")}))
    refused(f"its base model {tmp_path}/gone: no such folder", take, folder)
    settings_file.write_text(json.dumps(named | {"base_model_name_or_path": str(folder)}))
    refused("is an adapter on another one", take, folder)
    settings_file.write_text("{}")
    refused("names no base_model_name_or_path", take, folder)


def test_an_adapter_names_the_revision_of_its_base(base, tmp_path, monkeypatch):
    """Configuration, tokenizer and weights are asked for at that revision (a folder has one and passes it over)."""
    asked = []
    reads = [(checkpoints.PreTrainedConfig, "get_config_dict")]
    reads += [(kind, "from_pretrained") for kind in (AutoTokenizer, AutoModelForCausalLM)]
    for kind, name, original in [(kind, name, getattr(kind, name)) for kind, name in reads]:

        def recorded(path, *given, original=original, kind=kind, **options):
            if "revision" in options and str(path) == str(base):
                asked.append((kind.__name__, options["revision"]))
            return original(path, *given, **options)

        monkeypatch.setattr(kind, name, recorded)
    adapter(base, tmp_path / "adapter", revision="v1")
    asked.clear()
    take(tmp_path / "adapter")
    assert {(kind.__name__, "v1") for kind, _ in reads} <= set(asked)


def test_an_adapter_in_an_artifact_or_as_a_judge_is_refused(base, folder, tmp_path):
    adapter(base, tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter/adapter_config.json", folder)
    for load in (loading.load_policy, loading.new_critic):
        refused("is an adapter", load, folder)


def test_the_checks_of_a_whole_model_are_in_the_stage(folder, tmp_path):
    """Pretraining itself refuses what the configuration and headers do not show."""
    from threefold.stages import pretrain

    edit_weights(folder, without_layer)
    job = make_job("pretrain", tmp_path / "job", "model=hf", f"model.checkpoint={folder}")
    refused("is not in the checkpoint", pretrain.start, job, tiny_tokenizer())


def test_messages_name_three_tensors_at_most():
    assert checkpoints.listed({"b", "a"}) == "a, b" and checkpoints.listed(set("edcba")) == "a, b, c and 2 more"
