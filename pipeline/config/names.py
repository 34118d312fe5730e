"""The names of keys, groups and choices: all that there are, the nearest to a wrong one, and what a shell completes.

Nothing here imports Hydra or torch, so that a shell completes at once.
"""

import difflib
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import threefold.conf
from threefold.errors import UserError, nearest
from threefold.schema.config import Config

CONF = Path(threefold.conf.__file__).parent
JUDGES = ("comparisons.judge", "evaluate.judge", "evaluate.second_judge")
REWARDS = (*JUDGES, "ppo.reward")  # keys that hold a choice of the group `reward`
GROUPS = ["model", "data", "tasks", "tracker", "runtime", "launch", "launcher", "cluster", "resources", "experiment"]
GROUPS += [f"reward@{key}" for key in REWARDS]
# What other trainers call it (transformers, TRL, peft, OpenRLHF, verl, cleanrl): our names, and theirs for each.
# A name of ours is the last part of a key.
OTHER_NAMES = {
    "learning_rate": "lr max_lr actor_learning_rate actor_lr",
    "critic_learning_rate": "critic_lr value_lr vf_lr",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs num_ppo_epochs ppo_epochs update_epochs noptepochs",
    "batch_size": "per_device_train_batch_size train_batch_size total_batch_size global_batch_size rollout_batch_size",
    "micro_batch_size": "gradient_accumulation_steps grad_accum micro_train_batch_size per_device_batch_size",
    "minibatches": "num_mini_batches num_minibatches mini_batch_size ppo_mini_batch_size nminibatches",
    "warmup": "warmup_ratio warmup_steps lr_warmup_ratio lr_warmup_steps num_warmup_steps",
    "tokens": "max_steps total_steps num_steps train_tokens total_tokens",
    "examples": "max_steps total_steps num_steps max_samples max_train_samples num_samples",
    "reward.pairs": "max_steps total_steps num_steps max_samples max_train_samples",
    "dpo.pairs": "max_steps total_steps num_steps max_samples max_train_samples",
    "episodes": "max_steps total_steps num_steps total_episodes num_episodes total_timesteps steps",
    "max_length": "max_seq_length max_seq_len max_len model_max_length cutoff_len",
    "context": "block_size seq_len seq_length sequence_length context_length max_seq_length",
    "max_new_tokens": "response_length max_completion_length max_tokens generate_max_len max_response_length",
    "temperature": "temp",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clipping max_norm grad_norm",
    "beta": "dpo_beta kl_beta",
    "kl_coef": "beta kl_penalty init_kl_coef kl_coeff kl_loss_coef kl_ctl kl_weight",
    "kl_target": "target_kl kl target",
    "max_kl": "target_kl early_stop_kl",
    "kl_horizon": "horizon",
    "kl_controller": "adap_kl_ctrl adaptive_kl adaptive_kl_ctrl",
    "gamma": "discount discount_factor",
    "gae_lambda": "lam lambda lambd gae_lam lambda_",
    "clip_range": "cliprange clip_ratio clip clip_eps eps_clip epsilon clip_coef clip_param",
    "value_clip_range": "cliprange_value value_clip vf_clip clip_range_vf vf_clip_param",
    "value_coef": "vf_coef vf_coeff value_loss_coef critic_coef",
    "whiten_rewards": "whiten normalize_rewards reward_whitening",
    "samples_per_prompt": "num_generations n_samples_per_prompt group_size num_return_sequences rloo_k best_of",
    "advantage": "adv_estimator advantage_estimator algorithm estimator",
    "lora_rank": "lora_r lora r rank",
    "missing_end_penalty": "missing_eos_penalty non_eos_penalty penalty_no_eos",
    "ptx_coef": "ptx_coeff ptx pretrain_coef",
    "reference_sync_every": "sync_ref_model ref_model_sync_steps",
    "reward": "judge reward_function reward_fn reward_funcs reward_model_path",
    "loss_type": "loss",
    "label_smoothing": "label_smoothing_factor",
    "center_coef": "center_rewards_coefficient",
    "checkpoint": "model_name_or_path model_name pretrained_model_name_or_path base_model pretrained",
    "trust_remote_code": "trust_code",
    "num_hidden_layers": "n_layer n_layers num_layers layers",
    "num_attention_heads": "n_head n_heads num_heads heads",
    "hidden_size": "d_model n_embd hidden_dim dim",
    "intermediate_size": "d_ff ffn_dim",
    "path": "dataset dataset_name dataset_path data_path data_files train_file file train_data",
    "config_name": "dataset_config subset name",
    "precision": "bf16 fp16 fp32 dtype torch_dtype mixed_precision",
    "seed": "random_seed random_state",
    "log_every": "logging_steps log_interval",
    "checkpoints": "save_steps save_total_limit save_interval",
    "gpus": "num_gpus n_gpus gpus_per_node ngpus",
    "processes": "num_processes nproc_per_node world_size",
    "nodes": "nnodes num_nodes num_machines",
    "minutes": "time walltime time_limit",
    "run": "name run_name experiment_name exp_name",
    "runs": "output_dir save_dir out_dir",
    "kinds": "report_to log_with logger",
    "project": "project_name wandb_project",
    "mode": "wandb_mode offline",
    "target": "stage stages",
    "experiment": "config recipe",
}
SECTIONS = {"rm": "reward", "reward_model": "reward", "actor": "ppo", "policy": "ppo", "grpo": "ppo", "rloo": "ppo"}
SECTIONS |= {
    "critic": "ppo",
    "algorithm": "ppo",
    "pretraining": "pretrain",
    "finetune": "sft",
    "generation": "sampling",
}
MOST = 6  # nearest names in one line


