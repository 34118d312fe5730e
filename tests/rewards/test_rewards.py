"""Reward functions keep TRL's signature and their numbers, are found by import path, and can be added up."""

import copy
import importlib
import itertools
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import plain_score, tiny_reward_model, tiny_tokenizer
from omegaconf import OmegaConf

from threefold import conf, rewards
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.models import chat
from threefold.models.ensemble import Ensemble
from threefold.rewards.exact import exact_match
from threefold.rewards.learned import learned
from threefold.rewards.length import length, target_length
from threefold.rewards.numeric import numeric_match
from threefold.rewards.pattern import matches
from threefold.rewards.repetition import repetition_penalty
from threefold.rewards.script import script_share
from threefold.rewards.sentiment import textblob, vader
from threefold.schema.stages import RewardFunctionConfig

DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
TEXTS = ["I love this, it is wonderful!", "I hate this, it is terrible.", "The table has four legs.", "", "x" * 1000]
CHOICES = sorted(file.stem for file in (Path(conf.__file__).parent / "reward").glob("*.yaml"))
LEARNED = {"model", "learned_brief"}  # for ppo.reward alone
COMPOSED = {"composed", "learned_brief"}
PPO_COLUMNS = ("answer", "prompt_ids", "completion_ids")


def config(**keys):
    return OmegaConf.merge(OmegaConf.structured(RewardFunctionConfig), {"function": None, **keys})


def load(function, columns=("answer",), **args):
    return rewards.load(config(function=function, args=args), columns)


def scored(function, *completions, **columns):
    return function([""] * len(completions), list(completions), **columns)


def choice(name):
    return compose([f"reward@ppo.reward={name}"]).ppo.reward


# Every choice of the configuration


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_scores_each_completion_and_takes_the_columns_of_ppo(name):
    function = rewards.load(choice(name), PPO_COLUMNS, learned(Ensemble([tiny_reward_model()]), tiny_tokenizer()))
    ids = {"prompt_ids": [[8, 9]] * len(TEXTS), "completion_ids": [[10, 11 + i] for i in range(len(TEXTS))]}
    scores = function(["hello"] * len(TEXTS), TEXTS, answer=["7"] * len(TEXTS), **ids)
    assert len(scores) == len(TEXTS) and all(type(score) is float and math.isfinite(score) for score in scores)
    assert function([], [], answer=[], prompt_ids=[], completion_ids=[]) == []
    if name not in LEARNED | COMPOSED:
        assert all(-1 <= score <= 1 for score in scores)


@pytest.mark.parametrize("name", sorted(set(CHOICES) - LEARNED))
def test_every_choice_but_the_learned_ones_can_judge_and_looks_at_one_row_at_a_time(name):
    judge = rewards.load(compose([f"reward@evaluate.judge={name}"]).evaluate.judge)
    scores = scored(judge, *TEXTS, answer=["7"] * len(TEXTS))
    assert [scored(judge, text, answer=["7"])[0] for text in TEXTS] == scores


def test_docs_list_every_choice():
    table = DOCS.split("## The rewards there are")[1].split("\n## ")[0]
    assert {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")} == set(CHOICES)


# Numbers of each kind


@pytest.mark.parametrize("function", [vader, textblob])
def test_sentiment_has_the_sign_of_the_words(function):
    good, bad, neutral, empty, _ = scored(function, *TEXTS)
    assert good > 0.5 and bad < -0.5 and neutral == empty == 0


def test_vader_is_the_compound_score_of_the_package():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    compound = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in TEXTS]
    assert vader(prompts=TEXTS, completions=TEXTS) == compound


def test_length_is_the_share_of_its_cap():
    assert length([""] * 4, ["", "a" * 25, "a" * 50, "a" * 80], cap=50) == [0.0, 0.5, 1.0, 1.0]


def test_target_length_falls_linearly_on_both_sides():
    texts = ["a" * n for n in (0, 50, 75, 100, 110, 150, 400)]
    assert scored(target_length(100, 50), *texts) == pytest.approx([0, 0, 0.5, 1, 0.8, 0, 0])


def test_exact_match_is_equality_but_for_white_space():
    pairs = [("42", "42"), (" 42\n", "42"), ("4 2", "42"), ("42.", "42"), ("", "42"), ("a  b\nc", "a b c"), ("A", "a")]
    completions, answer = zip(*pairs, strict=True)
    assert exact_match(prompts=[""] * 7, completions=completions, answer=answer) == [1, 1, 0, 0, 0, 1, 0]


