"""How overrides become one checked configuration.

Nothing in this module imports torch, so that a wrong key is answered in a second.
"""

import math
import re
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

import rewards
from pipeline.errors import UserError, nearest
from pipeline.preference_formats import PREFERENCE_FORMATS
from pipeline.schema import PROBES, SHARDED, Config, RewardPartConfig
from stages import MODELS, STAGES

JUDGES = ("comparisons.judge", "evaluate.judge", "evaluate.second_judge")
REWARDS = (*JUDGES, "ppo.reward")  # keys that hold a choice of the group `reward`
GROUPS = ["model", "data", "tracker", "launch", "experiment", *(f"reward@{key}" for key in REWARDS)]


def compose(overrides: list[str]) -> DictConfig:
    """Compose `conf/` with `overrides` (Hydra's syntax), check it, and return it read-only.

    Raises `UserError`, one line, for an unknown key, group or choice, a wrong type, or a value outside its limits.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_module("conf", version_base="1.3"):
            config = hydra_compose("config", overrides=[_addable(override) for override in overrides])
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
    except Exception as error:  # Hydra answers some wrong overrides with errors of Python's own
        raise UserError(_explain(error, overrides)) from error
    if missing:
        raise UserError(f"{missing[0]} has no value: set it, for example {missing[0]}=VALUE")
    check(config, Config)
    check_together(config)
    OmegaConf.set_readonly(config, True)
    return config


def check(config: DictConfig, schema: type, prefix: str = "") -> None:
    """Hold every key and value below `config` to `schema` and its limits; raises `UserError` naming the key."""
    known = {entry.name: entry for entry in fields(schema)}
    for name in known:
        if name not in config:
            raise UserError(f"{prefix}{name} was deleted, but is needed; give it a value instead")
    for name in config:
        key = f"{prefix}{name}"
        if name not in known:
            raise UserError(f"{key} is not a configuration key{nearest(key, keys())}")
        value = config[name]
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            check(value, OmegaConf.get_type(value), f"{key}.")
        elif name == "parts":
            for part in value:
                check(value[part], RewardPartConfig, f"{key}.{part}.")
        elif value is not None:
            _check_value(key, value, known[name].metadata)


def _check_value(key: str, value: Any, limits: Any) -> None:
    choices, low, high = limits.get("choices"), limits.get("low"), limits.get("high")
    if choices and value not in choices:
        raise UserError(f"{key}={value}: must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: must be a finite number")
    if low is not None and value < low:
        raise UserError(f"{key}={value}: must be at least {low}")
    if high is not None and value > high:
        raise UserError(f"{key}={value}: must be at most {high}")


def check_together(config: DictConfig) -> None:
    """Hold values to each other; raises `UserError` naming the key to change."""
    for source in ("text", "replies"):
        if config.data[source].path is None:
            raise UserError(f"data.{source}.path has no value: set it to a file, a folder or a name on the hub")
    preferences = config.data.preferences
    if preferences.path is not None and preferences.format not in PREFERENCE_FORMATS:
        known = ", ".join(PREFERENCE_FORMATS)
        raise UserError(f"data.preferences.format={preferences.format}: holds no pairs; must be one of {known}")
    if config.run in ("", "artifacts") or "/" in config.run:
        raise UserError(f"run={config.run}: is the name of a folder below runs/; choose another without slashes")
    for key in REWARDS:
        _check_reward(key, OmegaConf.select(config, key))
    for key in JUDGES:
        _check_judge(key, OmegaConf.select(config, key))
    _check_comparisons(config.comparisons, preferences.path is not None)
    _check_reward_model(config.reward)
    _check_models(config.evaluate.models)
    _check_launch(config.launch)
    _check_ppo(config.ppo)
    if config.dpo.label_smoothing and config.dpo.loss_type != "robust":
        raise UserError(f"dpo.label_smoothing: dpo.loss_type={config.dpo.loss_type} has none; use loss_type=robust")
    if config.dpo.label_smoothing >= 0.5:
        raise UserError(f"dpo.label_smoothing={config.dpo.label_smoothing}: must be below 0.5")
    limits = config.data.dialogue
    if limits.reply_min_chars > limits.reply_max_chars:
        raise UserError(f"data.dialogue.reply_min_chars={limits.reply_min_chars}: is above reply_max_chars")
    model = config.model
    if model.max_position_embeddings:
        ptx = ["ppo.ptx_context"] if config.ppo.ptx_coef else []
        for key in ["pretrain.context", "sampling.max_new_tokens", *ptx]:
            if OmegaConf.select(config, key) > model.max_position_embeddings:
                raise UserError(f"{key}: is above model.max_position_embeddings={model.max_position_embeddings}")
    if model.hidden_size and not model.head_dim and model.hidden_size % (model.num_attention_heads or 1):
        raise UserError(f"model.num_attention_heads={model.num_attention_heads}: must divide model.hidden_size")
    if (model.num_attention_heads or 1) % (model.num_key_value_heads or 1):
        raise UserError(f"model.num_key_value_heads={model.num_key_value_heads}: must divide num_attention_heads")


def _check_reward_model(reward: DictConfig) -> None:
    for name, limit in reward.gate.probes.items():
        if name not in PROBES:
            raise UserError(f"reward.gate.probes: {name} must be one of {', '.join(PROBES)}{nearest(name, PROBES)}")
        if not 0 <= limit <= 1:
            raise UserError(f"reward.gate.probes.{name}={limit}: must be from 0 to 1")
    if reward.label_smoothing >= 0.5:
        raise UserError(f"reward.label_smoothing={reward.label_smoothing}: must be below 0.5")
    if reward.label_smoothing and reward.margin_coef:
        raise UserError(
            "reward.margin_coef: has no meaning for labels that may be wrong; set it or label_smoothing to 0"
        )
    if reward.ensemble == 1 and reward.combine != "mean":
        raise UserError(f"reward.combine={reward.combine}: reward.ensemble=1 has nothing to combine; set 2 or more")


def _check_comparisons(comparisons: DictConfig, given: bool) -> None:
    names = ["sft", *("/".join(folder.rstrip("/").split("/")[-2:]) for folder in comparisons.policies)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"comparisons.policies: two are called {twice}, by run and stage; name each once")
    if given and comparisons.label_by == "people":
        raise UserError("comparisons.label_by=people: data.preferences has labels already; set one of the two")
    if comparisons.pairing == "uncertain" and comparisons.scorer is None:
        raise UserError("comparisons.pairing=uncertain: needs comparisons.scorer, a reward model with several members")
    if comparisons.pairing == "random" and comparisons.scorer is not None:
        raise UserError("comparisons.scorer: comparisons.pairing=random does not use it; leave it null")
    unguided = comparisons.pairing == "best_worst" and comparisons.scorer is None
    if comparisons.label_by == "people" and unguided:
        raise UserError(
            "comparisons.pairing=best_worst: with comparisons.label_by=people no judge says what is best; "
            "set comparisons.scorer, or pairing=random"
        )
    if comparisons.label_by == "people" and comparisons.label_noise:
        raise UserError("comparisons.label_noise: is for labels of the judge; with label_by=people leave it 0")


def _check_launch(launch: DictConfig) -> None:
    processes = launch.processes * launch.nodes
    if launch.mode == "single" and processes > 1:
        raise UserError(f"launch.mode=single: is one process, and {processes} are asked for; use launch=ddp")
    if launch.mode in SHARDED and processes == 1:
        raise UserError(f"launch.mode={launch.mode}: shares a model among processes; set launch.processes to 2 or more")
    if launch.node_rank >= launch.nodes:
        raise UserError(f"launch.node_rank={launch.node_rank}: must be below launch.nodes={launch.nodes}")


def check_shares(config: DictConfig, stages: list[str]) -> None:
    """Hold the batches of the training stages among `stages` to the processes that share them; raises `UserError`.

    A batch of pretrain and sft is filled up with rows without labels, which no loss counts (pipeline/ranks.py), and
    PPO's loss is a sum over tokens; those of reward and dpo are means over equal numbers of pairs.
    """
    processes = config.launch.processes * config.launch.nodes
    untrained = () if config.pretrain.tokens else ("pretrain",)
    for stage in (name for name in stages if STAGES[name].several_processes and name not in untrained):
        if processes > 1:
            _check_share(config, stage, processes)
            _check_sharded(config, stage)
        if stage != "ppo":
            _check_micro_batch(config, stage, processes)


def _check_share(config: DictConfig, stage: str, processes: int) -> None:
    size, nodes = config[stage].batch_size, config.launch.nodes
    given = f"launch.processes={config.launch.processes}" + (f" on launch.nodes={nodes}" if nodes > 1 else "")
    if stage in ("reward", "dpo") and size % processes:
        raise UserError(f"{given}: must divide {stage}.batch_size={size}, for each process takes as many pairs")
    if stage == "ppo" and processes > size:
        raise UserError(f"{given}: is above ppo.batch_size={size}")


def _check_micro_batch(config: DictConfig, stage: str, processes: int) -> None:
    size, micro = config[stage].batch_size, config.runtime.micro_batch_size
    share = math.ceil(size / processes)
    if micro is not None and share % min(micro, share):
        of = f", of which each of {processes} processes takes {share}" if processes > 1 else ""
        raise UserError(f"runtime.micro_batch_size={micro}: must divide {stage}.batch_size={size}{of}")


def _check_sharded(config: DictConfig, stage: str) -> None:
    """What cannot be shared out among processes that hold a part of the model each."""
    mode = config.launch.mode
    if mode not in SHARDED:
        return
    if stage == "ppo":
        raise UserError(
            f"launch.mode={mode}: does not share out PPO's models, which sample as well; make what comes before it "
            "with target=reward, and then ppo with launch=ddp (ppo.lora_rank lets its models share one)"
        )
    if stage == "pretrain" and mode == "deepspeed_zero3":
        raise UserError(
            "launch.mode=deepspeed_zero3: cuts up the matrices that pretrain's Muon needs whole; use launch=fsdp2"
        )
    if stage == "reward" and config.reward.lora_rank is not None:
        raise UserError(f"reward.lora_rank: launch.mode={mode} shares out whole models; use launch=ddp, or set it null")


def _check_ppo(ppo: DictConfig) -> None:
    if ppo.batch_size % ppo.minibatches:
        raise UserError(f"ppo.minibatches={ppo.minibatches}: must divide ppo.batch_size={ppo.batch_size}")
    if ppo.batch_size % ppo.samples_per_prompt:
        raise UserError(f"ppo.samples_per_prompt={ppo.samples_per_prompt}: must divide ppo.batch_size")
    if ppo.advantage in ("rloo", "grpo") and ppo.samples_per_prompt < 2:
        raise UserError(f"ppo.samples_per_prompt: ppo.advantage={ppo.advantage} compares replies; set 2 or more")
    if ppo.critic_warmup and ppo.advantage != "gae":
        raise UserError(f"ppo.critic_warmup: ppo.advantage={ppo.advantage} has no critic; leave it 0")
    if ppo.whiten_rewards and ppo.advantage in ("rloo", "grpo"):
        raise UserError(f"ppo.whiten_rewards: would pay {ppo.advantage} for length; leave it false")
    if ppo.kl_controller == "adaptive" and ppo.kl_target == 0:
        raise UserError("ppo.kl_target=0: the adaptive controller needs a KL above 0 to aim at")
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        raise UserError("ppo.kl_estimator=k1: has a gradient of mean zero as a loss; with ppo.kl_in=loss use k2 or k3")


def _check_reward(key: str, reward: DictConfig) -> None:
    """One function or parts; arguments only where they reach a function; parts that can be added up."""
    if reward.parts and reward.function is not None:
        raise UserError(f"{key}.function={reward.function}: {key}.parts are given as well; leave out one of the two")
    for place, function in {"": reward.function, **rewards.functions(reward)}.items():
        given = OmegaConf.select(reward, place.rstrip(".")) if place else reward
        unused = [name for name in ("args", "columns", "messages") if given[name] and function is None]
        if unused:
            raise UserError(f"{key}.{place}{unused[0]}: is for a function, and {key}.{place}function is null")
    for name, part in reward.parts.items():
        _check_part(f"{key}.parts.{name}", part, list(reward.parts)[: list(reward.parts).index(name)], reward.parts)


def _check_part(key: str, part: DictConfig, above: list[str], parts: DictConfig) -> None:
    if part.clip is not None and (len(part.clip) != 2 or not -math.inf < part.clip[0] < part.clip[1] < math.inf):
        raise UserError(f"{key}.clip={part.clip}: must be [low, high] with low below high")
    for other, least in part.needs.items():
        if other not in parts:
            raise UserError(f"{key}.needs: {other} is no part of this reward{nearest(other, parts)}")
        if other not in above:
            raise UserError(f"{key}.needs: {other} must stand above the part that needs it")
        if not math.isfinite(least):
            raise UserError(f"{key}.needs.{other}={least}: must be a finite number, the least score that passes")


def _check_judge(key: str, judge: DictConfig) -> None:
    """A judge needs no reward model, and compares replies of different batches."""
    for place, function in rewards.functions(judge).items():
        if function is None:
            said = "the learned reward model is for ppo.reward; choose a reward function, module:function"
            raise UserError(f"{key}.{place}function has no value: {said}")
    for name, part in judge.parts.items():
        if part.normalise:
            raise UserError(f"{key}.parts.{name}.normalise: would give every model that is judged mean 0; is for PPO")


def _check_models(models: list[str]) -> None:
    if not models:
        raise UserError(f"evaluate.models: is empty; name models of the chain: {', '.join(MODELS)}")
    for name in models:
        if name not in MODELS:
            raise UserError(f"evaluate.models: {name} must be one of {', '.join(MODELS)}{nearest(name, MODELS)}")


def _addable(override: str) -> str:
    """An override that gives a mapping to a key that holds one adds its entries, as people expect of columns={a: b}."""
    key, _, value = override.partition("=")
    return f"++{override.lstrip('+')}" if value.startswith("{") and key.split(".")[-1] in MAPPINGS else override


MAPPINGS = ("columns", "splits", "args", "parts", "needs", "probes")


def keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration with its dots, as overrides spell it."""
    found = []
    for entry in fields(schema):
        nested = _dataclass_of(entry.type)
        found += keys(nested, f"{prefix}{entry.name}.") if nested else [prefix + entry.name]
    return found


