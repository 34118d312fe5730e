"""Values of a configuration held to each other, and to what they name. Imports no torch."""

import datetime
import math
import os
import re

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.config.losses import check_dpo, check_whole
from threefold.config.names import JUDGES, REWARDS
from threefold.data.preferences import PREFERENCE_FORMATS
from threefold.errors import UserError, nearest
from threefold.evaluation import judge_template
from threefold.evaluation.players import MODELS, player, policy_name
from threefold.schema.config import SHARDED
from threefold.schema.stages import PROBES
from threefold.stages import STAGES
from threefold.tracking.trackers import KINDS

# parameters of sbatch that `cluster.parameters` may not hold: they have keys of their own, or Threefold sets them
SET_ELSEWHERE = (
    "partition", "account", "qos", "constraint", "nodes", "ntasks", "ntasks_per_node", "cpus_per_task", "gpus_per_node",
    "mem", "time", "signal", "requeue", "no_requeue", "dependency", "kill_on_invalid_dep", "array", "job_name",
    "output", "error", "open_mode",
)  # fmt: skip


def check_together(config: DictConfig) -> None:
    """Hold values to each other; raises `UserError` naming the key to change."""
    for source in ("text", "replies"):
        if config.data[source].path is None:
            raise UserError(f"data.{source}.path has no value: set it to a file, a folder or a name on the hub")
    preferences = config.data.preferences
    if preferences.path is not None and preferences.format not in PREFERENCE_FORMATS:
        choices = ", ".join(PREFERENCE_FORMATS)
        raise UserError(f"data.preferences.format={preferences.format}: holds no pairs; must be one of {choices}")
    _check_run(config.run.split("/"))
    if not config.runs.strip() or not config.runs.isprintable():
        raise UserError(f"runs={config.runs!r}: must be the path of a folder")
    for key in REWARDS:
        _check_reward(key, OmegaConf.select(config, key))
    for key in JUDGES:
        _check_judge(key, OmegaConf.select(config, key))
    _check_comparisons(config.comparisons, preferences.path is not None)
    _check_reward_model(config.reward)
    _check_players(config.evaluate)
    _check_frontier(config.frontier)
    _check_judge_model(config.evaluate.judge_model)
    player(config.chat.model, "chat.model")
    _check_launch(config.launch)
    for name, task in config.evaluate.tasks.items():
        _check_task(f"evaluate.tasks.{name}", task, config.model.max_position_embeddings)
    _check_ppo(config.ppo)
    _check_tracker(config.tracker)
    _check_date("tokenizer.template_date", config.tokenizer.template_date)
    check_dpo(config.dpo)
    _check_resources(config)
    least, most = config.data.dialogue.reply_min_chars, config.data.dialogue.reply_max_chars
    if None not in (least, most) and least > most:
        raise UserError(f"data.dialogue.reply_min_chars={least}: is above reply_max_chars")
    model = config.model
    if model.chat_template_kwargs and not model.checkpoint:
        raise UserError("model.chat_template_kwargs: is for the template of a checkpoint (model=hf); leave it empty")
    if model.max_position_embeddings:
        ptx = ["ppo.ptx_context"] if config.ppo.ptx_coef else []
        for key in ["pretrain.context", "sampling.max_new_tokens", *ptx]:
            if OmegaConf.select(config, key) > model.max_position_embeddings:
                raise UserError(f"{key}: is above model.max_position_embeddings={model.max_position_embeddings}")
    if model.hidden_size and not model.head_dim and model.hidden_size % (model.num_attention_heads or 1):
        raise UserError(f"model.num_attention_heads={model.num_attention_heads}: must divide model.hidden_size")
    if (model.num_attention_heads or 1) % (model.num_key_value_heads or 1):
        raise UserError(f"model.num_key_value_heads={model.num_key_value_heads}: must divide num_attention_heads")


def _check_date(key: str, value: str) -> None:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise UserError(f"{key}={value}: must be a date as YYYY-MM-DD")
    try:
        datetime.date.fromisoformat(value)
    except ValueError as error:
        raise UserError(f"{key}={value}: is no day of the calendar") from error


LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and files beside it have longer ones


