"""The preflight: what a stage could not use is refused in a line before the first stage; what is made is not loaded."""

import copy
import json
import time

import pytest
import torch
from architectures import made
from data_helpers import lines, said, source
from helpers import composed, tiny_policy, tiny_tokenizer, write_model
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from threefold import chain
from threefold.chain import preflight
from threefold.config.compose import compose
from threefold.data import reading
from threefold.errors import UserError
from threefold.models import loading
from threefold.sampling import decoding

DIALOGUES = [
    [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"This is answer {i}."}]
    for i in range(40)
]


@pytest.fixture(autouse=True)
def nothing_tried():
    preflight._check_model.cache_clear()
    preflight._check_judge.cache_clear()


@pytest.fixture
def world(tmp_path):
    """Overrides of a run with dialogues of its own, line 3 with a system message."""
    rows = [{"messages": turns} for turns in DIALOGUES]
    rows[2] = {"messages": [{"role": "system", "content": "Be kind."}, *DIALOGUES[2]]}
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.{name}.path={file}" for name in ("text", "replies")]
    formats = [f"data.{name}.format=messages" for name in ("text", "replies")]
    return [f"runs={tmp_path / 'runs'}", *data, *formats, "data.preferences.path=null"]


def checkpoint(folder, model, template=None):
    """Overrides for a model folder as transformers saves it."""
    tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return ["model=hf", f"model.checkpoint={folder}"]


def checked(overrides, *more):
    config = compose(["experiment=smoke", *overrides, *more])
    chain.check(config, chain.plan(config, chain.wanted(config)))


def refusal(overrides, *more) -> str:
    with pytest.raises(UserError) as error:
        checked(overrides, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "granite", "lfm2"])
def test_a_model_that_can_be_used_passes_in_a_moment(model_type, world, tmp_path):
    overrides = [*world, *checkpoint(tmp_path / "model", made(model_type)), "target=sft"]
    state = torch.random.get_rng_state()
    started = time.process_time()  # not of the clock: the machine may be busy
    checked(overrides)
    assert time.process_time() - started < 5
    assert torch.equal(torch.random.get_rng_state(), state)  # stages draw what they drew without it


def test_an_encoder_is_no_policy(world, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model("bert", **shape, vocab_size=len(tiny_tokenizer()), initializer_range=0.3)
    torch.manual_seed(0)
    overrides = checkpoint(tmp_path / "model", AutoModelForCausalLM.from_config(config))
    said = refusal([*world, *overrides])
    assert said.startswith(f"model.checkpoint={tmp_path / 'model'}: is no causal language model (BertLMHeadModel)")


def test_weights_that_are_no_numbers_are_refused(world, tmp_path):
    model = tiny_policy()
    model.get_input_embeddings().weight.data[:] = float("nan")
    assert "its logits are not finite" in refusal([*world, *checkpoint(tmp_path / "model", model)])


def test_an_architecture_without_a_reward_model_is_refused_only_where_one_is_made(world, tmp_path):
    overrides = [*world, *checkpoint(tmp_path / "model", made("mamba"))]
    assert "no reward model of the architecture mamba" in refusal(overrides, "target=reward")
    checked(overrides, "target=sft")


def finished(overrides, model, *more):
    """Checks the chain of `overrides` where tokenizer, pretrain and sft have made `model`."""
    config = compose(["experiment=smoke", *overrides, *more])
    planned = chain.plan(config, chain.wanted(config))
    for name in ("tokenizer", "pretrain", "sft"):
        write_model(model, planned[name].artifact.folder)
        (planned[name].artifact.folder / "manifest.json").write_text("{}")
    chain.check(config, planned)


def test_what_is_asked_of_a_model_that_is_made_is_refused_before_any_stage(world):
    """No reward model of mamba, and no static cache: both would show after the comparisons are sampled."""
    with pytest.raises(UserError, match="no reward model of the architecture mamba"):
        finished(world, made("mamba"), "target=reward")
    with pytest.raises(UserError, match="static_cache=true: not for mamba"):
        finished(world, made("mamba"), "target=comparisons", "sampling.static_cache=true")
    finished(world, made("mamba"), "target=comparisons")
    finished(world, tiny_policy(), "target=reward", "sampling.static_cache=true")


def test_a_layout_that_muon_does_not_know_is_refused_before_any_stage(world, tmp_path):
    overrides = [*world, *checkpoint(tmp_path / "model", made("mamba2")), "target=pretrain"]
    message = refusal(overrides, "pretrain.tokens=10000")
    assert message.startswith("pretrain.tokens: Muon") and "mamba2 stores several as one" in message
    checked(overrides, "pretrain.tokens=0")


def test_dpo_of_replies_that_were_labelled_one_by_one_is_refused_before_any_stage(world, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"q {i}", "completion": "a", "label": i % 2}) + "\n" for i in range(40))
    )
    given = [*world, f"data.preferences.path={file}", "data.preferences.format=unpaired"]
    for more in ((), ("target=dpo",)):
        assert refusal(given, *more).startswith(
            "data.preferences.format=unpaired: replies that were labelled one by one"
        )
    checked(given, "target=reward")


