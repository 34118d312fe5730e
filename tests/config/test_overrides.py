"""Overrides as they are typed: text keys keep their text, other keys their numbers; sweeps over texts."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from threefold.config.compose import compose
from threefold.config.overrides import as_typed, assigned, kind_of
from threefold.runs import sweep_space

TEXTS = [
    "2026_11_28", "12e4567", "5e10", "3e7", "1_000", "0x10", "007", "-1", "+1", "1.", ".5", "1e3", "inf", "nan", "true",
    "False", "on", "1:30", "a=b", "~/x", "a,b", "x y", "(copy)", "data (1).jsonl", "[a]", "{a}", "größe", "雨", "it's",
    'say "so"', "a\\b", "C:\\new\\table", "a#b", "50%", "a&b;c", "*.jsonl", "a|b", "!x", "str(5)", "f(1).txt", "a@b",
    "http://h/p?q=1&r=2,3", "a' b", "-", "--x", "null.txt", "a\\'b", "'", '"', "x" * 300,
]  # fmt: skip


PARSER = OverridesParser.create()  # Hydra's own, which composes what `as_typed` gives


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_key_keeps_what_was_typed(text):
    for override in (f"data.text.path={text}", assigned("data.text.path", text)):
        read = PARSER.parse_override(as_typed(override))
        assert read.get_key_element() == "data.text.path" and read.value() == text


def test_every_kind_of_text_key_does():
    config = compose([f"{key}=2026_11_28" for key in ("run", "++runs", "model.revision", "tracker.project")])
    assert config.run == config.runs == config.model.revision == config.tracker.project == "2026_11_28"


def test_texts_in_lists_and_mappings_do_and_numbers_stay_numbers():
    config = compose(
        [
            "tracker.tags=[2026_11_28,1e3, true, 'a, b']",
            "comparisons.policies=[runs/a=b/ppo,runs/ü/sft]",
            "data.text.splits={train: 1e3, test: 2026_11}",
            "evaluate.tasks={n: {path: 3e7, problems: 1_0, format: messages, check: exact, columns: {a: 2_0}}}",
            "evaluate.tasks.n.revision=1e1",
            "ppo.reward.parts={a: {function: null, weight: 1e-1}}",
            "comparisons.judge.args={cap: 1e1}",
            "ppo.kl_coef=2e-1",
            "frontier.seeds=[1,1_0]",
        ]
    )
    assert config.tracker.tags == ["2026_11_28", "1e3", "true", "a, b"]
    assert config.comparisons.policies == ["runs/a=b/ppo", "runs/ü/sft"]
    assert config.data.text.splits == {"train": "1e3", "test": "2026_11"}
    task = config.evaluate.tasks.n
    assert (task.path, task.problems, task.columns, task.revision) == ("3e7", 10, {"a": "2_0"}, "1e1")
    assert config.ppo.reward.parts.a.weight == 0.1 and config.comparisons.judge.args == {"cap": 10.0}
    assert config.ppo.kl_coef == 0.2 and config.frontier.seeds == [1, 10]


def test_null_interpolations_quotes_and_escapes_are_what_they_are(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "there")
    values = {"null": None, "NULL": None, "${run}": "demo", "${oc.env:SOMEWHERE,a}": "there", "'1e3'": "1e3"}
    values |= {'"a b"': "a b", "a\\,b": "a,b", " x ": "x", "'null'": "null"}
    for written, value in values.items():
        composed = OmegaConf.create({"run": "demo", "read": PARSER.parse_override(as_typed(f"run={written}")).value()})
        assert composed.read == value


def test_a_path_in_the_home_folder_is_found_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert compose(["runs=~"]).runs == "/home/somebody"
    config = compose(["data.text.path=~/x", "runs=~/runs", "comparisons.policies=[~/a/sft,b/ppo]", "chat.system=~/x"])
    assert config.data.text.path == "/home/somebody/x" and config.runs == "/home/somebody/runs"
    assert config.comparisons.policies == ["/home/somebody/a/sft", "b/ppo"] and config.chat.system == "~/x"


def test_a_sweep_over_texts_keeps_them_and_its_runs_get_them():
    for written, values in {
        "model.revision=2026_11_28,3e7": ("2026_11_28", "3e7"),
        "model.revision=choice(1e1,1_0)": ("1e1", "1_0"),
        "model.revision=~/a,b=c": ("~/a", "b=c"),
        "model.revision='a,b',c": ("a,b", "c"),
    }.items():
        fixed, (dimension,) = sweep_space.parse([written, "run=1e3"])
        assert fixed == ["run=1e3"]
        spelt = [sweep_space.spelt({dimension.key: value}) for value in dimension.values]
        assert tuple(PARSER.parse_override(as_typed(one)).value() for (one,) in spelt) == values
    _, (numbers,) = sweep_space.parse(["ppo.kl_coef=1e-1,2"])
    assert numbers.values == (0.1, 2)


def test_the_type_of_a_key_is_that_of_the_schema():
    assert kind_of("run") is str and kind_of("model.revision") is str and kind_of("evaluate.tasks.n.path") is str
    assert kind_of("data.text.splits.train") is str and kind_of("tracker.tags.0") is str
    assert kind_of("ppo.kl_coef") is float and kind_of("precision") is None and kind_of("no.such.key") is None
    assert as_typed("ppo.kl_coef=0.1") == "ppo.kl_coef=0.1" and as_typed("model=tiny") == "model=tiny"