def _check_run(names: list[str]) -> None:
    """The name of a run is that of a folder below `runs` which is neither the store nor within a stage of a run."""
    run = "/".join(names)
    if not run.isprintable() or max(len(os.fsencode(name)) for name in names) > LONGEST_NAME:
        raise UserError(f"run={run[:20]!r}…: must be a name of at most {LONGEST_NAME} bytes, without line breaks")
    if not all(name.strip(".") for name in names) or names[0] == "artifacts":
        raise UserError(f"run={run}: is the name of a folder below runs/; choose another")
    for depth, name in enumerate(names):
        if depth and name in STAGES:
            stage_of = "/".join(names[:depth])
            raise UserError(f"run={run}: {stage_of}/{name} is a stage of run {stage_of}; choose another name")


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
    _check_policies("comparisons.policies", comparisons.policies, ["sft"])
    replying = len(comparisons.policies) + comparisons.sft
    if not replying and not given:
        raise UserError("comparisons.sft=false: nobody replies; name comparisons.policies, or set it true")
    if comparisons.label_by == "order" and replying < 2 and not given:
        raise UserError("comparisons.label_by=order: one policy has no order; name comparisons.policies, weakest first")
    if given and comparisons.label_by != "judge":
        key = f"comparisons.label_by={comparisons.label_by}"
        raise UserError(f"{key}: data.preferences has labels already; set one of the two")
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

    A batch of pretrain and sft is filled up with rows without labels, which no loss counts
    (pipeline/execution/ranks.py), and PPO's loss is a sum over tokens; those of reward and dpo are means over equal
    numbers of pairs.
    """
    processes = config.launch.processes * config.launch.nodes
    untrained = () if config.pretrain.tokens else ("pretrain",)
    for stage in (name for name in stages if STAGES[name].several_processes and name not in untrained):
        if processes > 1:
            _check_share(config, stage, processes)
            _check_sharded(config, stage)
        if stage == "dpo":
            check_whole(config, processes)
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
    size, micro_batch_size = config[stage].batch_size, config.runtime.micro_batch_size
    share = math.ceil(size / processes)
    if micro_batch_size is not None and share % min(micro_batch_size, share):
        of = f", of which each of {processes} processes takes {share}" if processes > 1 else ""
        raise UserError(f"runtime.micro_batch_size={micro_batch_size}: must divide {stage}.batch_size={size}{of}")


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
    if stage == "dpo" and config.dpo.reference_sync_every is not None:
        raise UserError(
            f"dpo.reference_sync_every: launch.mode={mode} shares out the models, also one that moves; use launch=ddp"
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
            reason = "the learned reward model is for ppo.reward; choose a reward function, module:function"
            raise UserError(f"{key}.{place}function has no value: {reason}")
    for name, part in judge.parts.items():
        if part.normalise:
            raise UserError(f"{key}.parts.{name}.normalise: would give every model that is judged mean 0; is for PPO")


def _check_policies(key: str, folders: list[str], others: list[str]) -> None:
    """Policies of other runs are told apart by run and stage, from each other and from `others`."""
    names = [*others, *(policy_name(folder) for folder in folders)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{key}: two are called {twice}, by run and stage; name each once")


def _check_players(evaluate: DictConfig) -> None:
    if not evaluate.models:
        raise UserError(f"evaluate.models: is empty; name models of the chain: {', '.join(MODELS)}")
    players = [player(name, "evaluate.models") for name in evaluate.models]
    for i, name in enumerate(evaluate.models):
        if players[i] in players[:i]:
            raise UserError(f"evaluate.models: {name} is named twice (best_of_N is sft_best_of_N); name each once")
    _check_policies("evaluate.earlier", evaluate.earlier, ["human", *evaluate.models])


def _check_frontier(frontier: DictConfig) -> None:
    for n in frontier.best_of:
        if not 1 <= n <= frontier.samples:
            raise UserError(f"frontier.best_of: {n} must be from 1 to frontier.samples={frontier.samples}")
    if not any(n > 1 for n in frontier.best_of):
        raise UserError(f"frontier.best_of={list(frontier.best_of)}: needs at least one n above 1")
    for key in ("best_of", "seeds", "betas", "kl_coefs"):
        if len(set(frontier[key])) < len(frontier[key]):
            raise UserError(f"frontier.{key}={list(frontier[key])}: names one twice")
    if not frontier.seeds:
        raise UserError("frontier.seeds=[]: needs at least one, for example frontier.seeds=[1,2,3]")


def _check_judge_model(judge: DictConfig) -> None:
    if len(judge.verdicts) != 2 or judge.verdicts[0] == judge.verdicts[1]:
        raise UserError(f"evaluate.judge_model.verdicts={judge.verdicts}: must be two different words")
    judge_template.question(judge.template, tuple(judge.verdicts))


def _check_resources(config: DictConfig) -> None:
    """What the Slurm job of a stage asks for: time to work in before it is told to leave, and nodes it can use."""
    for name, resources in config.resources.stages.items():
        minutes, key = resources.minutes or config.resources.minutes, f"resources.stages.{name}"
        if minutes * 60 < 2 * config.launcher.signal_seconds:
            raise UserError(
                f"launcher.signal_seconds={config.launcher.signal_seconds}: is more than half of the time limit of "
                f"{name}, {minutes} min; set {key}.minutes higher, or this lower"
            )
        if not STAGES[name].several_processes and ((resources.nodes or 1) > 1 or (resources.gpus or 0) > 1):
            raise UserError(f"{key}: {name} runs in one process; leave its nodes and gpus at 1")
    for name in config.cluster.parameters:
        if name.replace("-", "_") in SET_ELSEWHERE:
            raise UserError(f"cluster.parameters.{name}: is set by other keys or Threefold itself; leave it out")


def _check_task(key: str, task: DictConfig, positions: int | None) -> None:
    """A source of problems that its check can read, in a split that it has."""
    if not re.fullmatch(r"[\w-]+", name := key.removeprefix("evaluate.tasks.")):
        raise UserError(f"evaluate.tasks: {name!r} is no name of letters, digits, - and _; choose another")
    if task.path is None:
        raise UserError(f"{key}.path has no value: set it to a file, a folder or a name on the hub")
    formats = ("ifeval",) if task.check == "instructions" else ("prompt_completion", "messages")
    if task.format not in formats:
        raise UserError(f"{key}.format={task.format}: {key}.check={task.check} reads {' or '.join(formats)}")
    if task.split == "all" and task.splits:
        raise UserError(f"{key}.split=all: its splits are kept apart; set split=test, or leave splits out")
    if task.max_new_tokens and positions and task.max_new_tokens >= positions:
        raise UserError(f"{key}.max_new_tokens={task.max_new_tokens}: leaves no room in {positions} positions")


def _check_tracker(tracker: DictConfig) -> None:
    for kind in tracker.kinds:
        if kind not in KINDS:
            raise UserError(f"tracker.kinds: {kind} must be one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if len(set(tracker.kinds)) < len(tracker.kinds):
        raise UserError(f"tracker.kinds={list(tracker.kinds)}: names one twice")
    if long := next((tag for tag in tracker.tags if not 1 <= len(tag) <= 64), None):
        raise UserError(f"tracker.tags: {long[:20]}… is longer than the 64 characters that W&B takes")
