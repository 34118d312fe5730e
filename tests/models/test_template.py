"""Chat templates of checkpoints: the end of a turn, what is removed from text, what is kept, refusals, the clock."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers.utils.chat_template_utils as rendering
from tokenizer_kinds import (
    ALWAYS_OPENS,
    CHATML,
    CODE,
    DATED,
    FORMATS_OF_TOOLS,
    KINDS,
    REASONING,
    THINKING,
    TOOLS,
    TRL,
    bytes_bpe,
    gemma,
    plain,
    qwen,
    special,
    wordpiece,
)

from threefold.errors import UserError
from threefold.models import chat, template
from threefold.stages import tokenizer as stage
from threefold.training import packing

HI = [{"role": "user", "content": "hi"}]


def saved(tokenizer, folder):
    """The tokenizer as a checkpoint in `folder` has it, loaded again."""
    tokenizer.save_pretrained(folder)
    return chat.load_tokenizer(folder, "model.checkpoint=here")


def of_checkpoint(tokenizer, folder, date="2026-01-01"):
    """The tokenizer as the tokenizer stage makes it of that checkpoint."""
    return stage.prepared(saved(tokenizer, folder), "model.checkpoint=here", date)


def of_kind(kind):
    """A tokenizer of that kind, as the tokenizer stage makes it."""
    return stage.prepared(KINDS[kind](), kind, "2026-01-01")


WORDS = "I don't know, assistant: <b> [x] unwritten>"
TEXTS = [(kind, text) for kind in KINDS for text in (CODE, REASONING, TOOLS, WORDS)]
BYTE_LEVEL = [kind for kind in KINDS if kind not in ("llama", "unigram")]  # the others have no character of their space


@pytest.mark.parametrize(("kind", "text"), TEXTS + [(kind, text) for kind in BYTE_LEVEL for text in FORMATS_OF_TOOLS])
def test_tokens_keep_code_reasoning_and_tool_calls(kind, text):
    tokenizer = of_kind(kind)
    end = tokenizer.eos_token_id
    assert chat.reply_ids(tokenizer, HI, text)[-1] == end
    assert tokenizer.decode(chat.reply_ids(tokenizer, HI, text)[:-1]) == text
    assert text.strip() in tokenizer.decode(chat.prompt_ids(tokenizer, [{"role": "user", "content": text}]))
    assert chat.reply_text(tokenizer, chat.reply_ids(tokenizer, HI, text)) == text.strip()
    assert chat.marks_removed(tokenizer, [[{"role": "user", "content": text}]], [text]) == 0


@pytest.mark.parametrize("kind", ["own", "qwen", "neox"])
def test_tokens_keep_the_indentation_of_the_first_line(kind):
    tokenizer = of_kind(kind)  # of metaspace tokenizers decoding takes one space away, whatever was encoded
    assert tokenizer.decode(chat.reply_ids(tokenizer, HI, f"    {CODE}\n  ")[:-1]) == f"    {CODE}\n  "


def test_a_tokenizer_that_loses_text_says_of_how_many():
    texts = ["red tea", "Red tea", "red  tea", "def f(x):"]
    assert stage.lossless_share(wordpiece(), texts) == 0.25
    assert stage.lossless_share(qwen(), [*texts, "<|im_end|>red"]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_text_opens_and_closes_no_turn(kind):
    tokenizer = of_kind(kind)
    marks = template.turn_marks(tokenizer)
    assert {tokenizer.eos_token, *chat.SPECIAL_TOKENS} & set(marks) and marks == sorted(marks, key=lambda m: -len(m))
    text = (
        "".join(f"a{mark}" for mark in marks) + marks[0][:2] + marks[0] + marks[0][2:]
    )  # one within another at the end
    assert chat.reply_ids(tokenizer, HI, text) == chat.reply_ids(tokenizer, HI, "a" * len(marks))
    messages = [{"role": "user", "content": text}], [{"role": "user", "content": "a" * len(marks)}]
    assert chat.prompt_ids(tokenizer, messages[0]) == chat.prompt_ids(tokenizer, messages[1])
    assert chat.marks_removed(tokenizer, [messages[0]], [text]) == 2 * (len(marks) + 2)


def test_brackets_within_a_turn_are_kept_even_where_they_are_special():
    tokenizer = qwen(thinking=special)
    assert tokenizer.decode(chat.reply_ids(tokenizer, HI, REASONING)[:-1]) == REASONING
    assert chat.reply_text(tokenizer, chat.reply_ids(tokenizer, HI, REASONING)) == REASONING
    mistral = "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    mistral += "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    added = plain("[INST]", "[/INST]", "[THINK]", "[/THINK]")
    tokenizer = bytes_bpe(mistral, added, bos_token="<s>", eos_token="</s>")
    assert template.turn_marks(tokenizer) == ["[/INST]", "[INST]", "</s>", "<s>"]


def test_brackets_that_a_default_system_message_mentions_are_kept():
    said = "{{ '<|im_start|>system\nThink within <think> and </think>.<|im_end|>\n' }}"
    assert "<think>" not in template.turn_marks(qwen(said + CHATML))


TURNS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "</s>"]
TURNS += ["<|begin_of_text|>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<start_of_turn>", "<|START_OF_TURN_TOKEN|>"]
TURNS += ["<|reserved_special_token_7|>", "<unused3>", "<|observation|>", "<|end|>", "<|assistant|>", "[PAD]"]
TEXT = ["[TOOL_CALLS]", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<|fim_prefix|>", "<unk>"]
TEXT += ["<|file_sep|>", "<|vision_start|>", "[TOOL_RESULTS]", "<|tool_response|>"]


def test_special_tokens_that_open_or_close_no_turn_are_text_and_those_of_any_turn_are_not():
    ours = chat.TEMPLATE.replace("<|end|>", "[X]").replace("|>", "$>")
    tokenizer = bytes_bpe(ours, special(*TURNS, *TEXT), eos_token="[X]", unk_token="<unk>")
    assert set(template.turn_marks(tokenizer)) == {*TURNS, "[X]"}
    text = " ".join(TEXT)
    assert chat.marks_removed(tokenizer, [], [text]) == 0
    assert chat.reply_text(tokenizer, chat.reply_ids(tokenizer, HI, text)) == text
    gpt2 = bytes_bpe(None, bos_token="<start>x", eos_token="<start>x", unk_token="<start>x")
    assert template.turn_marks(gpt2) == ["<start>x"]


def test_a_mark_of_turns_need_not_be_special():
    tokenizer = bytes_bpe(CHATML, plain("<|im_start|>", "<|im_end|>", "user"), eos_token="<|im_end|>")
    assert template.turn_marks(tokenizer) == ["<|im_start|>", "<|im_end|>"]


HASHED = """
from threefold.models import chat
class Stub:
    chat_template, added_tokens_decoder = None, {}
    all_special_tokens = ["<|a", "a|>", "<|a|>b", "|>", "|><", "<<", "a|", "b<"]
    special_tokens_map = dict(enumerate(all_special_tokens))
    __len__ = lambda self: 9
    convert_tokens_to_ids = lambda self, tokens: []