GSM8K = "She has 16 - 3 = <<16-3=13>>13 eggs, 13 * $2 = $26.\n#### 1,026"


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so it is 1026.", GSM8K, 1),
        ("2 and 3 make\n#### 1026 and not 5", GSM8K, 1),
        ("#### 5\n#### 1026", GSM8K, 1),
        ("1026, no: 1027", GSM8K, 0),
        ("#### none of the 1026", "#### x\n", None),
        ("1026 ####", GSM8K, 0),
        ("$1,026.00", GSM8K, 1),
        ("−5", "-5", 1),
        ("-$5", "$-5.0", 1),
        ("x=-7", "-7", 1),
        ("between 3-5", "5", 1),
        ("(2)-3", "-3", 0),
        ("+12%", "12", 1),
        ("it is .5", "0.50", 1),
        ("1,2,3", "3", 1),
        ("12345678901234567891", "12345678901234567890", 0),
        ("no number, only ² and ½", "2", 0),
        ("", "2", 0),
        ("2", "two", None),
    ],
)
def test_numeric_match_compares_the_numbers_that_two_texts_answer_with(text, answer, score):
    assert scored(numeric_match, text, answer=[answer]) == [score]


NOT_A_NUMBER = ["2:30", "2024-01-02", "12/05/2024", "1.2.3", "2 + 2", "16 - 3", "2*3", "9^9^9", "1/0", "1e999999999"]
NOT_A_NUMBER += [
    "x2",
    "3x",
    "2\\pi",
    "\\sqrt{16}",
    "√16",
    "x <= 3",
    "±3",
    "5 pm",
    "2 March",
    "5万",
    "0x1F",
    "5 thousandths",
]
NOT_A_NUMBER += ["555-123-4567", "10,00,000", "(3,4)", "7" * 5000]
NOT_A_NUMBER += ["5 degrees below zero", "1.2 bn", "5 K", "5 M", "5 mil", "5 crore", "3 dozen", "5 Millionen", "5 x."]
NOT_A_NUMBER += ["2 thirds", "3 quarters", "3-quarters", "3 quarters of 8", "5 twelfths", "5 and a half", "10 minus 5"]
NOT_A_NUMBER += [
    "5 million and a half",
    "10 pi",
    r"10 \pi",
    "10/pi",
    "5 squared",
    "5 x",
    "5k",
    "n - 1",
    "2 * y",
    "16 -(5)",
]
NOT_A_NUMBER += ["1 thousand 2 hundred", "5 hundred thousand", "two hundred 5", "twice 5", "half of 10", "3 plus 4"]
NOT_A_NUMBER += ["3 to 1", "1 : 2", "3 out of 4", "2 to the power of 3", "5~6", "5 ft 6 in", "2 hours and 30 minutes"]
NOT_A_NUMBER += ["0.333...", "0.333…", "(5, 6)", "[1, 2, 3]"]