def entries(schema: Any = Config, prefix: str = "") -> dict[str, Field[Any]]:
    """Every key of the configuration with its dots, as overrides spell it, and its entry in the schema."""
    dotted: dict[str, Field[Any]] = {}
    for entry in fields(schema):
        nested = is_dataclass(entry.type)
        dotted |= entries(entry.type, f"{prefix}{entry.name}.") if nested else {prefix + entry.name: entry}
    return dotted


def keys() -> list[str]:
    """Every key of the configuration with its dots, as overrides spell it."""
    return list(entries())


def nearest_key(name: str, others: Iterable[str] = ()) -> str:
    """A suggestion for a wrong key `name`, as " (nearest: ppo.learning_rate)", or the empty string.

    It knows what other trainers call a key. `others` are names besides the keys and groups.
    """
    same = same_name(name)
    return f" (nearest: {', '.join(same)})" if same else nearest(name, [*GROUPS, *keys(), *others])


def same_name(name: str) -> list[str]:
    """Keys and groups with the last part of `name`, or with our word for it: those of its own section if there are."""
    section, _, last = name.lower().replace("-", "_").rpartition(".")
    section = SECTIONS.get(section, section)
    words = {ours for ours, theirs in OTHER_NAMES.items() if last in theirs.split()} | {last}
    there = [key for key in [*GROUPS, *keys()] if any(_ends_with(key, word) for word in words)]
    if beside := [key for key in there if key.rpartition(".")[0] == section]:
        return beside
    if section and (close := difflib.get_close_matches(name, keys(), n=1, cutoff=0.85)):
        return close  # the section is misspelt
    depth = min((key.count(".") for key in there), default=0)
    there = [key for key in there if key.count(".") == depth]
    return there if len(there) <= MOST else []


def _ends_with(key: str, word: str) -> bool:
    """Whether a key ends with the parts of `word`; of a group the part before @ counts."""
    return f".{key.partition('@')[0]}".endswith(f".{word}")


def choices(group: str, folders: Iterable[str | Path] = ()) -> list[str]:
    """The choices of a group, for example "model" or "reward@ppo.reward", in conf/ and a user's own `folders`."""
    places = [place / group.partition("@")[0] for place in [CONF, *map(Path, folders)]]
    return sorted({file.stem for place in places for file in place.glob("*.yaml")})


def check_folders(folders: Iterable[str]) -> None:
    """Hold a user's own folders beside conf/ to be such; raises `UserError` for files that would not be read."""
    groups = sorted(place.name for place in CONF.iterdir() if any(place.glob("*.yaml")))
    taken: dict[Path, Path] = {Path(group) / file.name: file for group in groups for file in (CONF / group).glob("*")}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder}: there is no such folder")
        if folder.samefile(CONF):
            continue
        if folder.name in groups and any(folder.glob("*.yaml")):
            raise UserError(
                f"--config-dir {folder}: is a group; give the folder above it: --config-dir {folder.parent}"
            )
        if not any((folder / group).is_dir() for group in groups):
            raise UserError(f"--config-dir {folder}: holds no group, for example {folder}/experiment/mine.yaml")
        if (folder / "config.yaml").exists():
            raise UserError(f"{folder}/config.yaml: is not read; write what it sets to {folder}/experiment/NAME.yaml")
        for file in sorted(file for group in groups for file in (folder / group).glob("*.yaml")):
            first = taken.setdefault(file.relative_to(folder), file)
            if first != file and not first.samefile(file):
                raise UserError(f"{file}: {first} has the same name and is read instead; rename yours")


def completions(word: str, folders: Iterable[str | Path] = ()) -> list[str]:
    """What an override that begins with `word` can be: keys, a section at a time, or the values of its key."""
    sign = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, _ = word.removeprefix(sign).partition("=")
    if equals:
        return [f"{sign}{key}={value}" for value in _values(key, folders)]
    begun = key
    while True:
        names = {_next_part(name, begun) for name in [*GROUPS, *keys()] if name.startswith(begun)}
        if len(names) != 1 or not min(names).endswith("."):
            return [f"{sign}{name}" for name in sorted(names)]
        begun = min(names)


def _next_part(name: str, begun: str) -> str:
    """A key as far as its next dot after `begun`, or whole with its "="."""
    dot = name.find(".", len(begun)) if "@" not in name else -1
    return f"{name}=" if dot < 0 else name[: dot + 1]


def _values(key: str, folders: Iterable[str | Path]) -> Iterable[str]:
    """What can be given to a key or group, where that is one of few words."""
    if key in GROUPS:
        return choices(key, folders)
    if key == "target":
        from threefold.stages import STAGES

        return STAGES
    entry = entries().get(key)
    if entry is None or entry.type is bool:
        return ("true", "false") if entry else ()
    return entry.metadata.get("choices", ())
