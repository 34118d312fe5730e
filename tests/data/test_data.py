"""What cannot be used is counted and named; splits share no prompt; rows become texts, prompts and replies."""

import pytest
from data_helpers import A, Q, bucket, conversations, everything, lines, said, source
from omegaconf import OmegaConf

from threefold.config.compose import compose
from threefold.data import reading
from threefold.data.formats import alternating
from threefold.errors import UserError
from threefold.schema.stages import DialogueConfig

DIALOGUE = OmegaConf.structured(
    DialogueConfig(context_turns=3, prompt_max_chars=240, reply_min_chars=8, reply_max_chars=200)
)


def test_unusable_rows_are_counted_by_reason_with_the_first_line(tmp_path):
    file = lines(tmp_path / "rows.jsonl", [{"text": t} for t in ("one", "", "two", " ", None, "three")])
    for split in ("train", "validation", "test"):
        assert reading.load(source(file, max_unusable_share=0.5), split).unusable == {
            "text is empty": {"count": 2, "first_line": 2, "file": "rows.jsonl"},
            "text is not text": {"count": 1, "first_line": 5, "file": "rows.jsonl"},
        }
    assert sorted(row["text"] for row in everything(source(file, max_unusable_share=0.5))) == ["one", "three", "two"]


def test_too_many_unusable_rows_are_refused_with_file_line_and_most_frequent_reason(tmp_path):
    file = lines(tmp_path / "rows.jsonl", [{"text": t} for t in ("one", None, "two", "", " ", "three")])
    with pytest.raises(UserError) as caught:
        reading.load(source(file, max_unusable_share=0.49), "train")
    message = str(caught.value)
    assert message.startswith(f"{file}: 3 of 6 rows cannot be used as format=text")
    assert "text is empty (first in rows.jsonl, line 4)" in message and "\n" not in message
    reading.load(source(file, max_unusable_share=0.5), "train")


