"""Generated problems: the same every time, right by another calculation, and in one split each."""

import re
from collections import Counter

import pytest

from threefold import chain
from threefold.config.compose import compose
from threefold.data import reading, tasks
from threefold.errors import UserError


def test_a_generator_gives_the_same_problems_every_time():
    assert tasks.arithmetic() == tasks.arithmetic() != tasks.arithmetic(seed=1)
    assert tasks.letters() == tasks.letters() != tasks.letters(seed=1)


def test_sums_and_differences_are_right():
    for problem in tasks.arithmetic():
        assert re.fullmatch(r"\d{1,2}[+-]\d{1,2}", problem["prompt"])
        first, sign, second = re.split(r"([+-])", problem["prompt"])
        unary = len(range(int(first))) + (1 if sign == "+" else -1) * len(range(int(second)))
        assert problem["completion"] == f"{unary}" and unary >= 0


def test_no_problem_occurs_twice_even_with_its_terms_exchanged():
    found = [(re.sub(r"\d", "", p["prompt"]), *sorted(re.split(r"[+-]", p["prompt"]))) for p in tasks.arithmetic()]
    assert len(set(found)) == len(found) == 100 * 101


def answer_about_letters(prompt):
    """The answer, found letter by letter."""
    *asked, word = prompt.split()
    if asked == ["reverse"]:
        return "".join(word[-i] for i in range(1, len(word) + 1))
    if asked == ["sort"]:
        return "".join(letter * word.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    if asked == ["spell"]:
        return " ".join(letter for letter in word)
    place = re.fullmatch(r"(\d)(?:st|nd|rd|th) letter of", " ".join(asked))
    return word[int(place[1]) - 1]


def test_questions_on_letters_are_right_and_no_word_occurs_twice_even_backwards():
    problems = tasks.letters()
    assert all(problem["completion"] == answer_about_letters(problem["prompt"]) for problem in problems)
    words = [problem["prompt"].split()[-1] for problem in problems]
    assert len({min(word, word[::-1]) for word in words}) == len(problems) == 10_000
    assert {len(word) for word in words} == {3, 4, 5, 6} and all(word != word[::-1] for word in words)
    kinds = Counter(re.sub(r"\d..", "nth", problem["prompt"]).split()[0] for problem in problems)
    assert set(kinds) == {"reverse", "sort", "spell", "nth"} and min(kinds.values()) > 2000


def splits(source):
    return {
        split: {row["key"] for row in reading.load(source, split).rows} for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize(("name", "count"), [("arithmetic", 100 * 101), ("letters", 10_000)])
def test_what_is_held_out_occurs_in_no_training_data(name, count):
    """The texts of pretraining and the prompts of the later stages are split alike."""
    sources = compose([f"data={name}"]).data
    text, replies = splits(sources.text), splits(sources.replies)
    assert text == replies
    assert sum(map(len, text.values())) == len(set().union(*text.values())) == count
    assert min(map(len, text.values())) > 400
    first = reading.texts(reading.load(sources.text, "test").rows)[0]
    assert first in {f"{p['prompt']}\n{p['completion']}" for p in tasks.TASKS[name]()}
    examples = reading.examples(sources.replies, "test", sources.dialogue)
    assert len(examples) == len(replies["test"])  # none falls to the limits of the dialogue


def test_a_task_counts_in_the_fingerprint_by_name_and_source_code(tmp_path, monkeypatch):
    def fingerprint():
        return chain.plan(compose(["data=arithmetic"]), ["tokenizer"])["tokenizer"]

    before = fingerprint()
    assert before.parts["data.text.path"] == "task:arithmetic"
    (tmp_path / "tasks.py").write_text("# another source\n")
    monkeypatch.setattr(tasks, "__file__", str(tmp_path / "tasks.py"))
    assert fingerprint().fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("path=task:arithmetics", r"task:arithmetics: no such task \(nearest: arithmetic\); there are arithmetic"),
        ("splits={train: a}", "task:arithmetic: is generated, so it cannot have splits"),
    ],
)
def test_a_task_that_is_not_there_or_cannot_be_split_is_refused_before_any_work(override, message):
    with pytest.raises(UserError, match=message):
        chain.plan(compose(["data=arithmetic", f"data.text.{override}"]), ["tokenizer"])
