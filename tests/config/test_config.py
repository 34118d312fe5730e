"""The configuration: every choice composes, every key is documented and read, every mistake is answered on one line."""

import re
import shutil
from pathlib import Path

import hydra
import pytest
import yaml
from hydra import initialize_config_module
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

from threefold import conf
from threefold.config.checks import JUDGES
from threefold.config.compose import Config, _merged, check, check_file_texts, compose
from threefold.config.names import keys
from threefold.errors import UserError
from threefold.stages import STAGES

ROOT = Path(__file__).parents[2]
CONF = Path(conf.__file__).parent
FILES = sorted(file.relative_to(CONF) for file in CONF.rglob("*.yaml"))
REQUIRED = {"hf": ["model.checkpoint=somewhere"]}


def leaves(node, path=""):
    """Dotted path → value; a dictionary that is empty or a value itself (columns, splits, args …) is a leaf."""
    values = ("columns", "splits", "args", "needs", "probes")
    if not node or not isinstance(node, dict) or path.rsplit(".", 1)[-1] in values:
        return {path: node}
    return {k: v for name in node for k, v in leaves(node[name], f"{path}.{name}".lstrip(".")).items()}


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name not in ("", "section", "stage")], ids=str)
def test_every_choice_composes_to_what_its_file_says(file):
    group = file.parent.name
    places = (group,)
    if group == "reward":
        places = ("ppo.reward",) if file.stem in ("model", "learned_brief") else ("ppo.reward", *JUDGES)
    overrides = [f"{group}={file.stem}" if place == group else f"{group}@{place}={file.stem}" for place in places]
    composed = leaves(OmegaConf.to_container(compose([*overrides, *REQUIRED.get(file.stem, [])])))
    written = yaml.safe_load((CONF / file).read_text())
    written.pop("defaults", None)
    for place in places:
        below = {"experiment": "", "tasks": "evaluate.tasks."}.get(group, f"{place}.")
        for key, value in leaves(written).items():
            if value != "???" and "${" not in str(value):
                assert composed[below + key] == value, key


def test_every_file_of_a_stage_or_section_is_part_of_every_run():
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    listed = {group: names for entry in defaults if isinstance(entry, dict) for group, names in entry.items()}
    assert listed["stage"] == list(STAGES)
    assert sorted(listed["section"]) == sorted(file.stem for file in FILES if file.parent.name == "section")


def test_keys_are_exactly_those_of_the_composed_configuration():
    assert sorted(leaves(OmegaConf.to_container(compose(["data=hh"])))) == sorted(keys())