def test_a_slow_decoder_is_said(world, tmp_path, capsys):
    checked([*world, *checkpoint(tmp_path / "model", made("rwkv")), "target=sft"])
    assert "every token takes a whole forward pass: slow" in capsys.readouterr().out


def test_a_static_cache_that_the_model_cannot_have_is_refused(world, tmp_path):
    overrides = [*world, *checkpoint(tmp_path / "model", tiny_policy("gpt2")), "sampling.static_cache=true"]
    assert "sampling.static_cache=true: not for gpt2" in refusal(overrides)


def test_a_folder_that_is_no_checkpoint_is_one_line(world, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal([*world, "model=hf", f"model.checkpoint={tmp_path / 'empty'}"])
    assert said.startswith(f"model.checkpoint={tmp_path / 'empty'}")


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def dialogues(file, rows, with_system):
    """A file of `rows` dialogues, those numbered in `with_system` with a system message; overrides that use it."""
    turns = [[said("user", f"question {i}?"), said("assistant", f"This is answer {i}.")] for i in range(rows)]
    system = [said("system", "Be kind.")]
    lines(file, [{"messages": system * (i in with_system) + turn, "split": "train"} for i, turn in enumerate(turns)])
    return [f"data.replies.path={file}", "data.replies.format=messages", "model.checkpoint=here", "model=hf"]


def rows_checked(overrides, template=TEMPLATE):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    preflight.check_rows(compose(["experiment=smoke", *overrides]), tokenizer, ["data.replies"])


def test_a_row_that_the_template_refuses_is_named_by_file_and_line_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"chats\.jsonl, line 3 for one: System role not sup.*; give .*, or set data."):
        rows_checked(dialogues(tmp_path / "chats.jsonl", 40, {2, 5}))


def test_replies_that_the_template_writes_after_other_text_are_refused_with_the_switch_that_helps(tmp_path):
    opened = "{% if enable_thinking is not defined %}<think>\n{% endif %}{% endif %}"
    thinking = TEMPLATE.removesuffix("{% endif %}") + opened
    given = dialogues(tmp_path / "chats.jsonl", 40, {})
    with pytest.raises(UserError, match=r"line 1 for one: it opens a reply with .*\{enable_thinking: false\}"):
        rows_checked(given, thinking)
    rows_checked(given, "{% set enable_thinking = false %}" + thinking)


def test_refused_rows_at_the_top_are_held_to_all_rows(tmp_path):
    rows_checked(dialogues(tmp_path / "few.jsonl", 3000, range(6)))  # 0.2 %
    with pytest.raises(UserError, match=r"refuses 31 of the first 200 of 3,000 dialogues"):
        rows_checked(dialogues(tmp_path / "more.jsonl", 3000, range(31)))
    every = [*dialogues(tmp_path / "all.jsonl", 600, range(200)), "data.replies.max_unusable_share=0.5"]
    with pytest.raises(UserError, match=r"refuses 200 of the first 200 of 600 dialogues"):
        rows_checked(every)
    rows_checked([*every, "data.replies.max_unusable_share=1"])