def test_columns_of_other_names_are_mapped(tmp_path):
    file = lines(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    found = everything(source(file, "prompt_completion", columns={"prompt": "question", "completion": "answer"}))
    assert [row["messages"] for row in found] == [[Q, A]]


def test_splits_are_by_the_hash_of_the_key(tmp_path):
    texts = [f"text {i}" for i in range(500)]
    found = source(lines(tmp_path / "rows.jsonl", [{"text": t} for t in texts]))
    for split, wanted in {"test": range(5), "validation": range(5, 10), "train": range(10, 100)}.items():
        assert [row["text"] for row in reading.load(found, split).rows] == [t for t in texts if bucket(t) in wanted]
        assert reading.load(found, split).rows


def test_rows_of_one_prompt_fall_into_one_split(tmp_path):
    rows = [{"prompt": f"q {i % 100}", "completion": f"a {i}"} for i in range(400)]
    found = source(lines(tmp_path / "rows.jsonl", rows), "prompt_completion")
    keys = {split: {row["key"] for row in reading.load(found, split).rows} for split in ("train", "validation", "test")}
    assert sum(map(len, keys.values())) == 100 == len(set().union(*keys.values()))


def test_a_given_test_split_is_kept_and_validation_is_carved_from_training(tmp_path):
    texts = {"train": [f"train {i}" for i in range(300)], "test": [f"test {i}" for i in range(30)]}
    for split in texts:
        lines(tmp_path / f"d/{split}.jsonl", [{"text": t} for t in texts[split]])
    found = source(tmp_path / "d", splits={"train": "train.jsonl", "test": "test.jsonl"})
    loaded = {
        split: [row["text"] for row in reading.load(found, split).rows] for split in ("train", "validation", "test")
    }
    assert loaded["test"] == texts["test"]
    assert loaded["validation"] == [t for t in texts["train"] if 5 <= bucket(t) < 10] != []
    assert sorted(loaded["train"] + loaded["validation"]) == sorted(texts["train"])


def test_rows_with_one_system_message_fall_into_every_split(tmp_path):
    rows = [{"messages": [said("system", "Be brief."), said("user", f"q {i}"), A]} for i in range(300)]
    found = source(lines(tmp_path / "rows.jsonl", rows), "messages")
    assert all(reading.load(found, split).rows for split in ("train", "validation", "test"))


def test_every_reply_of_a_conversation_follows_one_or_three_turns_just_before_it(tmp_path):
    turns = [("xy"[i % 2], f"this is message {i}") for i in range(40)]
    found = conversations(tmp_path, turns, topic="Numbers")
    examples = [e for split in ("train", "validation", "test") for e in reading.examples(found, split, DIALOGUE)]
    assert [e.reply for e in examples] == [f"this is message {i}" for i in range(1, 40)]
    lengths = set()
    for i, example in enumerate(examples, start=1):
        topic, *context = example.prompt
        lengths.add(len(context))
        assert topic == said("system", "Numbers")
        assert [m["content"] for m in context] == [f"this is message {j}" for j in range(i - len(context), i)]
        assert [m["role"] for m in context][::-1] == ["user", "assistant", "user"][: len(context)]
    assert lengths == {1, 3}  # with two, the context would begin with the assistant, which strict templates refuse


def prompts_of(tmp_path, *turns, context_turns=3):
    """The prompt of every reply of a dialogue; turns are written as a letter of the role and what is said."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    row = {"messages": [said(roles[turn[0]], turn) for turn in turns]}
    limits = {"prompt_max_chars": 99, "reply_min_chars": 1, "reply_max_chars": 99, "context_turns": context_turns}
    found = source(lines(tmp_path / f"{len(turns)} {context_turns}.jsonl", [row]), "messages")
    examples = [
        e for split in ("train", "validation", "test") for e in reading.examples(found, split, OmegaConf.create(limits))
    ]
    return {e.reply: " ".join(m["content"] for m in e.prompt) for e in examples}


def test_messages_keep_their_order_and_a_late_system_message_holds_for_what_follows(tmp_path):
    assert prompts_of(tmp_path, "u1", "a1", "s1", "u2", "a2", "u3", "s2", "a3") == {
        "a1": "u1",
        "a2": "u1 a1 s1 u2",
        "a3": "s1 u2 a2 u3 s2",
    }
    assert prompts_of(tmp_path, "s0", "u1", "s1", "a1", "u2", "a2", context_turns=9) == {
        "a1": "s0 u1 s1",
        "a2": "s0 u1 s1 a1 u2",
    }


def test_a_context_that_is_cut_begins_with_the_user_after_the_system_messages_that_hold(tmp_path):
    turns = ["s0", "u1", "a1", "s1", "u2", "a2", "s2", "u3", "a3"]
    cut = {1: "s0 s1 s2 u3", 2: "s0 s1 s2 u3", 3: "s0 s1 u2 a2 s2 u3", 4: "s0 s1 u2 a2 s2 u3", 5: " ".join(turns[:-1])}
    assert {most: prompts_of(tmp_path, *turns, context_turns=most)["a3"] for most in cut} == cut
    begun = prompts_of(tmp_path, "a0", "u1", "a1", "u2", "a2", "a3", context_turns=2)
    assert begun == {"a1": "a0 u1", "a2": "u2", "a3": "u2 a2"}  # a dialogue may begin with the assistant; a cut may not
    assert prompts_of(tmp_path, "u1", "a1", "a2", "a3", context_turns=1) == {"a1": "u1", "a2": "a1", "a3": "a2"}


def test_only_the_assistants_turns_are_replies_of_other_dialogues(tmp_path):
    rows = [
        {
            "messages": [
                said("user", "u" * 9),
                said("assistant", "a" * 9),
                said("user", "v" * 9),
                said("assistant", "b" * 9),
            ]
        }
    ]
    found = source(lines(tmp_path / "rows.jsonl", rows), "messages")
    examples = [e for split in ("train", "validation", "test") for e in reading.examples(found, split, DIALOGUE)]
    assert [(len(e.prompt), e.reply) for e in examples] == [(1, "a" * 9), (3, "b" * 9)]


@pytest.mark.parametrize(
    ("prompt", "reply", "kept"),
    [(240, 8, True), (241, 8, False), (9, 7, False), (9, 200, True), (9, 201, False)],
)
def test_limits_of_prompts_and_replies_are_inclusive(prompt, reply, kept, tmp_path):
    rows = [{"prompt": "p" * prompt, "completion": "r" * reply}]
    found = source(lines(tmp_path / "rows.jsonl", rows), "prompt_completion")
    examples = [e for split in ("train", "validation", "test") for e in reading.examples(found, split, DIALOGUE)]
    assert len(examples) == kept


def test_plain_text_gives_no_replies(tmp_path):
    with pytest.raises(UserError, match=r"data\.replies needs rows with prompts and replies"):
        reading.examples(
            source(lines(tmp_path / "rows.jsonl", [{"text": f"text {i}"} for i in range(9)])), "train", DIALOGUE
        )


def test_texts_are_turns_without_system_messages(tmp_path):
    rows = [{"messages": [said("system", "s"), Q, A]}, {"messages": [Q, A, Q, said("assistant", "b")]}]
    found = everything(source(lines(tmp_path / "rows.jsonl", rows), "messages"))
    assert sorted(reading.texts(found)) == ["q\na", "q\na\nq\nb"]
    pair = {"prompt": [said("system", "s"), Q], "chosen": "a", "rejected": "b"}
    assert reading.texts([pair, {"text": "plain"}]) == ["q\na", "plain"]


def test_a_prompt_of_a_held_out_split_is_none_of_training(tmp_path):
    found = conversations(tmp_path, [("x", "Hello there, friend"), ("y", "Good evening to you")], count=200)
    sizes = {split: len(reading.examples(found, split, DIALOGUE)) for split in ("train", "validation", "test")}
    assert min(sizes.values()) > 0
    assert len(reading.prompts(found, "test", DIALOGUE)) == 1
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=f"no prompt in its {split} split"):
            reading.prompts(found, split, DIALOGUE)


def test_prompts_are_distinct_with_their_first_reply(tmp_path):
    rows = [{"prompt": f"question {i % 50}", "completion": f"answer number {i}"} for i in range(150)]
    found = source(lines(tmp_path / "rows.jsonl", rows), "prompt_completion")
    prompts = reading.prompts(found, "train", DIALOGUE)
    wanted = {f"question {i}": f"answer number {i}" for i in range(50) if bucket(f"question {i}") >= 10}
    assert {e.prompt[0]["content"]: e.reply for e in prompts} == wanted
    assert len(prompts) == len(wanted)


def test_replies_by_prompt_are_those_with_two_different_replies():
    def example(prompt, reply):
        return reading.Example([said("user", prompt)], reply)

    found = [example(*e) for e in (("p", "a"), ("q", "a"), ("p", "b"), ("q", "a"), ("p", "a"))]
    (group,) = reading.replies_by_prompt(found).values()
    assert [(e.prompt[0]["content"], e.reply) for e in group] == [("p", "a"), ("p", "b")]


def test_prompts_are_the_same_only_with_the_same_roles_and_words():
    def key(*messages):
        return reading.prompt_key([said(*m) for m in messages])

    assert key(("user", "a b")) == key(("user", "a b"))
    different = [
        key(("user", "a b")),
        key(("assistant", "a b")),
        key(("user", "a"), ("user", "b")),
        key(("user", "a\nb")),
    ]
    assert len(set(different)) == 4


def test_draw_takes_without_repetition_by_seed():
    items = list(range(100))
    drawn = reading.draw(items, 30, seed=1)
    assert len(set(drawn)) == 30 and set(drawn) <= set(items)
    assert reading.draw(items, 30, seed=1) == drawn != reading.draw(items, 30, seed=2)
    assert sorted(reading.draw(items, 1000, seed=1)) == items


def test_alternating_turns_end_with_the_assistant():
    assert [m["role"] for m in alternating(["a", "b", "c"])] == ["assistant", "user", "assistant"]


@pytest.mark.slow
def test_the_package_of_real_conversations_gives_disjoint_prompts_in_every_split():
    config = compose(["experiment=smoke"]).data
    # an independent count of its 7,168 conversations: 104,204 replies are in the limits with one turn of context,
    # 51,329 with three; here each has one to three, and unfit messages are gone
    examples = {s: reading.examples(config.replies, s, config.dialogue) for s in ("train", "validation", "test")}
    assert 75_000 < sum(map(len, examples.values())) < 104_204
    prompts = {
        s: {reading.prompt_key(e.prompt) for e in reading.prompts(config.replies, s, config.dialogue)} for s in examples
    }
    assert len(prompts["test"]) > 2000 and len(prompts["validation"]) > 2000 and len(prompts["train"]) > 60_000
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    unusable = reading.load(config.replies, "train").unusable
    assert {"message dropped: address or markup", "message dropped: profanity"} <= set(unusable)
    assert all(entry["count"] > 0 for entry in unusable.values())
