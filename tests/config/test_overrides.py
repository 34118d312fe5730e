"""Overrides as they are typed: text keys keep their text, other keys their numbers; sweeps over texts."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from threefold.config.compose import compose
from threefold.config.names import OTHER_NAMES, completions, keys, nearest_key
from threefold.config.overrides import as_typed, assigned, kind_of
from threefold.errors import UserError
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


@pytest.mark.parametrize(
    ("typed", "nearest"),
    {
        "ppo.lr": "ppo.learning_rate",
        "rm.lr": "reward.learning_rate",
        "sft.num_train_epochs": "sft.epochs",
        "dpo.per_device_train_batch_size": "dpo.batch_size",
        "sft.warmup_ratio": "sft.warmup",
        "ppo.max_steps": "ppo.episodes",
        "sft.max-steps": "sft.examples",
        "max_steps": "pretrain.tokens, sft.examples, reward.pairs, dpo.pairs, ppo.episodes",
        "ppo.beta": "ppo.kl_coef",
        "beta": "dpo.beta, ppo.kl_coef",
        "kl_penalty": "ppo.kl_coef",
        "gamma": "ppo.gamma",
        "cliprange": "ppo.clip_range",
        "vf_coef": "ppo.value_coef",
        "reward.lora_r": "reward.lora_rank",
        "learning_rate": "pretrain.learning_rate, sft.learning_rate, reward.learning_rate, dpo.learning_rate, "
        "ppo.learning_rate",
        "bf16": "precision",
        "model_name_or_path": "model.checkpoint",
        "stage": "target",
        "data.reply.path": "data.replies.path",  # the section is misspelt, not the name
        "ppo.kl_ceof": "ppo.kl_coef",
    }.items(),
)
def test_a_name_of_other_trainers_is_answered_with_ours(typed, nearest):
    assert nearest_key(typed) == f" (nearest: {nearest})"
    with pytest.raises(UserError, match=rf"{typed} is not a configuration key \(nearest: {nearest}\)$"):
        compose([f"{typed}=1"])


def test_names_of_other_trainers_are_none_of_ours_and_stand_for_keys():
    ends = [f".{key}" for key in [*keys(), "experiment", "reward"]]
    assert [ours for ours in OTHER_NAMES if not any(end.endswith(f".{ours}") for end in ends)] == []
    for ours, theirs in OTHER_NAMES.items():
        assert ours not in theirs.split() and len(set(theirs.split())) == len(theirs.split()), ours


HYDRAS = [
    "hydra.job.chdir=true",
    "hydra.run.dir=x",
    "hydra/launcher=submitit_slurm",
    "+hydra.x=1",
    "hydra.verbose=true",
]
FORMS = {
    "=3": "=3: names no key; overrides are written KEY=VALUE",
    "ppo.kl_coef==3": "ppo.kl_coef==3: must be a number",
    "ppo.kl_coef:3": "ppo.kl_coef:3: overrides are written KEY=VALUE: ppo.kl_coef=3",
    "ppo.kl_coef=": "ppo.kl_coef=: must be a number",
    "ppo..kl_coef=3": r"ppo\.\.kl_coef is not a configuration key \(nearest: ppo.kl_coef\)",
    "ppo.kl_coef.x=3": r"ppo.kl_coef.x is not a configuration key \(nearest: ppo.kl_coef\)",
    "ppo=3": "ppo=3: ppo is a section of keys; give one of them, for example ppo.episodes=VALUE",
    "ppo.reward=length": "ppo.reward is a section; choose one with reward@ppo.reward=NAME",
    "reward=length": "reward=length: say what it is for: reward@comparisons.judge=NAME, ",
    "+model=tiny": r"\+model: model has a choice already; write it without the \+",
    "~ppo.kl_coef": "ppo.kl_coef: is needed and cannot be taken out; give it a value instead",
    "~ppo.kl_coef=3": "ppo.kl_coef: is not there, or has another value; give it a value instead",
    "ppo.kl_coef=${nope}": r"ppo.kl_coef: \$\{nope\} is not found: no key has that name",
    "ppo.kl_coef=${oc.env:NO_SUCH}": "ppo.kl_coef: the environment has no variable NO_SUCH",
    "experiment=": "experiment=: names no choice; there are arithmetic, demo",
    "tasks=null": r"tasks=null: names no choice; .*; write tasks=\[\] for none",
    "tasks=[lettres]": r"tasks=lettres: no such choice \(nearest: letters\)",
    "tracker=3": "tracker=3: names no choice; there are none, ",
    "ppo": "ppo: overrides are written KEY=VALUE; a stage is chosen with target=ppo",
    "demo": "demo: overrides are written KEY=VALUE, for example experiment=demo",
    "evaluate.models=[base": r"write evaluate.models=\[base\]$",
}


@pytest.mark.parametrize(("typed", "answer"), FORMS.items())
def test_what_hydra_says_of_a_form_is_said_in_our_words(typed, answer):
    with pytest.raises(UserError, match=answer) as caught:
        compose([typed])
    said = str(caught.value)
    assert "\n" not in said and not any(word in said for word in ("Config", "full_key", "multirun", "'str'", "Error"))


@pytest.mark.parametrize("typed", HYDRAS)
def test_a_key_of_hydras_is_refused_by_name(typed):
    with pytest.raises(UserError, match=r"is a key of Hydra's that is not used here; hydra\.searchpath alone is"):
        compose([typed])


def test_words_complete_to_keys_choices_and_values():
    assert completions("ppo.kl_c") == ["ppo.kl_coef=", "ppo.kl_controller="]
    assert completions("ppo.kl_coef") == ["ppo.kl_coef="] and completions("pppo") == completions("seed=") == []
    assert {"seed=", "ppo.", "model=", "model.", "reward@ppo.reward="} <= set(completions(""))
    assert completions("resources.stages.pp") == [f"resources.stages.ppo.{k}=" for k in
                                                  ("cpus", "gpus", "memory_gb", "minutes", "nodes")]  # fmt: skip
    assert "model=tiny" in completions("model=") and "target=ppo" in completions("target=")
    assert completions("++dependents=") == ["++dependents=true", "++dependents=false"]
    for key in keys():
        assert completions(key)[:1] == [f"{key}="] or f"{key}=" in completions(key)
