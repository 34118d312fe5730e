"""Limits of one data set stay with it; rows that a stage does not use are counted, and too many refused before work."""

import copy

import pytest
from data_helpers import lines, said, source
from helpers import make_job, tiny_policy, tiny_tokenizer, write_model

from threefold.config.compose import compose
from threefold.data import reading
from threefold.data.preferences import Pair, write
from threefold.errors import UserError
from threefold.evaluation import held_out
from threefold.ppo import rollouts
from threefold.sampling.sampler import Reply
from threefold.stages import comparisons, sft
from threefold.training.hf_trainer import load_pairs

SPLITS = ("train", "validation", "test")


def chats(tmp_path, long, count=300, **columns):
    """A file of chats, of which those numbered in `long` have a reply of 350 characters."""
    rows = [
        {"messages": [said("user", f"question {i}"), said("assistant", f"{i} " + "y" * (350 if i in long else 20))]}
        for i in range(count)
    ]
    return lines(tmp_path / "chats.jsonl", [row | columns for row in rows])


def own(file, *overrides):
    return [f"data.replies.path={file}", "data.replies.format=messages", *overrides]


def test_limits_of_the_demos_data_do_not_hold_for_other_data(tmp_path):
    demo = {"context_turns": 3, "prompt_max_chars": 240, "reply_min_chars": 8, "reply_max_chars": 200}
    assert dict(compose(["experiment=demo"]).data.dialogue) == demo
    assert dict(compose(["data=hh_hub"]).data.dialogue)["reply_max_chars"] == 2000
    for group in ("chitchat", "hh", "hh_hub", "finegrained", "arithmetic", "letters"):
        limits = compose([f"data={group}", "data.replies.path=my.jsonl", "data.replies.format=messages"]).data.dialogue
        assert set(limits.values()) == {None}, group
    mine = compose(own(chats(tmp_path, range(250)))).data
    assert sum(len(reading.examples(mine.replies, split, mine.dialogue)) for split in SPLITS) == 300


def test_replies_beyond_a_limit_that_is_set_are_counted_by_reason(tmp_path):
    mine = compose(own(chats(tmp_path, range(250)), "data.dialogue.reply_max_chars=200")).data
    kept = sum(len(reading.examples(mine.replies, split, mine.dialogue)) for split in SPLITS)
    reasons = [reading.left_out(mine.replies, split, mine.dialogue) for split in SPLITS]
    counts = [found["reply longer than data.dialogue.reply_max_chars=200"]["count"] for found in reasons]
    assert kept == 50 and sum(counts) == 250
    assert all(set(found) == {"reply longer than data.dialogue.reply_max_chars=200"} for found in reasons)


def test_every_reply_of_a_split_is_used_or_counted(tmp_path):
    rows = [{"prompt": f"q {i % 40}", "completion": "a" * (1 + i % 7), "split": SPLITS[i % 3]} for i in range(200)]
    found = source(lines(tmp_path / "rows.jsonl", [*rows, {"prompt": "q"}]), "prompt_completion")
    limits = compose(["data.replies.path=x.jsonl", "data.dialogue.reply_min_chars=3"]).data.dialogue
    long_enough = [{row["prompt"] for row in rows if row["split"] == s and len(row["completion"]) > 2} for s in SPLITS]
    for i, split in enumerate(SPLITS):  # each split leaves its prompts to those after it
        reasons = reading.left_out(found, split, limits, once=True)
        assert reasons.pop("no column completion")["first_line"] == 201
        used = len(long_enough[i].difference(*long_enough[i + 1 :]))
        assert used + sum(entry["count"] for entry in reasons.values()) == len(rows[i::3])


@pytest.fixture
def no_work(monkeypatch):
    for place, name in ((sft, "fit"), (held_out.likelihood, "replies_logprobs")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("work before the refusal"))


@pytest.mark.parametrize(
    ("long", "overrides", "message"),
    [
        (range(250), (), r"leaves out \d+ of \d+ examples as too long; .*data.replies.max_unusable_share > 0.8"),
        (range(300), (), r"leaves out (\d+) of \1 examples as too long; set it higher, or cut them$"),
        (range(300), ("data.replies.max_unusable_share=1",), r"leaves out (\d+) of \1 examples as too long; set"),
        ("validation", (), r"leaves out (\d+) of \1 held-out examples as too long; set it higher"),
    ],
)
def test_sft_refuses_examples_that_are_mostly_too_long_before_any_work(long, overrides, message, tmp_path, no_work):
    if long == "validation":  # those of the held-out split alone, which ended in a division by zero
        mine = compose(own(chats(tmp_path / "short", ()))).data.replies
        asked = [row["messages"][0]["content"] for row in reading.load(mine, "validation").rows]
        long = [int(text.split()[1]) for text in asked]
    job = make_job("sft", tmp_path / "job", "sft.max_length=100", *own(chats(tmp_path, long), *overrides))
    job.inputs["pretrain"] = write_model(tiny_policy(), tmp_path / "base")
    with pytest.raises(UserError, match=f"^sft.max_length=100: {message}") as caught:
        sft.run(job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("long", "share"), [((3, 2), 0.5), ((10, 4), 1.0), ((9, 4), 1.0)])
