"""Every chat template of TRL's wheel: the trained text of each family written by hand, and the table of the docs.

To print the table of docs/checkpoints.md: PYTHONPATH=tests/support python tests/models/test_trl_templates.py
"""

import json
import re
from pathlib import Path

import pytest
from tokenizer_kinds import TRL, bytes_bpe, plain, special
from trl.chat_template_utils import get_training_chat_template

from threefold.data import preferences
from threefold.data.preferences import Pair
from threefold.display import parts
from threefold.errors import UserError
from threefold.models import chat, template
from threefold.stages import sft
from threefold.stages import tokenizer as stage
from threefold.talk import clinic

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
NAMES = sorted(path.stem for path in TRL.glob("*.jinja") if not path.stem.endswith("_training"))
TOKENS = re.compile(r"<\|[\w/]+\|?>|<\w+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|<sop>|\[gMASK\]|\[/?INST\]")
EOS = {  # the tokenizer's own, where the template does not write it itself
    **dict.fromkeys(("cohere", "cohere2"), "<|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), "<｜end▁of▁sentence｜>"),
    **dict.fromkeys(("glm4moe", "phi3", "phi3_5"), "<|endoftext|>"),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "<|end_of_text|>"),
    **dict.fromkeys(("gemma", "gemma3"), "<eos>"),
    "gptoss": "<|return|>",
}
OFF = {"enable_thinking": False}
THOUGHT = "<think>\nhm\n</think>\n\n"
REPLY = "It is 4."
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]

