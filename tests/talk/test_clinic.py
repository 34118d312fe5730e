"""`threefold template`: the conversation with its marks, the facts below it, what it examines and what it refuses."""

import copy

import pytest
from helpers import tiny_tokenizer
from tokenizer_kinds import CHATML, TRL, gemma, mistral, plain, qwen

from threefold import cli
from threefold.errors import UserError
from threefold.fileio import write_json
from threefold.models import chat
from threefold.stages import tokenizer as stage
from threefold.talk import clinic


def prepared(tokenizer, **fixed):
    return stage.prepared(tokenizer, "here", "2026-01-01", fixed)


def facts(tokenizer) -> dict[str, str]:
    lines = clinic.report(tokenizer)
    return {line[:21].strip(): line[22:] for line in lines[lines.index("", lines.index("--- reply 2")) + 1 :]}


def test_what_is_trained_on_stands_between_the_marks(capsys):
    cli.main(["template"])
    shown = capsys.readouterr().out
    assert "<|user|>What is 2 + 2?<|end|><|assistant|>[[It is 4.<|end|>]]\n" in shown
    assert "It is 4.<|end|><|user|>And 3 + 3?<|end|><|assistant|>[[That is 6.<|end|>]]\n" in shown


def test_a_template_that_drops_thinking_from_earlier_replies_shows_it():
    tokenizer = prepared(qwen((TRL / "qwen3.jinja").read_text()))
    seen = clinic.examine(tokenizer)
    assert not seen.keeps_prefix and seen.decodes and seen.seamless and seen.system and not seen.thinking
    turn = seen.rows[0].turn
    assert turn.completion == "<think>\n\n</think>\n\nIt is 4.<|im_end|>" and turn.tail == "\n"
    assert seen.history == "<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n<|im_start|>user\n"
    assert facts(tokenizer)["prefix kept"].startswith("no") and facts(tokenizer)["BOS in a prompt"].startswith("0")


def test_a_template_that_takes_only_thinking_replies_is_shown_with_them():
    tokenizer = prepared(qwen((TRL / "nemotron_3_nano.jinja").read_text()))
    assert clinic.examine(tokenizer).thinking
    assert facts(tokenizer)["thinking blocks"] == "replies are taken with one only"
    tokenizer = prepared(qwen((TRL / "nemotron_3_nano.jinja").read_text()), enable_thinking=False)
    assert facts(tokenizer)["thinking blocks"] == "replies are taken without"
    assert facts(tokenizer)["fixed"] == "enable_thinking = false"


def test_refusals_bos_and_end_tokens_are_named():
    seen = facts(stage.prepared(gemma(), "here", "2026-01-01", ends=[257, 258]))
    assert seen["refused (1)"] == "a system message: System role not supported" and seen["BOS in a prompt"] == "1"
    assert seen["end token"].startswith("<end_of_turn> is trained; sampling ends at <end_of_turn>, <")
    twice = mistral()
    twice.chat_template = "{{ bos_token }}" + twice.chat_template
    assert clinic.examine(prepared(twice)).bos == 2


def test_a_token_over_the_seam_is_shown():
    tokenizer = qwen(CHATML.replace("+ '\n' + m['content']", "+ m['content']").replace("assistant\n", "assistant"))
    tokenizer.add_tokens(plain("assistantIt"))
    assert not clinic.examine(prepared(tokenizer)).seamless


def test_a_stage_of_a_run_or_a_checkpoint_is_examined(tmp_path, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.save_pretrained(tmp_path / "runs" / "tiny" / "sft")
    write_json(tmp_path / "runs" / "tiny" / "sft" / "metrics.json", {"template_hash": chat.template_hash(tokenizer)})
    cli.main(["template", "tiny/sft", f"runs={tmp_path / 'runs'}"])
    assert "[[It is 4.<|end|>]]" in capsys.readouterr().out
    qwen((TRL / "qwen3.jinja").read_text()).save_pretrained(tmp_path / "checkpoint")
    cli.main(["template", str(tmp_path / "checkpoint"), "model.chat_template_kwargs={enable_thinking: false}"])
    assert "<think>\n\n</think>\n\n[[It is 4.<|im_end|>]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a/b", "c/d"], "template: c/d: name one checkpoint"),
        (["./nowhere"], r"model.checkpoint=./nowhere: no such folder"),
        (["run=mine"], "run=mine: a stage of a run is named as RUN/STAGE: threefold template mine/sft"),
        (["runz=x"], "runz is not a configuration key"),
    ],
)
def test_a_wrong_name_is_one_line(arguments, line):
    with pytest.raises(UserError, match=line):
        clinic.show(arguments)
