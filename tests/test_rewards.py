"""Reward functions keep TRL's signature and their range, and are found by import path."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import conf
import rewards
from pipeline.errors import UserError
from rewards.exact import exact_match
from rewards.length import length
from rewards.sentiment import textblob, vader

TEXTS = ["I love this, it is wonderful!", "I hate this, it is terrible.", "The table has four legs.", "", "x" * 1000]
CONFIGS = [yaml.safe_load(file.read_text()) for file in sorted((Path(conf.__file__).parent / "reward").glob("*.yaml"))]
CONFIGS = [config for config in CONFIGS if config["function"]]  # null is the learned reward model


def load(function, **args):
    return rewards.load(OmegaConf.create({"function": function, "args": args}))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["function"])
def test_each_configured_function_scores_each_completion_and_takes_extra_columns(config):
    function = load(config["function"], **config.get("args", {}))
    scores = function(prompts=["hello"] * len(TEXTS), completions=TEXTS, answer=["x"] * len(TEXTS), step=3)
    assert scores == function(prompts=[""] * len(TEXTS), completions=TEXTS, answer=["x"] * len(TEXTS))
    assert len(scores) == len(TEXTS) and all(isinstance(score, float) and -1 <= score <= 1 for score in scores)
    assert [function(prompts=["q"], completions=[text], answer=["x"])[0] for text in TEXTS] == scores
    assert function(prompts=[], completions=[], answer=[]) == []


@pytest.mark.parametrize("function", [vader, textblob])
def test_sentiment_has_the_sign_of_the_words(function):
    good, bad, neutral, empty, _ = function(prompts=[""] * len(TEXTS), completions=TEXTS)
    assert good > 0.5 and bad < -0.5 and neutral == empty == 0


def test_vader_is_the_compound_score_of_the_package():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    compound = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in TEXTS]
    assert vader(prompts=TEXTS, completions=TEXTS) == compound


def test_length_is_the_share_of_its_cap():
    assert length([""] * 4, ["", "a" * 25, "a" * 50, "a" * 80], cap=50) == [0.0, 0.5, 1.0, 1.0]


def test_exact_match_is_equality_but_for_white_space():
    pairs = [("42", "42"), (" 42\n", "42"), ("4 2", "42"), ("42.", "42"), ("", "42"), ("a  b\nc", "a b c"), ("A", "a")]
    completions, answer = zip(*pairs, strict=True)
    assert exact_match(prompts=[""] * 7, completions=completions, answer=answer) == [1, 1, 0, 0, 0, 1, 0]


def test_arguments_of_the_configuration_are_bound():
    assert load("rewards.length:length")(prompts=[""], completions=["a" * 10]) == [0.1]
    assert load("rewards.length:length", cap=20)(prompts=[""], completions=["a" * 10]) == [0.5]


def test_an_argument_that_the_function_lacks_is_refused():
    with pytest.raises(UserError, match="kap"):
        load("rewards.length:length", kap=20)


def test_a_function_that_needs_a_column_which_is_not_there_is_refused():
    config = OmegaConf.create({"function": "rewards.exact:exact_match", "args": {}})
    assert rewards.load(config) is exact_match
    with pytest.raises(UserError, match="missing a required argument: 'answer'; it is given"):
        rewards.load(config, columns=())


def test_a_function_that_takes_no_further_columns_is_refused(tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text("def f(prompts, completions):\n    return [0.0 for _ in prompts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="got an unexpected keyword argument 'answer'"):
        load("narrow:f")


def test_a_function_of_ones_own_module_is_found_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def vowels(prompts, completions, **columns):\n    return [c.count('a') for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load("my_rewards:vowels")(prompts=["", ""], completions=["banana", "kiwi"]) == [3, 0]


@pytest.mark.parametrize("function", ["rewards.length:lenght", "rewards.lenght:length", "rewards.length", "nowhere:f"])
def test_a_function_that_is_not_there_is_refused_by_name(function):
    with pytest.raises(UserError) as caught:
        load(function)
    assert str(caught.value).startswith(f"{function}: no such reward function") and "\n" not in str(caught.value)