def test_pairs_that_are_mostly_too_long_are_refused_by_the_key_of_the_stage(long, share, tmp_path):
    for split, count, bad in zip(("train", "test"), (10, 4), long, strict=True):
        pairs = [Pair([said("user", "hi")], "y" * (300 if i < bad else 9), "no", None, "dataset") for i in range(count)]
        write(tmp_path / f"{split}.jsonl", pairs)

    def asked(share: float):
        options = ["dpo.max_length=100", f"data.preferences.max_unusable_share={share}"]
        job = make_job("dpo", tmp_path / str(share), *options)
        job.inputs["comparisons"] = tmp_path
        return job

    if (long, share) == ((3, 2), 0.5):
        train, test = load_pairs(asked(share), tiny_tokenizer())
        assert (len(train.rows), train.dropped, len(test.rows), test.dropped) == (7, 3, 2, 2)
        share = 0.49
    what = "4 of 4 held-out" if long == (9, 4) else "2 of 4 held-out" if long == (3, 2) else "10 of 10 training"
    with pytest.raises(UserError, match=f"^dpo.max_length=100: leaves out {what} pairs as too long; set it higher"):
        load_pairs(asked(share), tiny_tokenizer())


def test_prompts_without_room_are_counted(tmp_path):
    rows = [
        {"messages": [said("user", f"{i} " + "x" * (130 if i % 4 else 9)), said("assistant", "yes")]}
        for i in range(200)
    ]
    file = lines(tmp_path / "chats.jsonl", rows)
    job = make_job("ppo", tmp_path / "job", *own(file, "ppo.episodes=1000", "sampling.max_new_tokens=8"))
    pool = rollouts.prompt_pool(job, tiny_tokenizer(), tiny_policy())
    reasons = rollouts.left_out(job, tiny_tokenizer(), pool)
    in_split = len(reading.load(job.config.data.replies, "train").rows)
    assert reasons == {"prompt leaves no room for a reply": {"count": in_split - len(pool)}} and 20 < len(pool) < 60
    examples, unused = held_out.prompts(job, tiny_tokenizer(), tiny_policy(), 100, 1)
    in_test = len(reading.load(job.config.data.replies, "test").rows)
    assert unused == {"prompt leaves no room for a reply": {"count": in_test - len(examples)}} and examples