def last_number(text):
    """The digits at the end of a text, as a verifier that reads a part would take them."""
    return re.findall(r"\d{1,3}", text)[-1]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("1/4", "3/4", 0),
        ("0.75", "3/4", 1),
        ("so 6 / 8 of it.", "3/4", 1),
        ("3", "2/3", 0),
        ("2/3", "3", 0),
        ("0.333", "1/3", 0),
        ("#### 3/8", "#### 3/4", 0),
        ("#### 6/8 and not 5", "#### 3/4", 1),
        ("2 1/2", "2.5", 1),
        ("-2½", "-5/2", 1),
        (r"\frac{1}{2}", r"\frac{3}{2}", 0),
        (r"it is $-\frac{1}{2}$.", "-0.5", 1),
        (r"\boxed{2\dfrac{1}{2}}", "2.5", 1),
        (r"\frac12", "1/2", 1),
        ("1e5", "3e5", 0),
        ("300,000", "3E5", 1),
        ("10^6", "3^6", 0),
        ("10**6", "10^{6}", 1),
        (r"3 \times 10^{5}", "3 × 10^5", 1),
        ("3 x 10^-2", "0.03", 1),
        ("7,5", "1,5", 0),
        ("1.5", "1,5", 1),
        ("0,500", "1/2", 1),
        ("7 000", "1 000 000", 0),
        ("1\u202f000\u00a0000", "1,000,000", 1),
        (r"1{,}000", "1000", 1),
        ("5 million", "5 thousand", 0),
        ("5 million", "5,000,000", 1),
        ("2 + 2 = 4", "4", 1),
        ("= - 5", "-5", 1),
        ("- 5", "5", 0),
        ("13 * $2 = <<13*2=26>>26.", "26", 1),
        ("**5**", "5", 1),
        ("<answer>5</answer>", "5", 1),
        ("答案是5。", "5", 1),
        ("20kg or a 5-year-old", "5", 1),
        ("It is the 3rd!", "3", 1),
        ("3 apples and 4 pears", "4", 1),
        ("negative 5", "-5", 1),
        ("the total is minus 5.", "-5", 1),
        ("- 5", "minus $5", 1),
        ("-( 5 )", "-(5)", 1),
        ("negative 5", "5", 0),
        ("3 and 1/2", "3.5", 1),
        ("5million", "5-million-dollar", 1),
        ("≈12", r"\approx 12", 1),
        ("~12", "12", 1),
        ("-42°C", "-42 °C", 1),
        ("10⁵", "100,000", 1),
        ("10⁻²", "0.01", 1),
        ("1.2 × 10⁵", "120000", 1),
        ("42\u200b", "\ufeff42", 1),
        *(
            (f"42{unit}", "42", 1)
            for unit in ("s", "m", "m²", "lbs", "km/h", "hours", " s", " lbs", " people", " a day")
        ),
        *((text, "42", 1) for text in ("USD42", "USD 42", "Rs42")),
        ("she gave 5 to the dog", "5", 1),
        ("Answer 1: 42", "42", 1),
        ("it rises by 5...", "5", 1),
        ("Total – 5", "5", 1),
        ("Answer - 5", "5", 1),
        (r"\boxed{1,000}", "1000", 1),
        ("4", "3 apples and 4 pears", None),
        ("2", "(1, 2)", None),
        *((text, last_number(text), 0) for text in NOT_A_NUMBER),
        *((text, text, None) for text in NOT_A_NUMBER),
    ],
)
def test_numeric_match_reads_the_whole_of_a_number_or_refuses_it(text, answer, score):
    assert scored(numeric_match, text, answer=[answer]) == [score]


@pytest.mark.parametrize("part", ["1 ", "9/", "(", "-", "{", "^{", "\\frac{", "1 000 ", "5 ", "<<", "1."])
def test_numeric_match_reads_a_long_reply_without_delay(part):
    started = time.perf_counter()
    scored(numeric_match, part * 2000, answer=["5"])
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("part", ["-", "=", "(", "5 - ", "~ ", "5(", "1, ", "[5, ", "5 to ", "half of "])
def test_numeric_match_reads_a_reply_of_one_sign_without_delay(part):
    started = time.perf_counter()
    scored(numeric_match, "5" + part * 30000 + "x", answer=["5"])
    assert time.perf_counter() - started < 4


def test_a_pattern_matches_the_whole_completion_or_a_part_of_it():
    texts = ["one sentence.", "two. of them.", "", "Ünïcode 雨!", "line\nend."]
    assert scored(matches("[^.!?]+[.!?]"), *texts) == [1, 0, 0, 1, 1]
    assert scored(matches("[.!?]", full=False), *texts) == [1, 1, 0, 1, 1]
    assert scored(matches("(?i)ÜN.*", full=True), *texts) == [0, 0, 0, 1, 0]
    assert scored(matches("line.end."), *texts) == [0] * 5 and scored(matches("(?s)line.end."), *texts)[4] == 1


def test_repetition_is_the_share_of_ngrams_that_repeat_an_earlier_one():
    # of "a b a b a b" the pairs are ab ba ab ba ab: two distinct of five
    texts = ["a b a b a b", "A b a B a b", "a b c d", "a", "", "na na na na", "雨 雨 雨"]
    assert scored(repetition_penalty(2), *texts) == pytest.approx([-0.6, -0.6, 0, 0, 0, -2 / 3, -0.5])
    assert scored(repetition_penalty(), "x " * 100) == pytest.approx([-(1 - 1 / 98)])


def test_a_script_is_counted_among_letters_only():
    texts = ["Привет, мир 123!", "Привет, world", "hello", "", "123 !? 🙂", "漢字かな", "ἀγαθός"]
    assert scored(script_share("Cyrillic"), *texts) == pytest.approx([1, 6 / 11, 0, 0, 0, 0, 0])
    assert scored(script_share("Han"), *texts)[5] == 0.5 and scored(script_share("Greek"), *texts)[6] == 1
    assert scored(script_share("Latin"), *texts)[:3] == pytest.approx([0, 5 / 11, 1])
    assert scored(script_share("Arabic"), "مَرْحَبًا") == [1]  # vowel signs are no letters