for text in ("x<|a|>y", "x<|a|>b<y", "<|a|><|a", "b<<|a|>b<<", "aa|><|>"):
    print(chat.without_special(Stub(), [{"content": text}])[0]["content"])
"""


def reference_removal(text, marks):
    """The leftmost mark goes, the longest of those that begin there, until none is left."""
    before = None
    while before != text:
        before, kept = text, ""
        while text:
            here = max((m for m in marks if text.startswith(m)), key=len, default="")
            kept, text = kept + ("" if here else text[0]), text[len(here) or 1 :]
        text = kept
    return text


def test_overlapping_marks_are_removed_alike_under_every_hash_seed():
    marks = ["<|a", "a|>", "<|a|>b", "|>", "|><", "<<", "a|", "b<"]
    texts = ("x<|a|>y", "x<|a|>b<y", "<|a|><|a", "b<<|a|>b<<", "aa|><|>")
    expected = [reference_removal(text, marks) for text in texts]
    for seed in "0123":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        printed = subprocess.run([sys.executable, "-c", HASHED], capture_output=True, text=True, env=environment)
        assert printed.stdout.split("\n")[:-1] == expected, printed.stderr


PHI = (TRL / "phi3.jinja").read_text()
ENDS = {
    "gemma": (gemma, "<end_of_turn>"),
    "qwen base": (lambda: qwen(eos="<|endoftext|>"), "<|im_end|>"),
    "qwen": (qwen, "<|im_end|>"),
    "phi": (
        lambda: bytes_bpe(PHI, special("<|end|>", "<|user|>", "<|assistant|>"), eos_token="<|endoftext|>"),
        "<|end|>",
    ),
    "eos_token": (lambda: bytes_bpe(CHATML.replace("'<|im_end|>'", "eos_token"), eos_token="</s>"), "</s>"),
    "a space before it": (lambda: bytes_bpe(CHATML.replace("<|im_end|>", " </s>"), special("</s>")), "</s>"),
    "the first of two": (
        lambda: bytes_bpe(
            CHATML + "{% if not add_generation_prompt %}<|eot|>{% endif %}", special("<|im_end|>", "<|eot|>")
        ),
        "<|im_end|>",
    ),
    "opens every reply": (lambda: qwen(ALWAYS_OPENS), "<|im_end|>"),
    "begins as it ends": (
        lambda: bytes_bpe("{{ bos_token }}" + CHATML.replace("<|im_end|>", "</s>"), bos_token="</s>", eos_token="</s>"),
        "</s>",
    ),
    "not special": (lambda: bytes_bpe(CHATML, plain("<|im_end|>"), eos_token="</s>"), "<|im_end|>"),
}


@pytest.mark.parametrize("kind", ENDS)
def test_replies_end_as_the_template_ends_them(kind, tmp_path):
    made, end = ENDS[kind]
    given = made()
    tokenizer = of_checkpoint(given, tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "artifact")
    loaded = chat.load_tokenizer(tmp_path / "artifact")
    assert tokenizer.eos_token == loaded.eos_token == end and loaded.pad_token != end
    assert chat.template_hash(loaded) == chat.template_hash(tokenizer)
    dialogue = [*HI, {"role": "assistant", "content": "fine"}]
    whole = loaded.apply_chat_template(dialogue, tokenize=False)
    assert whole.rpartition("fine")[2].lstrip().startswith(end)
    assert whole == given.apply_chat_template(dialogue, tokenize=False)
    assert chat.reply_ids(loaded, HI, "fine")[-1:] == loaded.encode(end, add_special_tokens=False)
    assert chat.reply_text(loaded, chat.reply_ids(loaded, HI, "fine") + loaded.encode("more")) == "fine"


def test_the_former_end_token_still_separates_documents_and_pads(tmp_path):
    given = qwen(eos="<|endoftext|>")
    size = len(given)
    tokenizer = of_checkpoint(given, tmp_path)
    assert tokenizer.convert_ids_to_tokens(packing.document_start(tokenizer)) == "<|endoftext|>" == tokenizer.pad_token
    assert len(tokenizer) == size  # no row of the model's embedding is new
    assert packing.document_start(of_checkpoint(gemma(), tmp_path / "g")) == tokenizer_id("<bos>", gemma())
    own = stage.train(["hello"], 270)
    assert packing.document_start(own) == own.bos_token_id


def tokenizer_id(token, tokenizer):
    return tokenizer.convert_tokens_to_ids(token)


NO_END = {
    "no token": (CHATML.replace("'<|im_end|>'", "''"), "writes no end token after a reply"),
    "words": (CHATML.replace("'<|im_end|>'", "' END'"), "writes no end token after a reply"),
    "the next reply's opening": (ALWAYS_OPENS.replace("<|im_end|>", ""), "writes no end token after a reply"),
    "refusal": ("{{ raise_exception('Tools only') }}", "its chat template refuses a dialogue .*Tools only"),
    "content in parts": (
        "{% for m in messages %}{% for part in m['content'] %}{% if part.type is defined %}{{ part.text }}{% endif %}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}", "takes messages in parts, of text and images, and no plain text",
    ),
    "names": ({"tool_use": CHATML, "rag": CHATML}, r"none of its chat templates \(rag, tool_use\) is named default"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_END)
def test_a_template_without_an_end_is_refused_before_any_work(kind, tmp_path):
    given, words = NO_END[kind]
    with pytest.raises(UserError, match=f"model.checkpoint=.*{words}") as caught:
        of_checkpoint(qwen(given), tmp_path)
    assert "\n" not in str(caught.value)


def test_of_several_named_templates_the_default_is_used_and_saved(tmp_path):
    given = qwen({"default": THINKING, "tool_use": "{{ 'tools' }}"})
    expected = given.apply_chat_template(HI, add_generation_prompt=True, tokenize=False)
    tokenizer = of_checkpoint(given, tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "artifact")
    loaded = chat.load_tokenizer(tmp_path / "artifact")
    assert loaded.chat_template == THINKING and loaded.decode(chat.prompt_ids(loaded, HI)) == expected
    assert chat.template_hash(loaded) == chat.template_hash(tokenizer)


def test_a_checkpoint_without_a_template_gets_ours(tmp_path):
    tokenizer = of_checkpoint(bytes_bpe(None), tmp_path)
    assert tokenizer.chat_template == chat.TEMPLATE and tokenizer.eos_token == chat.END


THOUGHT = "<think>\nhm\n</think>\n\n"
QWEN_3 = (TRL / "qwen3.jinja").read_text()


def test_a_row_is_what_the_template_writes_and_begins_with_the_prompt():
    tokenizer = qwen(QWEN_3)
    dialogue = [*HI, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "well?"}]
    for reply in ("fine", "\n fine", THOUGHT + "fine"):
        prompt, [ids] = chat.row_ids(tokenizer, dialogue, reply)
        whole = tokenizer.apply_chat_template([*dialogue, {"role": "assistant", "content": reply}], tokenize=False)
        assert prompt == chat.prompt_ids(tokenizer, dialogue) and tokenizer.decode(prompt + ids) + "\n" == whole
    assert "<think>" not in tokenizer.decode(prompt)  # as it is at inference


def test_tokens_are_those_of_the_whole_unless_one_reaches_over_the_seam():
    tokenizer = qwen(CHATML)
    tokenizer.add_tokens(plain("\n\n"))
    for reply, tokens in (("hi", ["h", "i"]), ("\nhi", ["Ċ", "h", "i"]), ("\n\nhi", ["\n\n", "h", "i"])):
        prompt, [ids] = chat.row_ids(tokenizer, HI, reply)
        assert tokenizer.convert_ids_to_tokens(ids) == [*tokens, "<|im_end|>"]
        assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "Ċ"


def test_variables_of_a_template_become_a_part_of_its_text(tmp_path):
    given = saved(qwen(QWEN_3), tmp_path / "checkpoint")
    tokenizer = stage.prepared(given, "here", "2026-01-01", {"enable_thinking": False})
    tokenizer.save_pretrained(tmp_path / "artifact")
    loaded = chat.load_tokenizer(tmp_path / "artifact")
    plain_rendering = loaded.apply_chat_template(HI, add_generation_prompt=True)["input_ids"]
    expected = qwen(QWEN_3).apply_chat_template(HI, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert chat.prompt_ids(loaded, HI) == plain_rendering == expected
    assert template.fixed(loaded.chat_template) == ["enable_thinking = false"]
    again = stage.prepared(loaded, "here", "2026-01-01", {"enable_thinking": True})  # as the checkpoint of another run
    assert template.fixed(again.chat_template) == ["enable_thinking = true"]
    assert chat.prompt_ids(again, HI) == chat.prompt_ids(qwen(QWEN_3), HI)


def test_values_of_every_kind_are_written_as_jinja_reads_them():
    values = {"a": None, "b": True, "c": 'é "\n🙂', "d": [1, 2.5, "x"], "e": {"k": [False]}}
    tokenizer = qwen("{{ [a, b, c, d, e] | tojson }}")
    tokenizer.chat_template = template.with_variables(tokenizer.chat_template, values)
    assert json.loads(tokenizer.apply_chat_template(HI, tokenize=False)) == list(values.values())


def test_a_variable_that_the_template_does_not_read_is_one_line():
    with pytest.raises(UserError, match=r"^model.chat_template_kwargs.enable_thinkin: .*nearest: enable_thinking"):
        stage.prepared(qwen(QWEN_3), "here", "2026-01-01", {"enable_thinkin": False})


def test_special_end_tokens_of_the_checkpoint_end_replies_and_travel_with_the_tokenizer(tmp_path):
    one = stage.prepared(qwen(), "here", "2026-01-01")
    assert chat.end_ids(one) == [one.eos_token_id]
    added = {str(token): i for i, token in qwen().added_tokens_decoder.items()}
    several = stage.prepared(qwen(), "here", "2026-01-01", ends=[added["<|im_end|>"], added["<|endoftext|>"], 5, 99999])
    several.save_pretrained(tmp_path)
    loaded, pad = chat.load_tokenizer(tmp_path), added["<|endoftext|>"]
    assert chat.end_ids(loaded) == [added["<|im_end|>"], pad]
    assert chat.template_hash(loaded) == chat.template_hash(several) != chat.template_hash(one)
    said = loaded.encode("fine", add_special_tokens=False)
    assert chat.reply_text(loaded, [*said, pad, *said]) == "fine"
    assert chat.with_own_end(loaded, [*said, pad]) == [*said, loaded.eos_token_id]
    assert chat.with_own_end(loaded, said) == said


def test_rows_whose_reply_cannot_be_trained_on_are_left_out_with_the_remedy():
    tokenizer = qwen((TRL / "nemotron_3_nano.jinja").read_text())
    rows = [SimpleNamespace(prompt=HI, reply=(THOUGHT if i else "") + "fine") for i in range(20)]
    source = SimpleNamespace(path="chats.jsonl", max_unusable_share=0.1)
    kept, tokens, refused = chat.tokenised(tokenizer, rows, source)
    assert kept == rows[1:] and tokens == [
        (p, r) for row in kept for p, [r] in [chat.row_ids(tokenizer, HI, row.reply)]
    ]
    [(reason, count)] = refused.items()
    assert count == 1 and reason.endswith("{enable_thinking: false}, or give replies that begin with <think>")
    assert chat.accepted(tokenizer, rows, source, lambda e: [(e.prompt, e.reply)]) == (kept, refused)
    assert chat.accepted(tokenizer, rows, source) == (rows, {})  # nothing is trained on a prompt alone
    source.max_unusable_share = 0.01
    with pytest.raises(UserError, match="refuses 1 of 20 dialogues"):
        chat.tokenised(tokenizer, rows, source)


SYSTEM = [{"role": "system", "content": "Be brief."}]


def test_a_prompt_that_the_template_refuses_is_one_line_with_its_words():
    with pytest.raises(
        UserError, match=r"refuses a dialogue \(system, user\) that begins 'Be brief\.': System role not"
    ):
        chat.prompt_ids(gemma(), SYSTEM + HI)
    undefined = qwen("{{ messages[0]['name'] + 'x' }}")
    with pytest.raises(UserError, match="has no attribute 'name'"):
        chat.prompt_ids(undefined, HI)


def test_the_shapes_that_a_template_refuses_are_named_with_its_words():
    alternate = "Conversation roles must alternate user/assistant/user/assistant/..."
    assert template.refusals(gemma()) == {
        "a system message": "System role not supported",
        "a system message after a reply": alternate,
        "two user messages in a row": alternate,
        "a dialogue that the assistant begins": alternate,
    }
    assert template.refusals(qwen()) == template.refusals(stage.train(["hello"], 270)) == {}
    first_only = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}" + CHATML.replace(
        "{{ '<|im_start|>' +", "{{ '' if m['role'] == 'system' else '<|im_start|>' +"
    )
    assert template.refusals(qwen(first_only)) == {"a system message after a reply": "it leaves a system message out"}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("{{ messages[0].content.split('') }}", "empty separator"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ 'x'.index(messages[-1].content) }}", "substring not found"),
    ],
)
def test_whatever_fails_in_a_template_is_a_refusal_in_its_words(expression, words):
    assert words in template.refusal(qwen(expression + CHATML), HI)


def test_a_template_that_leaves_turns_of_the_user_out_refuses_these():
    tokenizer = qwen(CHATML.replace("in messages", "in messages[-1:]"))
    dialogue = [*HI, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "well?"}]
    assert template.refusal(tokenizer, HI) is None
    assert template.refusal(tokenizer, dialogue) == "it leaves a user message out"
    assert template.refusals(tokenizer)["a dialogue of several turns"] == "it leaves a user message out"
    forgets = qwen(CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"))
    dialogue[1]["content"] = "<think>so</think>fine"  # what the assistant thought may go
    assert template.refusal(forgets, dialogue) is None


@pytest.mark.parametrize("format", ["%s", "%d %Z", "%k:%M", "%%d", "%_d"])
def test_what_no_date_says_of_a_clock_is_refused(format, tmp_path):
    with pytest.raises(UserError, match=f"model.checkpoint=.*asks the clock for '{format}', of which a part") as caught:
        of_checkpoint(qwen(DATED.replace("%d %b %Y", format)), tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_that_the_template_refuses_are_left_out_and_counted_up_to_the_share():
    rows = [SimpleNamespace(prompt=(SYSTEM if i % 10 == 0 else []) + HI, number=i) for i in range(40)]
    source = SimpleNamespace(path="chats.jsonl", max_unusable_share=0.1)
    kept, refused = chat.accepted(gemma(), rows, source)
    assert [row.number for row in kept] == [i for i in range(40) if i % 10] and refused == {
        "System role not supported": 4
    }
    assert chat.accepted(qwen(), rows, source) == (rows, {})
    assert chat.accepted(gemma(), [], source) == ([], {})
    source.max_unusable_share = 1.0
    with pytest.raises(UserError, match="refuses 1 of 1 dialogues"):
        chat.accepted(gemma(), rows[:1], source)
    source.max_unusable_share = 0.09
    with pytest.raises(
        UserError, match=r'chats.jsonl: .* 4 of 40 .* "System role not supported" .*begins \'Be brief'
    ) as e:
        chat.accepted(gemma(), rows, source)
    assert "\n" not in str(e.value)


def at(monkeypatch, *date):
    """Set the clock that chat templates read."""

    class Clock(rendering.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(*date)

    monkeypatch.setattr(rendering, "datetime", Clock)


def test_the_clock_is_no_input(tmp_path, monkeypatch):
    at(monkeypatch, 2026, 11, 28, 9, 30)
    tokenizer = of_checkpoint(qwen(DATED), tmp_path / "checkpoint", "2026-03-04")
    tokenizer.save_pretrained(tmp_path / "artifact")
    today = chat.prompt_ids(tokenizer, HI)
    at(monkeypatch, 2027, 1, 15, 23, 5)
    later = chat.load_tokenizer(tmp_path / "artifact")
    assert chat.prompt_ids(later, HI) == later.apply_chat_template(HI, add_generation_prompt=True)["input_ids"] == today
    assert later.decode(today).startswith("<|im_start|>system\n04 Mar 2026<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
    assert chat.template_hash(later) == chat.template_hash(tokenizer)
    other = of_checkpoint(qwen(DATED), tmp_path / "checkpoint", "2026-03-05")
    assert chat.template_hash(other) != chat.template_hash(tokenizer)
    judge = saved(qwen(DATED), tmp_path / "judge")  # no stage settled its date
    assert judge.decode(chat.prompt_ids(judge, HI)).startswith(f"<|im_start|>system\n01 Jan {template.DATE[:4]}")
    again = of_checkpoint(later, tmp_path / "again", "2026-03-05")  # an artifact as the checkpoint of another run
    assert again.chat_template == other.chat_template


CLOCKED = sorted(path.stem for path in TRL.glob("*.jinja") if "strftime_now" in path.read_text())
FORMATS = "  {% if true %}{{ strftime_now('%Y-%m-%d %-d.%b %B %a %A %j %H:%M:%S') }}\n{% endif %}\n" + CHATML


@pytest.mark.parametrize("name", ["formats", *CLOCKED])
def test_a_stopped_clock_writes_what_that_day_wrote(name, monkeypatch):
    given = FORMATS if name == "formats" else (TRL / f"{name}.jinja").read_text()
    tokenizer = qwen(given)
    at(monkeypatch, 2026, 2, 3)
    expected = tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False)
    at(monkeypatch, 2030, 12, 31)
    assert tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False) != expected
    template.settle(tokenizer, "2026-02-03")
    assert tokenizer.apply_chat_template(HI, add_generation_prompt=True, tokenize=False) == expected