def test_the_line_of_a_prompt_is_that_of_the_whole_message(tmp_path):
    history, hi = [said("user", "History of Rome?"), said("assistant", "Hi there")], said("user", "Hi")
    rows = [history, [*history, hi, said("assistant", "a")], [said("user", "Hi!"), said("assistant", "Hi")]]
    rows += [[hi, said("assistant", "b"), said("user", "well?"), said("assistant", "c")]]
    file = lines(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])
    config = compose([f"data.replies.path={file}", "data.replies.format=messages"]).data
    for prompt, line in (([hi], 4), (rows[1][:3], 2), (rows[3][:3], 4)):
        assert reading.place_of(config.replies, prompt, config.dialogue) == f"the row in chats.jsonl, line {line}"
    last_turn = OmegaConf.merge(config.dialogue, {"context_turns": 1})
    assert reading.place_of(config.replies, [said("user", "well?")], last_turn).endswith("line 4")
    pairs = [{"prompt": question, "chosen": "a", "rejected": "b"} for question in ("Hi there", "Hi")]
    found = source(lines(tmp_path / "pairs.jsonl", pairs), "preference")
    assert reading.place_of(found, [hi], config.dialogue) == "the row in pairs.jsonl, line 2"


def test_nothing_is_loaded_for_stages_that_are_made(world, tmp_path, monkeypatch):
    config = compose(["experiment=smoke", *world, "model=hf", f"model.checkpoint={tmp_path}", "target=pretrain"])
    checkpoint(tmp_path / "model", tiny_policy())
    planned = chain.plan(config, ["tokenizer", "pretrain"])
    for entry in planned.values():
        entry.artifact.folder.mkdir(parents=True)
        (entry.artifact.folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(preflight, "check", lambda *_: pytest.fail("checked"))
    chain.check(config, planned)


def test_a_new_model_that_cannot_be_sampled_from_is_refused(monkeypatch):
    """Blocks of a new model are the identity, so it is its shape, with other weights, that is tried."""
    config = OmegaConf.merge(composed("model=tiny").model, {"hidden_size": 16, "head_dim": 8})
    tokenizer, model = preflight.start(config, "2026-01-01")
    assert all(parameter.any() for parameter in model.parameters())
    monkeypatch.setattr(decoding, "kind_for", decoding.kind_for)  # as it is: this one passes
    settings = OmegaConf.create({"temperature": 1.0, "max_new_tokens": 2, "batch_size": 1, "static_cache": False})
    preflight.check_model(model, tokenizer, settings, scored=True)
    wrong = decoding.FusedDecoder.step
    monkeypatch.setattr(decoding.FusedDecoder, "step", lambda self, tokens: 1 + wrong(self, tokens))
    assert decoding.kind_for(preflight.start(config, "2026-01-01")[1]) is decoding.Decoder


def test_a_broken_judge_is_refused_before_it_is_asked(world, tmp_path):
    judge = tiny_policy()
    loading.save(judge, tiny_tokenizer(), tmp_path / "judge")
    word = tiny_tokenizer().decode([40]), tiny_tokenizer().decode([41])
    settings = OmegaConf.merge(
        composed().evaluate.judge_model, {"path": str(tmp_path / "judge"), "verdicts": list(word), "chat": True}
    )
    preflight._check_judge(json.dumps(OmegaConf.to_container(settings)), "2026-01-01")
    preflight._check_judge.cache_clear()
    judge.get_input_embeddings().weight.data[:] = float("nan")
    judge.save_pretrained(tmp_path / "judge")
    with pytest.raises(UserError, match="its probabilities are no finite numbers"):
        preflight._check_judge(json.dumps(OmegaConf.to_container(settings)), "2026-01-01")