def _dataclass_of(kind: Any) -> type | None:
    return kind if is_dataclass(kind) else None


def _keys_of_part(key: str) -> list[str]:
    """Keys of a part of a reward that stand beside `key`, if that is one which parts do not have."""
    part, _, name = key.rpartition(".")
    known = [entry.name for entry in fields(RewardPartConfig)]
    return [f"{part}.{entry}" for entry in known] if ".parts." in part and name not in known else []


def _explain(error: BaseException, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's errors on one line, with the nearest existing name."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        text = f"{error}\n{text}"
    unknown_key = re.search(r"Key '(.+?)' (?:is not in struct|not in '\w+')", text)
    unknown_choice = re.search(
        r"Could not find '(.+?)/([^/]+?)'.*?Available options.*?:\n(.+?)(?:\nConfig|$)", text, re.S
    )
    unknown_group = re.search(r"Could not override '(.+?)'", text)
    full_key = re.search(r"full_key: (\S+)", text)
    if unknown_choice:
        group, choice, options = unknown_choice[1], unknown_choice[2], unknown_choice[3].split()
        return f"{group}={choice}: no such choice{nearest(choice, options)}; there are {', '.join(options)}"
    if unknown_key or unknown_group:
        name = (full_key or unknown_key or unknown_group)[1]
        name = next(
            (o.partition("=")[0].lstrip("+~") for o in overrides if re.match(rf"[+~]*{re.escape(name)}\b", o)), name
        )
        return f"{name} is not a configuration key{nearest(name, GROUPS + keys() + _keys_of_part(name))}"
    if full_key:
        return f"{full_key[1]}: {text.splitlines()[0]}"
    message = " ".join(text.split()).split(" See https://hydra")[0]
    return (
        f"{' '.join(overrides)}: {message}" if not any(o.partition("=")[0] in message for o in overrides) else message
    )