# What a prompt ends with, and what is trained on, for a reply R; by hand from the model cards and templates.
CHATML = ("<|im_start|>assistant\n", "R<|im_end|>")
GEMMA = ("<start_of_turn>model\n", "R<end_of_turn>")
GEMMA_4 = ("<|turn>model\n", "R<turn|>")
LLAMA_3 = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "R<|eot_id|>")
PHI = ("<|assistant|>\n", "R<|end|>")
NO_THINKING = ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "R<|im_end|>")
CLOSES = ("<|im_start|>assistant\n<think>\n", "\n</think>\n\nR<|im_end|>")  # what a prompt opens
COHERE = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
EXPECTED = {
    "cohere": (COHERE, "R<|END_OF_TURN_TOKEN|>"),
    "cohere2": (f"{COHERE}<|START_RESPONSE|>", "R<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    **dict.fromkeys(("gemma", "gemma3"), GEMMA),
    **dict.fromkeys(("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), GEMMA_4),
    "glm4moe": ("<|assistant|>", "\n<think></think>\nR<|user|>"),
    "gptoss": ("<|start|>assistant", "<|channel|>final<|message|>R<|return|>"),
    **dict.fromkeys(("lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), CHATML),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), LLAMA_3),
    "muse_glimmer": ("<|start|>assistant", " to=user<|message|>R<|eot|>"),
    **dict.fromkeys(("phi3", "phi3_5"), PHI),
    **dict.fromkeys(("qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"), CHATML),
    "qwen3": ("<|im_start|>assistant\n", "<think>\n\n</think>\n\nR<|im_end|>"),
    "qwen3_5_nothink": NO_THINKING,
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), CLOSES),
}
NEMOTRON = ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
SWITCHED_OFF = {
    **dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"), NO_THINKING),
    **dict.fromkeys(NEMOTRON, ("<|im_start|>assistant\n<think></think>", "R<|im_end|>")),
    "glm4moe": ("<|assistant|>\n<think></think>", "\nR<|user|>"),
}
WITH_THOUGHT = {  # the reply begins with a thinking block
    "qwen3": ("<|im_start|>assistant\n", "<think>\nhm\n</think>\n\nR<|im_end|>"),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6"), ("<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nR<|im_end|>")),
    "nemotron_3_nano": ("<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nR<|im_end|>"),
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "hm\n</think>\n\nR<｜end▁of▁sentence｜>"),
}
REFUSED = {
    **dict.fromkeys(("idefics3", "smolvlm", "llava_next"), "takes messages in parts, of text and images"),
    "deepseekv3": r"opens a reply with '<｜Assistant｜><think>\\n', and renders .*; let the template's generation",
}


def stand_in(name: str, fixed: dict | None = None):
    """A byte-level tokenizer with the special tokens that a template writes, as the tokenizer stage makes it."""
    source = (TRL / f"{name}.jinja").read_text()
    tokens = sorted({*TOKENS.findall(source), EOS.get(name, "<EOS>"), "<|END_OF_TURN_TOKEN|>"} - {"<|im_end|>"})
    added = [*special("<|im_end|>", *tokens), *plain("<think>", "</think>")]
    eos = EOS.get(name, "<|im_end|>" if "<|im_end|>" in source else "<EOS>")
    given = bytes_bpe(source, added, bos_token="<BOS>", eos_token=eos, pad_token="<PAD>")
    return stage.prepared(given, name, "2026-01-01", fixed)


def rows_of(tokenizer, reply):
    """Text of the prompt and of the trained tokens of SFT; held equal to the rows of the other stages."""
    prompt, [ids] = chat.row_ids(tokenizer, QUESTION, reply)
    row = sft.labelled(prompt, ids)
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert row["input_ids"] == prompt + trained == prompt + ids and chat.prompt_ids(tokenizer, QUESTION) == prompt
    [pair] = preferences.tokenised(tokenizer, [Pair(QUESTION, reply, f"{reply} No.", None, "people")], 9999).rows
    assert (pair["prompt_ids"], pair["chosen_ids"]) == (prompt, ids)  # of the reward model and DPO
    assert preferences.sequences(pair)[0] == prompt + ids
    sampled = chat.reply_text(tokenizer, ids)  # PPO's policy says this
    assert sampled == reply and chat.reply_ids(tokenizer, QUESTION, sampled) == ids
    assert ids[-1] == chat.end_ids(tokenizer)[0] and ids.count(ids[-1]) == 1
    return tokenizer.decode(prompt), tokenizer.decode(ids)


CASES = [(name, {}, REPLY, *wanted) for name, wanted in EXPECTED.items()]
CASES += [(name, OFF, REPLY, *wanted) for name, wanted in SWITCHED_OFF.items()]
CASES += [(name, {}, THOUGHT + REPLY, *wanted) for name, wanted in WITH_THOUGHT.items()]


@pytest.mark.parametrize(("name", "fixed", "reply", "opening", "trained"), CASES)
def test_every_stage_trains_on_what_was_written_by_hand(name, fixed, reply, opening, trained):
    prompt, completion = rows_of(stand_in(name, fixed), reply)
    assert prompt.endswith(opening) and completion == trained.replace("R", REPLY, 1)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_trained_on_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        stand_in(name)
    assert "\n" not in str(caught.value)


def test_each_template_is_expected_or_refused():
    assert {*EXPECTED, *SWITCHED_OFF, *WITH_THOUGHT, *REFUSED} == {*NAMES}


@pytest.mark.parametrize("name", [*NEMOTRON, "deepseek_r1_distill"])
def test_a_reply_without_thinking_is_refused_where_prompts_open_a_block(name):
    remedy = "enable_thinking: false}, or give" if name in NEMOTRON else "let the template's generation prompt end"
    with pytest.raises(UserError, match=rf"it opens a reply with '.*<think>\\n', and renders .*{remedy}"):
        chat.row_ids(stand_in(name), QUESTION, REPLY)


MARKED = [name for name in EXPECTED if (TRL / f"{name}_training.jinja").is_file()]


@pytest.mark.parametrize("name", MARKED)
def test_trls_generation_marks_are_around_what_is_trained_on(name):
    """TRL's variants for training mark an assistant's turn: also what its prompt opens, and what follows its end."""
    tokenizer = stand_in(name)
    prompt, [ids] = chat.row_ids(tokenizer, QUESTION, REPLY)
    tokenizer.chat_template = (TRL / f"{name}.jinja").read_text()
    rendered = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": REPLY}],
        chat_template=get_training_chat_template(tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = tokenizer.decode([i for i, m in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if m])
    opened, trained, after = marked.partition(tokenizer.decode(ids))
    assert trained and tokenizer.decode(prompt).endswith(opened)
    assert after.strip() in ("", tokenizer.eos_token)


def seen_of(name: str, fixed: dict) -> tuple[str, ...]:
    """What the table says of a template: its texts for a reply R, ↵ for a line break, and what it does not take."""
    try:
        tokenizer = stand_in(name, fixed)
    except UserError as error:
        return ("", "", "", f"refused: {str(error).partition(': ')[2]}")
    seen = clinic.examine(tokenizer)
    turn, notes = seen.rows[0].turn, [f"{key}: {json.dumps(value)}" for key, value in fixed.items()]
    notes += ["no system message"] * (not seen.system)
    notes += ["roles alternate"] * ("two user messages in a row" in seen.refused)
    notes += ["replies need a thinking block"] * seen.thinking
    notes += ["earlier replies are written otherwise"] * (not seen.keeps_prefix)
    notes += [part for part in template.fixed(tokenizer.chat_template) if "=" not in part]
    opening = turn.prompt.rpartition(clinic.QUESTIONS[0])[2]
    texts = (opening, turn.completion.replace(clinic.REPLIES[0], "R"), turn.tail)
    return (*(f"`{text}`".replace("\n", "↵") if text else "" for text in texts), "; ".join(notes))


def table() -> str:
    """The table of docs/checkpoints.md; templates that write the same are one line."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name in NAMES:
        for fixed in ({}, OFF) if name in SWITCHED_OFF else ({},):
            names.setdefault(seen_of(name, fixed), []).append(name)
    heading = ("template", "after the question", "trained on, of a reply R", "after that", "notes")
    rows = [(", ".join(of_row), *cells) for cells, of_row in names.items()]
    return "\n".join(parts.markdown_lines([heading, *rows], ["---"] * 5))


def test_the_docs_have_the_table_of_all_templates():
    assert table() in DOCS.read_text()


if __name__ == "__main__":
    print(table())
