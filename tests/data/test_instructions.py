"""Instructions of IFEval: followed or not by hand-made replies, strictly and loosely; rows that cannot be checked."""

import sys
from collections import Counter

import pytest

from threefold.columns import UnusableRowError
from threefold.data import instructions
from threefold.data.formats import FORMATS
from threefold.errors import UserError
from threefold.evaluation import tasks
from threefold.evaluation.measuring import shares

COMMAS = ("punctuation:no_comma", {})
WORDS = ("length_constraints:number_words", {"num_words": 5, "relation": "at least"})
KEYWORD = ("keywords:existence", {"keywords": ["rain"]})
QUOTED = ("startend:quotation", {})
BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})
LOWER = ("change_case:english_lowercase", {})


def row(*asked):
    names, kwargs = zip(*asked, strict=True)
    # the hub's rows hold every argument of every instruction, most of them null
    return {"prompt": "Write.", "instruction_id_list": [*names], "kwargs": [k | {"language": None} for k in kwargs]}


def problem(*asked):
    (read,) = FORMATS["ifeval"](row(*asked), Counter())
    return tasks.Problem(read["messages"], None, read["instructions"])


@pytest.mark.parametrize(
    ("asked", "reply", "strict", "loose"),
    [
        ([COMMAS], "No comma here.", [True], [True]),
        ([COMMAS], "One, two.", [False], [False]),
        ([COMMAS], "Sure, here it is:\nNo comma.", [False], [True]),
        ([COMMAS], "No comma.\nYours, me", [False], [True]),
        ([WORDS, KEYWORD], "It may rain all day long.", [True, True], [True, True]),
        ([WORDS, KEYWORD], "Some rain.", [False, True], [False, True]),
        ([KEYWORD, COMMAS], "Snow, snow.", [False, False], [False, False]),
        ([QUOTED], '"All of it."', [True], [True]),
        ([QUOTED], '**"All of it."**', [False], [True]),
        ([BULLETS], "* one\n* two", [True], [True]),
        ([BULLETS], "* one", [False], [False]),
        ([LOWER], "this is a plain sentence of the english language.", [True], [True]),
        ([COMMAS, KEYWORD], "", [False, False], [False, False]),
    ],
)
def test_a_reply_is_held_to_each_instruction(asked, reply, strict, loose):
    (found,) = tasks.verdicts("instructions", [problem(*asked)], [reply])
    assert found == {"right": all(strict), "strict": strict, "loose": loose}


def test_accuracy_is_of_prompts_and_of_single_instructions():
    problems = [problem(COMMAS), problem(WORDS, KEYWORD), problem(KEYWORD, COMMAS)]
    found = shares(tasks.verdicts("instructions", problems, ["a\nb, c", "Some rain.", "rain"]))
    assert found["accuracy"] == pytest.approx(1 / 3) and found["accuracy_loose"] == pytest.approx(2 / 3)
    assert found["instructions_strict"] == pytest.approx(3 / 5)
    assert found["instructions_loose"] == pytest.approx(4 / 5)
    for key in ("accuracy", "accuracy_loose", "instructions_strict", "instructions_loose"):
        low, high = found[f"{key}_ci95"]
        assert 0 <= low < found[key] < high <= 1


DEFECTS = [
    ({"kwargs": [{}]}, "no column instruction_id_list"),
    ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "instruction_id_list is not a list"),
    ({"instruction_id_list": [], "kwargs": []}, "instruction_id_list is empty"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "differ in length"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "kwargs is not a list of objects"),
    ({"instruction_id_list": ["punctuation:none"], "kwargs": [{}]}, "IFEval has no instruction punctuation:none"),
    (
        {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 5}]},
        "length_constraints:number_words lacks relation in kwargs",
    ),
    (
        {"instruction_id_list": [WORDS[0]], "kwargs": [{"num_words": 5, "relation": "about"}]},
        "length_constraints:number_words does not take its kwargs",
    ),
    (
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"commas": 1}]},
        "punctuation:no_comma does not take its kwargs",
    ),
    (
        {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]},
        "keywords:existence has kwargs that are no regular expression",
    ),
]


@pytest.mark.parametrize(("raw", "reason"), DEFECTS)
def test_a_row_that_cannot_be_checked_is_refused_with_its_reason(raw, reason):
    with pytest.raises(UnusableRowError, match=reason):
        FORMATS["ifeval"]({"prompt": "Write."} | raw, Counter())


def test_a_checker_that_lacks_data_of_nltk_is_named(monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    sentences = {"num_sentences": 2, "relation": "at least"}
    with pytest.raises(UnusableRowError, match=r"number_sentences needs data of nltk \(python -m nltk.downloader"):
        instructions.read(row(("length_constraints:number_sentences", sentences)))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "if_verifiable", None)
    instructions._library.cache_clear()
    with pytest.raises(UserError, match=r"needs the package if-verifiable; install it with: pip install 'threefold"):
        instructions.read(row(COMMAS))