# Loading


def test_arguments_of_the_configuration_are_bound():
    assert scored(load("rewards.length:length"), "a" * 10) == [0.1]
    assert scored(load("rewards.length:length", cap=20), "a" * 10) == [0.5]
    assert scored(load("rewards.length:target_length", target=20, tolerance=20), "a" * 10) == [0.5]


def one_line(*said, **keys):
    with pytest.raises(UserError) as caught:
        rewards.load(config(**keys))
    message = str(caught.value)
    assert all(text in message for text in said) and "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [
        ("rewards.length:length", {"kap": 20}, "rewards.length:length: has no argument kap"),
        ("rewards.pattern:matches", {"pattern": "(a"}, "rewards.pattern:matches: pattern=(a: missing )"),
        ("rewards.pattern:matches", {}, "missing 1 required positional argument: 'pattern'"),
        ("rewards.script:script_share", {"script": "Klingon"}, "script=Klingon: is no script of Unicode"),
        ("rewards.script:script_share", {"script": "L}a"}, "script=L}a: is no script of Unicode"),
        ("rewards.length:target_length", {"target": 5, "tolerance": 0}, "tolerance=0: must be at least 1"),
        ("rewards.repetition:repetition_penalty", {"n": 0}, "n=0: must be at least 1"),
        ("trl.rewards:get_repetition_penalty_reward", {"max_penalty": 2}, "should not be positive"),
        ("os:path", {}, "not a callable object"),
    ],
)
def test_arguments_that_a_function_cannot_take_are_refused_when_it_is_loaded(function, args, said):
    one_line(function, said, function=function, args=args)


def test_a_function_that_needs_a_column_which_is_not_there_is_refused():
    assert scored(load("rewards.exact:exact_match"), "a", answer=["a"]) == [1]
    with pytest.raises(UserError, match="missing a required argument: 'answer'; it is given prompts, compl"):
        load("rewards.exact:exact_match", columns=())