def key_lines(file):
    """(dotted key, whether the line above is a comment) for each line of a YAML file that starts with a key."""
    path, above = [], ""
    for line in (CONF / file).read_text().splitlines():
        if found := re.match(r"( *)(\w+):", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            yield ".".join(path), above.strip().startswith("#")
        above = line


DOCUMENTED = [f for f in FILES if f.parent.name != "experiment"]


@pytest.mark.parametrize("file", DOCUMENTED, ids=str)
def test_every_key_has_a_comment(file):
    # sources of data files, model files and parts of rewards have the same keys: said once in the group is enough
    said_elsewhere = set()
    if file.parent.name in ("data", "model", "reward"):
        siblings = [f for f in FILES if f.parent == file.parent]
        said_elsewhere = {key.rsplit(".", 1)[-1] for f in siblings for key, said in key_lines(f) if said}
    hydras_own = ("defaults", "hydra")
    silent = [
        key
        for key, said in key_lines(file)
        if not said and key.rsplit(".", 1)[-1] not in said_elsewhere and key.split(".")[0] not in hydras_own
    ]
    assert silent == []


def test_every_data_source_and_group_of_the_data_files_has_its_own_comment():
    for file in (f for f in FILES if f.parent.name == "data"):
        assert [key for key, said in key_lines(file) if "." not in key and not said and key != "defaults"] == []


def reading(name, *files):
    return [file.name for file in files if re.search(rf"\.{name}\b|[\"']{name}[\"']", file.read_text())]


SOURCES = [
    f
    for room in ("pipeline", "stages", "rewards")
    for f in (ROOT / room).rglob("*.py")
    if f.name not in ("compose.py", "checks.py", "names.py", "arguments.py") and f.parent.name != "schema"
]


# modules that take a stage's section of the configuration
PARTS = {
    "ppo": ["training/guards.py", "ppo/actors.py", "ppo/advantages.py", "ppo/actors.py"],
    "frontier": ["runs/frontier.py"],
    "evaluate": ["evaluation/measuring.py"],
    "reward": ["training/hf_trainer.py"],
    "dpo": ["training/hf_trainer.py"],
}


@pytest.mark.parametrize("key", keys())
def test_every_key_is_read(key):
    section, _, name = key.rpartition(".")
    stage = ROOT / "stages" / f"{section}.py"
    parts = [ROOT / "pipeline" / part for part in PARTS.get(section, [])]
    assert reading(name, stage, *parts) if stage.exists() else reading(name, *SOURCES)


@pytest.mark.parametrize("key", [key for key in keys() if key.startswith(("runtime.", "tracker."))])
def test_every_runtime_and_tracker_key_is_read_from_its_section(key):
    assert any(re.search(rf"\b{re.escape(key)}\b", file.read_text()) for file in SOURCES)


MISTAKES = [
    ("ppo.kl_cof=1", "ppo.kl_cof", "nearest: ppo.kl_coef"),
    ("kl_coef=1", "kl_coef", "nearest: ppo.kl_coef"),
    ("modle=tiny", "modle", "nearest: model"),
    ("data.text.formt=text", "data.text.formt", "nearest: data.text.format"),
    ("comparisons.judge.funtion=a:b", "comparisons.judge.funtion", "nearest: comparisons.judge.function"),
    ("reward@evaluate.jugde=vader", "reward@evaluate.jugde", "nearest: reward@evaluate.judge"),
    ("+new.key=1", "new", "not a configuration key"),
    ("model=tyny", "model=tyny", "nearest: tiny"),
    ("experiment=dmo", "experiment=dmo", "nearest: demo"),
    ("runtime=slow", "runtime=slow", "default"),
    ("reward@comparisons.judge=vadr", "reward=vadr", "nearest: vader"),
    ("ppo.kl_coef=high", "ppo.kl_coef=high", "must be a number"),
    ("ppo.seed=1.5", "ppo.seed=1.5", "must be a whole number"),
    ("seed=1e3", "seed=1e3", "must be a whole number"),
    ("ppo.kl_coef=true", "ppo.kl_coef=true", "must be a number"),
    ("ppo.kl_coef=0,1", "ppo.kl_coef=0,1", "write 0.1 with a decimal point"),
    ("tracker.kinds=wandb", "tracker.kinds=wandb", "is a list; write tracker.kinds=[wandb]"),
    ("comparisons.policies=runs/x/ppo", "comparisons.policies", "is a list; write comparisons.policies=[runs/x/ppo]"),
    ("frontier.seeds=1", "frontier.seeds=1", "is a list; write frontier.seeds=[1]"),
    ("evaluate.earlier=~/x", "evaluate.earlier", "is a list; write evaluate.earlier=[~/x]"),
    (
        "data.text.columns=text:body",
        "data.text.columns=text:body",
        "is a mapping; write data.text.columns={NAME: VALUE}",
    ),
    (
        "model.chat_template_kwargs={enable_thinking: false}",
        "model.chat_template_kwargs",
        "is for the template of a checkpoint (model=hf)",
    ),
    (
        "data.text.columns={1e5: text}",
        "data.text.columns={1e5: text}",
        "the name 1e5 is read as a number or truth value",
    ),
    ("evaluate.tasks={1: {path: x}}", "evaluate.tasks={1: {path: x}}", "the name 1 is read as a number or truth value"),
    (
        "evaluate.tasks={n: {path: x, columns: {true: b}}}",
        "evaluate.tasks=",
        "the name true is read as a number or truth value",
    ),
    ("+run=5", "+run", "run has a value already; write it without the +"),
    ("runs=", "runs=", "must be the path of a folder"),
    ("runs='a\nb'", "runs=", "must be the path of a folder"),
    (f"run={'x' * 300}", "run=", "at most 200 bytes"),
    (f"run=a/{'雨' * 70}", "run=", "at most 200 bytes"),
    ("run=a\nb", "run=", "without line breaks"),
    ("run='a\x1b[31m'", "run=", "without line breaks"),
    ("runs=~nobody-of-this-name/x", "runs=~nobody-of-this-name/x", "there is no such user"),
    ("dependents=maybe", "dependents=maybe", "must be true or false"),
    ("evaluate.judge=textblob", "evaluate.judge=textblob", "choose one with reward@evaluate.judge=NAME"),
    ("ppo.kl_coef=-0.1", "ppo.kl_coef=-0.1", "at least 0"),
    ("ppo.gamma=1.01", "ppo.gamma=1.01", "at most 1"),
    ("comparisons.label_noise=0.6", "comparisons.label_noise=0.6", "at most 0.5"),
    ("ppo.kl_estimator=k4", "ppo.kl_estimator=k4", "one of k1, k2, k3"),
    ("evaluate.models=[base,pppo]", "evaluate.models", "pppo must be one of base, sft, dpo, ppo, or one of these with"),
    ("evaluate.models=[pppo]", "evaluate.models", "(nearest: ppo)"),
    ("evaluate.models=[sft,ppo_majorty_8]", "evaluate.models", "(nearest: ppo_majority_8)"),
    (
        "evaluate.models=[best_of_1]",
        "evaluate.models",
        "best_of_1 has nothing to choose from; give it 2",
    ),
    ("evaluate.models=[ppo_majority_08]", "evaluate.models", "ppo_majority_08 must be one of"),
    ("evaluate.models=[best_of_8,sft_best_of_8]", "evaluate.models", "sft_best_of_8 is named twice"),
    ("evaluate.earlier=[a/one/ppo,b/one/ppo]", "evaluate.earlier", "two are called one/ppo"),
    ("evaluate.earlier=[ppo]", "evaluate.earlier", "two are called ppo"),
    ("evaluate.best_of=16", "evaluate.best_of", "not a configuration key"),
    ("tokenizer.template_date=tomorrow", "tokenizer.template_date=tomorrow", "must be a date as YYYY-MM-DD"),
    ("tokenizer.template_date=20260101", "tokenizer.template_date=20260101", "must be a date as YYYY-MM-DD"),
    ("tokenizer.template_date=2026-02-30", "tokenizer.template_date=2026-02-30", "no day of the calendar"),
    ("chat.model=pp0", "chat.model", "pp0 must be one of base, sft, dpo, ppo"),
    ("evaluate.models=[]", "evaluate.models", "is empty"),
    ("evaluate.models=sft", "evaluate.models=sft", "is a list; write evaluate.models=[sft]"),
    ("evaluate.models=null", "evaluate.models", ""),
    ("precision=fp16", "precision=fp16", "nearest: bf16"),
    ("runtime.device=gpu", "runtime.device=gpu", "auto, cpu, cuda"),
    ("data.replies.format=message", "data.replies.format=message", "nearest: messages"),
    ("model=hf", "model.checkpoint", "has no value"),
    ("run=???", "run", "has no value"),
    ("ppo.kl_coef", "ppo.kl_coef", "are written KEY=VALUE"),
    (
        "ppo.kl_coef=1,2",
        "ppo.kl_coef=1,2",
        "several values; write 1.2 with a decimal point; a run for each is made by: threefold",
    ),
    ("ppo.kl_coef=choice(1,2)", "ppo.kl_coef=choice(1,2)", "made by: threefold sweep 'ppo.kl_coef=choice(1,2)'"),
    ("model=tiny,gpt2", "model=tiny,gpt2", "made by: threefold sweep model=tiny,gpt2"),
    ("precision=fp32,bf16", "precision=fp32,bf16", "made by: threefold sweep precision=fp32,bf16"),
    ("evaluate.models=sft,ppo", "evaluate.models", "is a list; write evaluate.models=[sft,ppo]"),
    ("data.text.splits={a: b=c}", "data.text.splits={a: b=c}", "cannot be read; put each text"),
    ("ppo.kl_coef=~3", "ppo.kl_coef=~3", "cannot be read; put each text"),
    ("ppo.kl_coef=${seeed}", "seeed", "not found"),
    ("ppo.kl_coef=[", "ppo.kl_coef", ""),
    ("pppo.kl_coef=1", "pppo.kl_coef", "nearest: ppo.kl_coef"),
    ("~ppo", "ppo", ""),
    ("ppo.kl_coef=nan", "ppo.kl_coef=nan", ""),
    ("ppo.reward.parts.a.weight=1", "ppo.reward.parts.a.weight", "not a configuration key"),
    ("ppo.reward.parts={a:{weight:1}}", "ppo.reward.parts.a.function", "has no value"),
    ("ppo.reward.parts={a:{function:null,weight:high}}", "ppo.reward.parts.a.weight=high", "must be a number"),
    (
        "ppo.reward.parts={a:{function:null,wieght:1}}",
        "ppo.reward.parts.a.wieght",
        "nearest: ppo.reward.parts.a.weight",
    ),
    ("ppo.reward.parts={a:{function:null,weight:inf}}", "ppo.reward.parts.a.weight=inf", "finite"),
    ("ppo.reward.parts={a:{function:null,clip:[1,-1]}}", "ppo.reward.parts.a.clip=[1.0, -1.0]", "low below high"),
    ("ppo.reward.parts={a:{function:null,clip:[1]}}", "ppo.reward.parts.a.clip", "[low, high]"),
    ("ppo.reward.parts={a:{function:null,clip:[0,nan]}}", "ppo.reward.parts.a.clip", "low below high"),
    ("ppo.reward.parts={a:{function:null},b:{function:null,needs:{aa:1}}}", "ppo.reward.parts.b.needs", "nearest: a"),
    ("ppo.reward.parts={a:{function:null,needs:{b:1}},b:{function:null}}", "ppo.reward.parts.a.needs: b", "above"),
    ("ppo.reward.parts={a:{function:null,needs:{a:1}}}", "ppo.reward.parts.a.needs: a", "above"),
    ("ppo.reward.parts={a:{function:null},b:{function:null,needs:{a:nan}}}", "parts.b.needs.a=nan", "finite"),
    ("ppo.reward.parts={a:{function:null,args:{x:1}}}", "ppo.reward.parts.a.args", "function is null"),
    ("ppo.reward.args={x:1}", "ppo.reward.args", "function is null"),
    ("ppo.reward.messages=true", "ppo.reward.messages", "function is null"),
    ("evaluate.judge.parts={a:{function:null}}", "evaluate.judge.function", "parts are given as well"),
    ("reward@comparisons.judge=model", "comparisons.judge.function", "for ppo.reward"),
    ("reward@evaluate.judge=learned_brief", "evaluate.judge.parts.quality.function", "for ppo.reward"),
    *(
        (override, name, "")
        for override, name in (
            ("model=null", "model"),
            ("experiment=null", "experiment"),
            ("tracker=3", "tracker"),
            ("dpo.label_smoothing=0.1", "dpo.label_smoothing"),
            ("ppo.samples_per_prompt=3", "ppo.samples_per_prompt"),
            ("ppo.advantage=rloo", "ppo.samples_per_prompt"),
            ("ppo.kl_in=loss", "ppo.kl_estimator"),
            ("run=artifacts", "run"),
            ("run=../b", "run"),
            ("ppo.minibatches=3", "ppo.minibatches"),
            ("pretrain.context=1024", "pretrain.context"),
            ("model.num_key_value_heads=3", "model.num_key_value_heads"),
            ("data.dialogue.reply_min_chars=300", "data.dialogue.reply_min_chars"),
            ("data.text.path=null", "data.text.path"),
        )
    ),
]


@pytest.mark.parametrize(("override", "name", "hint"), MISTAKES)
def test_a_mistake_is_answered_on_one_line_that_names_the_key(override, name, hint):
    with pytest.raises(UserError) as caught:
        compose([override])
    said = str(caught.value)
    assert name in said and hint in said
    assert "\n" not in said and len(said) < 300 and "multirun" not in said


NUMBERS = {
    "run: 2026_11_28": "run is a text, and YAML reads it as the number 20261128",
    "model: {revision: 3e7}": "model.revision is a text, and YAML reads it as the number 30000000.0",
    "data: {text: {splits: {train: 007}}}": "data.text.splits.train is a text",
    "tracker:\n  tags: [a, 1.50]": "tracker.tags.1 is a text, and YAML reads it as the number 1.5",
}


@pytest.mark.parametrize(("content", "message"), NUMBERS.items())
def test_a_text_that_yaml_reads_as_a_number_is_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(conf, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/demo.yaml").write_text(f"# @package _global_\n{content}\nseed: 1_000\n")
    with pytest.raises(UserError, match=rf"/experiment/demo\.yaml: {message}.*; put it in quotes$"):
        compose([])


def test_so_is_one_in_a_file_of_another_group(tmp_path, monkeypatch):
    monkeypatch.setattr(conf, "__file__", str(tmp_path / "__init__.py"))
    for group, text in {"model": "revision: 'v1'\nhidden_size: 3e1", "reward": "function: 12"}.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    check_file_texts({"model": "mine", "tasks": []})
    with pytest.raises(UserError, match=r"reward/mine\.yaml: ppo\.reward\.function is a text"):
        check_file_texts({"model": "mine", "reward@ppo.reward": "mine"})


SAME_AS_HYDRAS = [
    ["experiment=smoke", "ppo.kl_coef=0.1", "run=x"],
    ["ppo.kl_coef=0.1", "data=hh", "model=llama_125m", "model.hidden_size=64", "experiment=finegrained"],
    ["reward@evaluate.judge=length", "evaluate.judge.args={cap: 50}", "tasks=[letters]", "~evaluate.tasks.letters"],
    ["model=llama_1b", "++evaluate.tasks={mine: {path: a.jsonl}}", "pretrain.seed=${seed}", "+ppo.reward.args={a: 1}"],
]


@pytest.mark.parametrize("overrides", SAME_AS_HYDRAS, ids=lambda overrides: overrides[0])
def test_files_kept_in_memory_compose_to_what_hydra_makes_of_all_overrides_at_once(overrides):
    compose([])  # Hydra knows the schema from then on
    with initialize_config_module("threefold.conf", version_base="1.3"):
        reference = hydra.compose("config", overrides=overrides)
    for _ in range(2):
        merged, _ = _merged(overrides, [])
        assert OmegaConf.to_yaml(merged) == OmegaConf.to_yaml(reference)
        assert OmegaConf.get_type(merged.ppo) is OmegaConf.get_type(reference.ppo) and OmegaConf.is_struct(merged)


def test_a_file_that_has_changed_since_the_last_composition_is_read_again(tmp_path, monkeypatch):
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(conf, "__file__", str(tmp_path / "conf/__init__.py"))
    compose([])
    (tmp_path / "conf/experiment/demo.yaml").write_text("# @package _global_\nrun: 2026_11_28\n")
    with pytest.raises(UserError, match="run is a text"):
        compose([])


def test_a_judge_of_parts_is_not_normalised():
    with pytest.raises(UserError, match=r"^evaluate\.judge\.parts\.sentiment\.normalise: would give every model"):
        compose(["reward@evaluate.judge=composed", "evaluate.judge.parts.sentiment.normalise=true"])


def test_limits_are_inclusive():
    limits = {
        "ppo.gamma": 1,
        "ppo.gae_lambda": 0,
        "ppo.kl_coef": 0,
        "comparisons.label_noise": 0.5,
        "sft.batch_size": 1,
    }
    config = compose([f"{key}={value}" for key, value in limits.items()])
    assert {key: OmegaConf.select(config, key) for key in limits} == limits


def test_check_names_a_key_that_the_schema_lacks():
    with pytest.raises(UserError, match=r"sead is not a configuration key \(nearest: seed\)"):
        check(DictConfig({**compose([]), "sead": 1}), Config)


def test_a_mapping_can_be_given_to_a_source_or_judge():
    config = compose(["data.replies.columns={prompt: question}", "evaluate.judge.args={cap: 3}"])
    assert config.data.replies.columns == {"prompt": "question"} and config.evaluate.judge.args == {"cap": 3}
    assert compose(["data.preferences.path=pairs.jsonl"]).data.preferences.format == "preference"


def test_the_seed_reaches_every_stage_and_a_stage_can_have_its_own():
    config = compose(["seed=7", "ppo.seed=9"])
    seeds = {name: config[name].seed for name in STAGES if "seed" in config[name]}
    assert seeds.pop("ppo") == 9
    assert set(seeds) == {"pretrain", "sft", "comparisons", "reward", "dpo", "frontier", "evaluate"}
    assert set(seeds.values()) == {7}


def test_a_value_on_the_command_line_wins_over_the_experiment():
    assert compose(["experiment=smoke"]).ppo.episodes == 64
    assert compose(["experiment=smoke", "ppo.episodes=32"]).ppo.episodes == 32


def test_a_judge_can_be_exchanged_in_one_place_alone():
    config = compose(["reward@evaluate.judge=length", "evaluate.judge.args.cap=50"])
    assert config.evaluate.judge.function == "rewards.length:length" and config.evaluate.judge.args == {"cap": 50}
    assert config.comparisons.judge.function == "rewards.sentiment:vader"


def test_a_composed_configuration_cannot_be_changed():
    with pytest.raises(ReadonlyConfigError):
        compose([]).ppo.kl_coef = 1.0


def test_the_preference_data_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", "/elsewhere")
    config = compose(["experiment=hh"])
    assert {config.data[name].path for name in ("text", "replies", "preferences")} == {"/elsewhere/hh-rlhf"}
