"""Tiny tokenizers of every kind, made without training, with chat templates as checkpoints have them."""

from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from threefold.stages import tokenizer as stage

TRL = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    CHATML + "{% if enable_thinking is defined %}{{ '<think>\n\n</think>\n\n<tool_call></tool_call>' }}{% endif %}"
)
ALWAYS_OPENS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
GEMMA = (TRL / "gemma.jinja").read_text()
DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
CODE = "def f(x):\n    if x:\n        return  1\n\n\treturn 0"
REASONING = "<think>\nred  tea\n</think>\n\nblue"
CALL = '{"name": "f", "arguments": {"x": 1}}'
FORMATS_OF_TOOLS = [
    f"[TOOL_CALLS][{CALL}]",
    f"<|python_tag|>{CALL}",
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{CALL}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "<|fim_prefix|>a<|fim_suffix|>c<|fim_middle|>b",
]
TOOLS = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def special(*tokens):
    return [AddedToken(token, special=True) for token in tokens]


def plain(*tokens):
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def wrapped(backend, chat_template, added, **named):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.add_tokens(added)
    tokenizer.chat_template = chat_template
    return tokenizer


def bytes_bpe(chat_template, added=(), **named):
    """Byte-level BPE without merges; a name of a token that is not there is added by transformers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, chat_template, list(added), **named)


def qwen(chat_template=THINKING, eos="<|im_end|>", thinking=plain):
    added = [*special("<|im_start|>", "<|im_end|>"), *thinking("<think>", "</think>"), *plain("<tool_call>")]
    added += plain("</tool_call>", "assistant", "n't", "unwritten>")
    return bytes_bpe(chat_template, added, eos_token=eos, pad_token="<|endoftext|>")


def neox():
    indented = CHATML.replace("{% for", "        {%- for")
    runs = plain(*(" " * n for n in range(2, 25)))
    return bytes_bpe(indented, [*runs, *special("<|im_start|>", "<|im_end|>")], eos_token="<|im_end|>")


def gemma():
    added = [*special("<start_of_turn>", "<end_of_turn>"), *plain("\n\n", "   ")]
    return bytes_bpe(GEMMA, added, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def mistral():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    )
    template += "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    added = special("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    return bytes_bpe(template, added, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama3():
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
    template, ends = (TRL / "llama3.jinja").read_text(), {"eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    return bytes_bpe(template, special(*names), bos_token="<|begin_of_text|>", **ends)


def deepseek():
    calls = [f"<｜tool▁{part}｜>" for part in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
    added = special("<｜User｜>", "<｜Assistant｜>", *calls, "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    named = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}
    template = (TRL / "deepseekv3.jinja").read_text().replace("<think>\\n", "")  # as the checkpoint itself has it
    cut = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    return bytes_bpe(template.replace(cut, ""), [*added, *plain("<think>", "</think>")], **named)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama():
    """BPE on characters with bytes for those it does not know, and a mark for spaces, one before the text."""
    words = ["<unk>", *BYTES, "▁", *"abcdefghijklmnopqrstuvwxyz():<>"]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(list(spaces))
    added = [*special("<|im_start|>", "<|im_end|>"), *plain("<think>", "</think>")]
    return wrapped(backend, THINKING, added, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    words = [("<unk>", 0.0), *((byte, -9.0) for byte in BYTES), *((c, -2.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    backend = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(list(spaces))
    added = [*special("<|im_start|>", "<|im_end|>"), *plain("<think>", "</think>", "<tool_call>", "</tool_call>")]
    return wrapped(backend, THINKING, added, eos_token="</s>", unk_token="<unk>")


def wordpiece():
    """Lower case, and spaces where words were apart: what was written cannot be told from the tokens."""
    words = [
        "[UNK]",
        "red",
        "tea",
        "def",
        "<",
        ">",
        *"abcdefghijklmnopqrstuvwxyz:()0123",
        *(f"##{c}" for c in "abdefx"),
    ]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrapped(backend, CHATML, special("<|im_start|>", "<|im_end|>"), unk_token="[UNK]", eos_token="<|im_end|>")


KINDS = {"own": lambda: stage.train([CODE, REASONING], 300), "qwen": qwen, "neox": neox, "gemma": gemma}
KINDS |= {"mistral": mistral, "llama3": llama3, "deepseek": deepseek}
KINDS |= {"llama": llama, "unigram": unigram}