NUMBERS = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module beside the user; returns its name."""

    def write(code: str) -> str:
        name = f"mine_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_a_function_that_takes_no_further_columns_is_refused(module):
    name = module("def f(prompts, completions):\n    return [0.0 for _ in prompts]\n")
    with pytest.raises(UserError, match="got an unexpected keyword argument 'answer'"):
        load(f"{name}:f")


def test_a_function_of_ones_own_module_is_found_by_import_path(module):
    name = module("def vowels(prompts, completions, **columns):\n    return [c.count('a') for c in completions]\n")
    assert scored(load(f"{name}:vowels"), "banana", "kiwi") == [3, 0]


@pytest.mark.parametrize("function", ["rewards.length:lenght", "rewards.lenght:length", "rewards.length", "nowhere:f"])
def test_a_function_that_is_not_there_is_refused_by_name(function):
    one_line(f"{function}: no such reward function", function=function)


def test_a_function_that_gives_too_few_scores_is_named(module):
    name = module("def one(prompts, completions, **columns):\n    return [1.0]\n")
    with pytest.raises(UserError, match=f"{name}:one: gives 1 scores to 2 completions"):
        scored(load(f"{name}:one"), "a", "b")


def test_columns_are_given_under_the_names_that_a_function_has_for_them(module):
    name = module("def f(queries, replies, solution):\n    return [float(a == b) for a, b in zip(replies, solution)]\n")
    columns = {"prompts": "queries", "completions": "replies", "answer": "solution"}
    function = rewards.load(config(function=f"{name}:f", columns=columns))
    assert scored(function, "a", "b", answer=["a", "c"]) == [1, 0]
    one_line("columns names gold, but there are prompts", function=f"{name}:f", columns={"gold": "solution"})


def test_an_asynchronous_function_is_awaited(module):
    name = module("async def f(prompts, completions, **columns):\n    return [len(c) for c in completions]\n")
    assert scored(load(f"{name}:f"), "abc", "") == [3, 0]


CONVERSATION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "seen"),
    [
        (False, [(["Hi", "Ho"], ["a", "b"])]),
        (
            True,
            [
                (
                    [CONVERSATION, [{"role": "user", "content": "Ho"}]],
                    [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
                )
            ],
        ),
    ],
)
def test_a_function_gets_the_last_message_as_text_or_whole_conversations(module, messages, seen):
    name = module(
        "seen = []\ndef f(prompts, completions, **_):\n    seen.append((prompts, completions)); return [0, 0]\n"
    )
    function = rewards.load(config(function=f"{name}:f", messages=messages))
    function([CONVERSATION, "Ho"], ["a", "b"])
    assert importlib.import_module(name).seen == seen


# TRL's own functions

THINK = ["<think>\nwhy\n</think>\nso.", "<think>why so.", "", "so <think>why</think>"]


def test_a_reward_function_of_trl_runs_unchanged():
    from trl.rewards import think_format_reward

    theirs = think_format_reward([[{"role": "assistant", "content": text}] for text in THINK])
    assert scored(rewards.load(choice("think_format")), *THINK) == theirs == [1, 0, 0, 0]


def test_a_function_of_trl_that_makes_a_reward_from_arguments_reads_the_token_ids():
    penalty = load("trl.rewards:get_repetition_penalty_reward", PPO_COLUMNS, ngram_size=2)
    overlong = load(
        "trl.rewards:get_soft_overlong_punishment", PPO_COLUMNS, max_completion_len=100, soft_punish_cache=20
    )
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1] * 90]
    assert scored(penalty, "", "", "", completion_ids=ids)[:2] == [0, -0.75]
    assert scored(overlong, "", "", "", completion_ids=ids) == [0, 0, -0.5]


# The learned reward model


def test_the_learned_reward_is_the_normalised_score_of_ids_or_of_what_the_template_renders():
    model, tokenizer = tiny_reward_model(), copy.deepcopy(tiny_tokenizer())
    function, texts = learned(Ensemble([model]), tokenizer, batch_size=2), ["I like the rain", "", "nice, and you?"]
    prompts = [CONVERSATION, "Hi", [{"role": "user", "content": "Hi"}]]
    asked = [chat.prompt_ids(tokenizer, p) for p in (CONVERSATION, prompts[2], prompts[2])]
    replied = [chat.reply_ids(tokenizer, prompts[2], text) for text in texts]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in replied)
    expected = [(plain_score(model, a + r) - 0.3) / 1.7 for a, r in zip(asked, replied, strict=True)]
    assert function(prompts, texts) == pytest.approx(expected, abs=1e-4)
    tokenizer.init_kwargs[chat.ENDS] = ["<|system|>"]
    otherwise = [[*ids[:-1], tokenizer.convert_tokens_to_ids("<|system|>")] for ids in replied]  # all ends score alike
    assert function(prompts, texts, prompt_ids=asked, completion_ids=otherwise) == pytest.approx(expected, abs=1e-4)
    unfinished = [ids[:-1] for ids in replied]
    expected = [(plain_score(model, a + r) - 0.3) / 1.7 for a, r in zip(asked, unfinished, strict=True)]
    assert function(prompts, texts, prompt_ids=asked, completion_ids=unfinished) == pytest.approx(expected, abs=1e-4)


# Composition

A = [2.0, None, -1.0, 0.5, None, 0.0]
B = [1.0, 1.0, 0.0, 1.0, None, 1.0]
C = [10.0, -20.0, 30.0, 40.0, None, None]
CONSTANT = "def a(prompts, completions, **_): return {}\ndef b(prompts, completions, **_): return {}\n"
CONSTANT += "def c(prompts, completions, **_): return {}\n"


def composed(module, gather=list, **parts):
    name = module(CONSTANT.format(A, B, C))
    found = {part: {"function": f"{name}:{part}", **options} for part, options in parts.items()}
    return scored(rewards.load(config(parts=found), gather=gather), *[""] * 6)


def test_parts_are_weighted_and_added_and_one_that_does_not_apply_adds_nothing(module):
    found = composed(module, a={"weight": 2}, b={}, c={"weight": -0.1})
    a, b, c = (np.array([np.nan if score is None else score for score in scores]) for scores in (A, B, C))
    expected = np.nansum([2 * a, b, -0.1 * c], 0)
    assert found[4] is None and np.isnan([a[4], b[4], c[4]]).all()
    assert [score for row, score in enumerate(found) if row != 4] == pytest.approx(np.delete(expected, 4))


def test_scores_are_normalised_over_the_rows_they_apply_to_and_then_clipped_and_weighted(module):
    found = composed(module, c={"normalise": True, "clip": [-1, 1], "weight": 3}, b={"weight": 0})
    applicable = np.array([10.0, -20.0, 30.0, 40.0])
    expected = 3 * ((applicable - applicable.mean()) / applicable.std()).clip(-1, 1)
    assert found[:4] == pytest.approx(expected) and found[4] is None and found[5] == 0
    assert composed(module, a={"clip": [-0.5, 1]})[:4] == [1, None, -0.5, 0.5]


def test_normalised_scores_are_0_where_all_are_the_same_and_none_where_none_applies(module):
    name = module("def same(prompts, completions, **_): return [0.1] * len(prompts)\n")
    part = {"function": f"{name}:same", "normalise": True}
    assert scored(rewards.load(config(parts={"same": part})), "", "", "") == [0, 0, 0]
    name = module("def none(prompts, completions, **_): return [None] * len(prompts)\n")
    assert scored(rewards.load(config(parts={"none": part | {"function": f"{name}:none"}})), "", "") == [None, None]


def test_normalisation_is_over_the_whole_batch_where_a_call_sees_a_share_of_it(module):
    everyone = [*C, -60.0, None]
    found = composed(module, gather=lambda scores: everyone, c={"normalise": True})
    applicable = np.array([score for score in everyone if score is not None])
    assert found[:4] == pytest.approx((np.array(C[:4], float) - applicable.mean()) / applicable.std())


def test_a_gate_lets_a_part_count_only_where_another_passes(module):
    found = composed(module, b={"weight": 0}, c={"needs": {"b": 1}})
    assert found == [10, -20, 0, 40, None, 0]  # row 2: b fails; row 5: c does not apply
    # a part that does not apply passes no gate, and neither does one whose own gate is shut
    chained = {"b": {"weight": 0}, "a": {"weight": 0, "needs": {"b": 1}}, "c": {"needs": {"a": -5}}}
    assert composed(module, **chained) == [10, 0, 0, 40, None, 0]
    both = {"a": {"weight": 0}, "b": {"weight": 0}, "c": {"needs": {"a": 1, "b": 1}}}
    assert composed(module, **both) == [10, 0, 0, 0, None, 0]


def test_a_gate_looks_at_the_score_itself_whatever_is_added_of_it(module):
    gate = {"weight": 0, "normalise": True, "clip": [-0.1, 0.1]}
    assert composed(module, c=gate, b={"needs": {"c": 30}}) == [0, 0, 0, 1, None, 0]


def test_the_composed_choice_counts_sentiment_only_in_whole_sentences():
    function = rewards.load(choice("composed"))
    good, cut, loop = "I love this!", "I love this", "I love this! " * 4
    love = vader([""], [good])[0]
    assert scored(function, good, cut, "") == pytest.approx([love, 0, 0])
    penalty = scored(repetition_penalty(3), loop)[0]
    assert penalty == pytest.approx(-0.7) and scored(function, loop) == pytest.approx([vader([""], [loop])[0] - 0.35])


def test_the_learned_model_less_a_penalty_is_configuration_alone():
    model = learned(Ensemble([tiny_reward_model()]), tiny_tokenizer())
    texts = ["I like the rain", "the rain the rain the rain", ""]
    options = [
        "ppo.reward.parts.quality.clip=null",
        "~ppo.reward.parts.brief",
        "ppo.reward.parts.repetition.weight=0.5",
    ]
    chosen = compose(["reward@ppo.reward=learned_brief", *options]).ppo.reward
    plain, penalty = scored(model, *texts), scored(repetition_penalty(3), *texts)
    assert penalty == [0, -0.5, 0]
    expected = [p + 0.5 * r for p, r in zip(plain, penalty, strict=True)]
    assert scored(rewards.load(chosen, (), model), *texts) == pytest.approx(expected)


@pytest.mark.slow
def test_a_reward_has_a_name_and_says_whether_it_needs_the_model():
    names = {name: (rewards.name(choice(name)), rewards.uses_model(choice(name))) for name in CHOICES}
    assert {name for name, (_, uses) in names.items() if uses} == LEARNED
    assert names["vader"][0] == "rewards.sentiment:vader" and names["model"][0] == "learned reward model"
    assert names["composed"][0] == "sentence + sentiment + repetition"


# The documentation's own example


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path, monkeypatch):
    section = DOCS.split("## Add your own in five lines")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    name = code.splitlines()[0].removeprefix("# ").removesuffix(".py")
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 5
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    override = next(word for word in section.split() if word.startswith("ppo.reward.function=")).rstrip('"')
    function = rewards.load(compose([override]).ppo.reward, PPO_COLUMNS)
    assert scored(function, "Thank you, and you?", "No.", "") == [1, 0, 0]