def tokenizer_without_system():
    """The tiny tokenizer with a template that takes no system message."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    refusing = "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('No system') }}{% endfor %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    return tokenizer


def test_prompts_that_the_template_refuses_are_counted_as_such(tmp_path, monkeypatch):
    turns = [[said("user", f"{i}"), said("assistant", "yes")] for i in range(300)]
    rows = [{"messages": [said("system", "s")] * (i % 5 == 0) + turn} for i, turn in enumerate(turns)]
    overrides = own(lines(tmp_path / "chats.jsonl", rows), "data.replies.max_unusable_share=0.5")
    tokenizer, words = tokenizer_without_system(), "the chat template refuses it: No system"
    asked = {s: [r["messages"] for r in reading.load(compose(overrides).data.replies, s).rows] for s in SPLITS[:2]}
    expected = {s: {words: {"count": sum(len(m) == 3 for m in dialogues)}} for s, dialogues in asked.items()}
    job = make_job("ppo", tmp_path / "ppo", *overrides, "ppo.episodes=1000", "sampling.max_new_tokens=8")
    pool = rollouts.prompt_pool(job, tokenizer, tiny_policy())
    assert rollouts.left_out(job, tokenizer, pool) == expected["train"] and len(pool) > 100
    more = ["comparisons.prompts=1000", "comparisons.eval_prompts=1000", "comparisons.samples_per_prompt=2"]
    job = make_job("comparisons", tmp_path / "job", *overrides, *more, "sampling.max_new_tokens=8")
    job.inputs["sft"] = write_model(tiny_policy(), tmp_path / "sft")
    replies = [[tokenizer.eos_token_id], [*tokenizer.encode("yes"), tokenizer.eos_token_id], tokenizer.encode("no")]

    def sampled(model, ids, *_):
        return [Reply(replies[i % 3], [], i % 3 < 2, []) for i in range(len(ids))]

    monkeypatch.setattr(comparisons.chat, "require_same_template", lambda _: tokenizer)
    monkeypatch.setattr(comparisons.sampler, "sample", sampled)
    train, held_out, metrics = comparisons.sampled_answers(job)
    assert metrics["unusable"] == expected
    count = 2 * (len(train) + len(held_out))
    assert metrics["samples_empty"] == -(-count // 3) and metrics["samples_without_end"] == count // 3
    assert sum(map(len, train + held_out)) == count - metrics["samples_empty"] - metrics["samples_without_end"]


def test_samples_that_the_template_writes_otherwise_are_left_out_and_counted(tmp_path, monkeypatch):
    rows = [{"messages": [said("user", f"{i}"), said("assistant", "yes")]} for i in range(60)]
    more = ["comparisons.prompts=100", "comparisons.eval_prompts=100", "comparisons.samples_per_prompt=2"]
    job = make_job("comparisons", tmp_path / "job", *own(lines(tmp_path / "chats.jsonl", rows)), *more)
    job.inputs["sft"], tokenizer = write_model(tiny_policy(), tmp_path / "sft"), copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'].split('so: ')[-1]")
    replies = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("yes", "so: yes")]
    monkeypatch.setattr(comparisons.chat, "require_same_template", lambda _: tokenizer)
    monkeypatch.setattr(
        comparisons.sampler,
        "sample",
        lambda _, ids, *__: [Reply(replies[i % 2], [], True, []) for i in range(len(ids))],
    )
    *groups, metrics = comparisons.sampled_answers(job)
    reason = "a sample cannot be written as it is: it leaves a part of the reply out"
    for split, answers in zip(("train", "validation"), groups, strict=True):
        assert all([answer.reply for answer in group] == ["yes"] for group in answers) and answers
        assert metrics["unusable"][split][reason] == {"count": len(answers)}


def test_training_and_held_out_pairs_that_the_template_refuses_are_counted(tmp_path, monkeypatch):
    pairs = [Pair([said("system", "s")] * (i < 3) + [said("user", "<|end|>")], "a", "b", None, "x") for i in range(10)]
    job = make_job("comparisons", tmp_path, *own("x.jsonl", "data.replies.max_unusable_share=0.9"))
    job.inputs["sft"] = tmp_path
    monkeypatch.setattr(comparisons.chat, "require_same_template", lambda _: tokenizer_without_system())
    train, test, metrics = comparisons.as_the_template_allows(job, pairs, pairs[1:8])
    assert (train, test) == (pairs[3:], pairs[3:8])
    refused = {"refused_by_template": {"No system": 3}, "eval_refused_by_template": {"No system": 2}}
    assert metrics == {"marks_removed": 7, **refused}


HELLO = [said("system", "Be kind."), said("user", "Hello"), said("assistant", "Hi.")]


@pytest.mark.parametrize("kind", ["messages", "preference"])
def test_dialogues_that_all_begin_alike_are_refused_when_they_are_read(kind, tmp_path):
    prompts = [[*HELLO, said("user", f"question {i}")] for i in range(300)]
    reply, bad = said("assistant", "yes"), said("assistant", "no")
    rows = [{"messages": [*p, reply], "prompt": p, "chosen": [reply], "rejected": [bad]} for p in prompts]
    found, limits = source(lines(tmp_path / "rows.jsonl", rows), kind), compose(own("x.jsonl")).data.dialogue
    with pytest.raises(UserError) as caught:
        reading.check(found)
        reading.check_replies(found, limits, {"train", "validation"})
    answer = str(caught.value)
    assert "its 300 rows begin with 1 different messages, and rows that begin alike stay together" in answer
    assert answer.endswith("give more rows, set splits, or name the split of each row in a column split")
    named = [row | {"split": SPLITS[i % 3]} for i, row in enumerate(rows)]
    mended = source(lines(tmp_path / "named.jsonl", named), kind)
    reading.check(mended)
    reading.check_replies(mended, limits, set(SPLITS))


def test_a_split_that_a_limit_empties_is_refused_by_that_limit(tmp_path):
    mine = compose(own(chats(tmp_path, range(300)), "data.dialogue.reply_max_chars=200")).data
    with pytest.raises(UserError, match=r"no prompt in its train split is left, most often because reply longer than "):
        reading.check_replies(mine.replies, mine.dialogue, {"train", "validation"})
