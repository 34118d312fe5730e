"""Which artifacts a configuration asks for, why one is stale, and that each is made once and only when needed."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import composed
from omegaconf.errors import ConfigAttributeError

from threefold import chain
from threefold.artifacts import digests
from threefold.artifacts.artifact import Artifact
from threefold.config.compose import compose
from threefold.config.names import keys
from threefold.errors import UserError
from threefold.stages import STAGES, depending_on, needed_by, parents

ALL = ("tokenizer", "pretrain", "sft", "comparisons", "reward", "dpo", "ppo", "evaluate")
FROM_SFT = set(ALL[2:])


def fingerprints(*overrides, names=None):
    return {name: p.fingerprint for name, p in chain.plan(composed(*overrides), names).items()}


def changed(*overrides):
    old, new = fingerprints(), fingerprints(*overrides)
    return {name for name in ALL if old[name] != new[name]}


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("tokenizer.vocab_size=600", set(ALL)),
        ("tokenizer.template_date='2026-01-02'", set(ALL)),
        ("model.num_hidden_layers=3", set(ALL) - {"tokenizer"}),
        ("pretrain.tokens=20480", set(ALL) - {"tokenizer"}),
        ("precision=bf16", set(ALL) - {"tokenizer"}),
        ("data.dialogue.context_turns=2", FROM_SFT),
        ("sampling.temperature=0.9", FROM_SFT),
        ("sft.examples=100", FROM_SFT),
        ("comparisons.min_gap=0.1", {"comparisons", "reward", "dpo", "ppo", "evaluate"}),
        ("comparisons.judge.args.cap=50", {"comparisons", "reward", "dpo", "ppo", "evaluate"}),
        ("reward.epochs=2", {"reward", "ppo", "evaluate"}),
        ("reward.gate.min_accuracy=0.6", {"ppo", "evaluate"}),
        ("reward.gate.probes.empty=0.6", {"ppo", "evaluate"}),
        ("dpo.beta=0.2", {"dpo", "evaluate"}),
        ("ppo.kl_coef=0.2", {"ppo", "evaluate"}),
        ("ppo.seed=9", {"ppo", "evaluate"}),
        ("reward@evaluate.second_judge=vader", {"evaluate"}),
        ("evaluate.seed=9", {"evaluate"}),
    ],
)
def test_a_value_reaches_its_stage_and_what_depends_on_it_and_no_other(override, stale):
    assert changed(override) == stale


def test_names_folders_and_the_machine_reach_no_fingerprint(tmp_path):
    elsewhere = ["run=other", f"runs={tmp_path}", "target=ppo", "dependents=false", "tracker=none", "tracker.project=x"]
    machine = ["threads=1", "micro_batch_size=4", "checkpoints=2", "log_every=3"]
    assert changed("launch=ddp", *elsewhere, *(f"runtime.{m}" for m in machine)) == set()


@pytest.mark.parametrize("override", ["dpo.ld_alpha=0.5", "dpo.reference_sync_every=4"])
def test_a_key_that_was_added_is_in_the_fingerprint_with_another_value_alone(override):
    key = override.partition("=")[0]
    name = key.partition(".")[0]
    assert key not in chain.fingerprint_parts(compose([]), name)
    assert key in chain.fingerprint_parts(compose([override]), name)


def test_every_other_key_is_covered_by_the_fingerprint_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", str(tmp_path))
    (tmp_path / "hh-rlhf").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"hh-rlhf/{split}.jsonl.gz").touch()
    config = compose(["experiment=hh", "reward@evaluate.judge=length", "reward@ppo.reward=learned_brief"])
    plans = chain.plan(config), chain.plan(config, needed_by("frontier", config))
    covered = {part for plan in plans for planned in plan.values() for part in planned.parts}
    neutral = ("run", "runs", "target", "dependents", "seed", "runtime.", "tracker.", "launch.", "label.", "chat.")
    neutral += ("launcher.", "cluster.", "resources.", "dashboard.", "sweep.", "data.limits_for")
    neutral += ("takeover", "rounds", "evaluate.reward_model")  # the last chooses parents, whose fingerprints count
    neutral += tuple(key for stage in STAGES.values() for key in stage.added)  # with the value of today
    # which runs the frontier consists of, and how laws are fitted to them
    neutral += tuple(
        f"frontier.{name}" for name in ("seeds", "betas", "kl_coefs", "overrides", "snapshots", "bootstrap")
    )
    # of a local source its content counts, not its place; entries of a dictionary count one by one
    local = (".path", ".config_name", ".splits", ".columns", ".args", ".parts", ".probes", ".tasks")
    local += (".chat_template_kwargs", ".loss_weights")
    local = [k for k in keys() if k.endswith(local) or (k.startswith("data.") and k.endswith(".revision"))]
    assert [k for k in keys() if not k.startswith(neutral) and k not in local and k not in covered] == []
    assert {"data.text.content.train", "data.text.splits.train"} <= covered
    assert {"evaluate.judge.args.cap", "evaluate.judge.source", "reward.gate.probes.empty"} <= covered
    assert {"ppo.reward.parts.brief.args.target", "ppo.reward.parts.brief.source"} <= covered


def text_source(file, content=None):
    if content is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    overrides = (f"data.text.path={file}", "data.text.format=text")
    return fingerprints(*overrides, names=["tokenizer"])["tokenizer"]


def test_data_counts_by_content_not_by_place(tmp_path):
    here = text_source(tmp_path / "a/rows.jsonl", '{"text": "one"}\n')
    assert text_source(tmp_path / "b/copy.jsonl", '{"text": "one"}\n') == here
    assert text_source(tmp_path / "c/rows.jsonl", '{"text": "One"}\n') != here


def test_every_file_of_a_folder_counts(tmp_path):
    one = text_source(tmp_path / "a/1.jsonl", '{"text": "one"}\n')
    assert text_source(tmp_path / "a") == one
    (tmp_path / "a/2.jsonl").write_text('{"text": "two"}\n')
    assert text_source(tmp_path / "a") != one


def test_given_splits_without_train_are_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="splits names test but not train"):
        text_source(tmp_path / "a/test.jsonl", "{}")
        fingerprints(
            f"data.text.path={tmp_path}/a",
            "data.text.format=text",
            "+data.text.splits.test=test.jsonl",
            names=["tokenizer"],
        )


def test_a_checkpoint_counts_by_content_not_by_place(tmp_path):
    def fingerprint(folder):
        config = compose(["experiment=smoke", "model=hf", f"model.checkpoint={folder}"])
        return chain.plan(config, ["tokenizer"])["tokenizer"].fingerprint

    first = tmp_path / "a"
    first.mkdir()
    (first / "config.json").write_text("{}")
    here = fingerprint(first)
    assert fingerprint(shutil.copytree(first, tmp_path / "b")) == here
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_text("{ }")
    assert fingerprint(tmp_path / "c") != here


def test_the_source_code_of_a_judge_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    override = "comparisons.judge.function=my_judge:score"

    def edited(code):
        (tmp_path / "my_judge.py").write_text(code)
        digests.file_digest.cache_clear()
        return fingerprints(override)

    first, second = edited("def score(**rows): return 1\n"), edited("def score(**rows): return 2\n")
    assert {name for name in ALL if first[name] != second[name]} == {"comparisons", "reward", "dpo", "ppo", "evaluate"}


@pytest.mark.parametrize(
    ("key", "value", "stage"),
    [
        ("comparisons.policies", "[{}]", "ppo"),
        ("comparisons.earlier", "[{}]", "comparisons"),
        ("comparisons.scorer", "{}", "reward"),
    ],
)
def test_an_artifact_of_another_run_counts_by_its_fingerprint(tmp_path, key, value, stage):
    for name, fingerprint in (("one", "aaa"), ("same", "aaa"), ("other", "bbb")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint, "stage": stage}))
    one, same, other = (
        fingerprints(f"{key}={value.format(tmp_path / name)}")["comparisons"] for name in ("one", "same", "other")
    )
    assert one == same != other and one != fingerprints()["comparisons"]
    with pytest.raises(UserError, match="is no finished stage; name its folder"):
        fingerprints(f"{key}={value.format(tmp_path / 'none')}")
    (tmp_path / "one" / "manifest.json").write_text('{"fingerprint": "aaa", "stage": "tokenizer"}')
    with pytest.raises(UserError, match=rf"{key}: .* was made by stage tokenizer; must be of .*{stage}"):
        fingerprints(f"{key}={value.format(tmp_path / 'one')}")


def test_an_earlier_policy_counts_by_its_fingerprint_and_by_the_name_that_results_give_it(tmp_path):
    def evaluated(run, fingerprint="aaa", stage="ppo"):
        folder = tmp_path / run / stage
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint, "stage": stage}))
        return fingerprints(f"evaluate.earlier=[{folder}]")["evaluate"]

    first = evaluated("one")
    assert len({first, evaluated("two"), evaluated("one", "bbb"), fingerprints()["evaluate"]}) == 4
    assert first == evaluated("one")
    with pytest.raises(UserError, match=r"evaluate\.earlier: .* was made by stage reward; must be of sft, dpo, ppo"):
        evaluated("one", stage="reward")


def test_the_limits_of_the_gate_are_hidden_from_the_stage_that_they_do_not_concern():
    config = compose(["experiment=smoke"])
    assert "gate" not in chain.view(config, "reward").reward and chain.view(config, "reward").reward.epochs == 1
    assert set(chain.view(config, "ppo").reward) == {"gate"}


def test_the_source_code_of_every_part_of_a_reward_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    parts = "{learned:{function:null},one:{function:'part_one:f'},two:{function:'part_two:f'}}"

    def edited(one, two):
        for name, code in (("one", one), ("two", two)):
            (tmp_path / f"part_{name}.py").write_text(f"def f(**rows): return {code}\n")
        digests.file_digest.cache_clear()
        return fingerprints(f"++ppo.reward.parts={parts}")

    first, second, third = edited(1, 1), edited(2, 1), edited(1, 2)
    assert len({first["ppo"], second["ppo"], third["ppo"]}) == 3
    assert {name for name in ALL if first[name] != third[name]} == {"ppo", "evaluate"}
    heavier = fingerprints(f"++ppo.reward.parts={parts}", "ppo.reward.parts.two.weight=2")
    assert heavier["ppo"] != third["ppo"]


def test_a_function_that_its_package_takes_from_a_module_of_its_own_counts_with_that_modules_source(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bundle" / "inner").mkdir(parents=True)
    (tmp_path / "bundle/__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .inner import good as nice\n"
    )
    (tmp_path / "bundle/inner/__init__.py").write_text("from .deep import *\nfrom .deep import good\n")
    (tmp_path / "bundle/inner/deep.py").write_text("def good(**rows): return 1\n")
    assert digests.defined_in("bundle:nice")[1] == tmp_path / "bundle/inner/deep.py"
    assert digests.defined_in("trl.rewards:think_format_reward")[1].name == "format_rewards.py"
    with pytest.raises(UserError, match=r"bundle defines no nic \(nearest: nice\)"):
        digests.defined_in("bundle:nic")


@pytest.mark.parametrize("function", ["rewards.sentimnt:vader", "rewards.sentiment", "nowhere.at.all:f"])
def test_a_judge_that_is_not_there_is_refused_before_any_work(function):
    with pytest.raises(UserError, match="no such reward function"):
        chain.plan(compose([f"evaluate.judge.function={function}"]))


def test_a_function_that_a_judge_module_lacks_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"rewards.sentiment defines no vadr \(nearest: vader\)"):
        chain.plan(compose(["evaluate.judge.function=rewards.sentiment:vadr"]))


def test_a_stage_sees_what_its_fingerprint_covers_and_no_more():
    config = composed()
    seen = chain.view(config, "ppo")
    assert seen.ppo == config.ppo and seen.data.replies == config.data.replies
    assert seen.runtime == config.runtime and seen.run == "smoke"
    for read in (lambda: seen.dpo, lambda: seen.reward.epochs, lambda: seen.data.preferences, lambda: seen.seed):
        with pytest.raises(ConfigAttributeError):
            read()
    model = chain.view(config, "tokenizer").model
    assert model.checkpoint is None
    with pytest.raises(ConfigAttributeError):
        _ = model.hidden_size


def test_the_reason_for_staleness_names_the_key_with_both_values_or_the_stale_parent():
    old, new = (chain.plan(composed(f"ppo.kl_coef={value}")) for value in (0.05, 0.2))
    assert chain.stale_reason({"parts": old["ppo"].parts}, new["ppo"]) == "ppo.kl_coef 0.05 → 0.2"
    assert chain.stale_reason({"parts": old["evaluate"].parts}, new["evaluate"]) == "ppo is stale"


def test_the_reason_names_all_keys_and_those_that_are_new_or_gone():
    artifact = Artifact(Path("runs"), "ppo", "abc")
    planned = chain.Planned("ppo", {"ppo.a": 1, "ppo.b": 2, "ppo.c": 3}, artifact)
    reason = chain.stale_reason({"parts": {"ppo.a": 1, "ppo.b": 5, "ppo.old": 4}}, planned)
    assert set(reason.split(", ")) == {"ppo.b 5 → 2", "ppo.c None → 3", "ppo.old 4 → None"}


def test_parents_stand_before_their_children():
    names = list(STAGES)
    assert tuple(names) == (*ALL[:-1], "frontier", "evaluate")  # what the chain itself has, and the frontier
    assert all(names.index(parent) < names.index(name) for name in names for parent in STAGES[name].parents)


@pytest.mark.parametrize(
    ("stage", "needed", "depending"),
    [
        ("tokenizer", ["tokenizer"], [*ALL[1:-1], "frontier", "evaluate"]),
        ("reward", ["tokenizer", "pretrain", "sft", "comparisons", "reward"], ["ppo", "frontier", "evaluate"]),
        ("dpo", ["tokenizer", "pretrain", "sft", "comparisons", "dpo"], ["evaluate"]),
        ("ppo", ["tokenizer", "pretrain", "sft", "comparisons", "reward", "ppo"], ["frontier", "evaluate"]),
        ("evaluate", list(ALL), []),
    ],
)
def test_needed_by_and_depending_on(stage, needed, depending):
    assert needed_by(stage, composed()) == needed
    assert depending_on(stage, composed()) == depending


RULE = "reward@ppo.reward=length"
PLAIN = "evaluate.models=[base,sft,dpo,ppo]"
NO_DPO = "evaluate.models=[base,sft,ppo]"


@pytest.mark.parametrize(
    ("overrides", "chain_without", "inputs"),
    [
        ([], set(), {"pretrain", "sft", "comparisons", "reward", "dpo", "ppo"}),
        ([RULE, PLAIN], {"reward"}, {"pretrain", "sft", "comparisons", "dpo", "ppo"}),
        ([NO_DPO], {"dpo"}, {"pretrain", "sft", "comparisons", "reward", "ppo"}),
        ([RULE, NO_DPO], {"comparisons", "reward", "dpo"}, {"pretrain", "sft", "ppo"}),
        (["evaluate.models=[dpo]"], {"reward", "ppo"}, {"sft", "comparisons", "dpo"}),
        (["evaluate.models=[base]"], {"comparisons", "reward", "dpo", "ppo"}, {"pretrain", "sft"}),
        (["evaluate.models=[sft,best_of_4]"], {"dpo", "ppo"}, {"sft", "comparisons", "reward"}),
        (["evaluate.models=[dpo_best_of_4]"], {"ppo"}, {"sft", "comparisons", "reward", "dpo"}),
        ([RULE, "evaluate.models=[ppo_majority_4]"], {"comparisons", "reward", "dpo"}, {"sft", "ppo"}),
    ],
)
def test_the_chain_holds_what_the_evaluation_needs(overrides, chain_without, inputs):
    config = composed(*overrides)
    assert needed_by(None, config) == [name for name in ALL if name not in chain_without]
    assert set(parents("evaluate", config)) == inputs
    assert list(chain.plan(config)) == needed_by(None, config)


def test_a_stage_that_the_chain_leaves_out_can_still_be_asked_for():
    config = composed(RULE, NO_DPO)
    assert needed_by("dpo", config) == ["tokenizer", "pretrain", "sft", "comparisons", "dpo"]
    assert depending_on("dpo", config) == [] and depending_on("reward", config) == ["frontier"]
    assert depending_on("sft", config) == ["comparisons", "reward", "dpo", "ppo", "frontier", "evaluate"]


def test_a_reward_with_a_learned_part_needs_the_reward_model_and_one_of_rules_does_not():
    assert parents("ppo", composed("reward@ppo.reward=learned_brief")) == ["sft", "reward"]
    assert parents("ppo", composed("reward@ppo.reward=composed")) == ["sft"]
    assert parents("ppo", composed(RULE)) == ["sft"] and parents("ppo", composed()) == ["sft", "reward"]


def test_a_rule_of_ppo_is_in_its_fingerprint_and_the_reward_model_is_not(tmp_path, monkeypatch):
    def fingerprint(*overrides):
        return fingerprints(RULE, *overrides, names=["tokenizer", "pretrain", "sft", "ppo"])["ppo"]

    assert fingerprint() == fingerprint("reward.epochs=2", "comparisons.min_gap=0.1")
    assert len({fingerprint(), fingerprint("ppo.reward.args.cap=50"), fingerprints()["ppo"]}) == 3
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for code in ("1", "2"):
        (tmp_path / "my_rule.py").write_text(f"def score(**rows): return {code}\n")
        digests.file_digest.cache_clear()
        found.add(fingerprint("ppo.reward.function=my_rule:score"))
    assert len(found) == 2
