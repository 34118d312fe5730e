"""The schema of models, data and stages: the types and limits that every value is held to."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from threefold.data.formats import FORMATS


def number(low: float | None = None, high: float | None = None) -> Any:
    """A required number in [low, high]; `low` and `high` are inclusive, None is no limit."""
    return field(default=MISSING, metadata={"low": low, "high": high})


def number_or_null(low: float) -> Any:
    """A number of at least `low`, null unless it is given."""
    return field(default=None, metadata={"low": low})


def one_of(*choices: str, instead: dict[str, str] | None = None) -> Any:
    """A required string from `choices`; `instead` says for some that are none what to take."""
    return field(default=MISSING, metadata={"choices": choices, "instead": instead or {}})


@dataclass
class ModelConfig:
    """The architecture to pretrain, or the checkpoint to start from."""

    checkpoint: str | None = MISSING
    revision: str | None = MISSING
    gguf_file: str | None = MISSING
    trust_remote_code: bool = MISSING
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = MISSING
    hidden_size: int | None = number(1)
    intermediate_size: int | None = number(1)
    num_hidden_layers: int | None = number(1)
    num_attention_heads: int | None = number(1)
    num_key_value_heads: int | None = number(1)
    head_dim: int | None = number(1)
    max_position_embeddings: int | None = number(8)
    tie_word_embeddings: bool = MISSING


@dataclass
class SourceConfig:
    """One data source: where its rows are and how to read them."""

    path: str | None = MISSING
    config_name: str | None = None
    revision: str | None = None
    format: str = one_of(*FORMATS)
    columns: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    max_unusable_share: float = field(default=0.01, metadata={"low": 0.0, "high": 1.0})


@dataclass
class DialogueConfig:
    """How prompts and replies are cut out of conversations; null is no limit."""

    context_turns: int | None = number(1)
    prompt_max_chars: int | None = number(1)
    reply_min_chars: int | None = number(1)
    reply_max_chars: int | None = number(1)


@dataclass
class DataConfig:
    """The sources of a run. Without a path for `preferences` the comparisons stage makes its own pairs."""

    text: SourceConfig = field(default_factory=SourceConfig)
    replies: SourceConfig = field(default_factory=SourceConfig)
    preferences: SourceConfig = field(default_factory=SourceConfig)
    limits_for: str = MISSING
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)


@dataclass
class TokenizerConfig:
    """Stage `tokenizer`."""

    vocab_size: int = number(262)
    template_date: str = MISSING


@dataclass
class PretrainConfig:
    """Stage `pretrain`."""

    tokens: int = number(0)
    context: int = number(8)
    batch_size: int = number(1)
    matrix_learning_rate: float = number(0.0)
    learning_rate: float = number(0.0)
    warmup: float = number(0.0, 1.0)
    decay: float = number(0.0, 1.0)
    max_grad_norm: float = number(0.0)
    eval_tokens: int = number(1)
    seed: int = number(0)


@dataclass
class SftConfig:
    """Stage `sft`."""

    examples: int = number(1)
    epochs: int = number(1)
    batch_size: int = number(1)
    learning_rate: float = number(0.0)
    warmup: float = number(0.0, 1.0)
    max_length: int = number(8)
    eval_examples: int = number(1)
    seed: int = number(0)


@dataclass
class SamplingConfig:
    """How every stage samples replies; one setting, so that sampled and scored log-probabilities agree."""

    temperature: float = number(0.01)
    max_new_tokens: int = number(1)
    batch_size: int = number(1)
    static_cache: bool = MISSING


@dataclass
class FunctionConfig:
    """A reward function by import path, null for the learned reward model, and how it is called."""

    function: str | None = MISSING
    args: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    messages: bool = False


@dataclass
class RewardPartConfig(FunctionConfig):
    """One part of a composed reward, and how it is added to the others."""

    weight: float = 1.0
    clip: list[float] | None = None
    normalise: bool = False
    needs: dict[str, float] = field(default_factory=dict)


@dataclass
class RewardFunctionConfig(FunctionConfig):
    """The `reward` group: one function, or with `function` null a sum of `parts` by name."""

    parts: dict[str, RewardPartConfig] = field(default_factory=dict)


@dataclass
class ComparisonsConfig:
    """Stage `comparisons`."""

    prompts: int = number(1)
    eval_prompts: int = number(1)
    samples_per_prompt: int = number(2)
    pairs_per_prompt: int = number(1)
    human_pairs: int = number(0)
    sft: bool = MISSING
    policies: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    pairing: str = one_of("best_worst", "random", "uncertain")
    scorer: str | None = MISSING
    label_by: str = one_of("judge", "order", "people")
    min_gap: float = number(0.0)
    label_noise: float = number(0.0, 0.5)
    judge: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    seed: int = number(0)


PROBES = (
    "empty", "whitespace", "prompt_echoed", "repeated", "very_long", "off_topic", "praise", "no_end",
)  # fmt: skip


@dataclass
class GateConfig:
    """What a reward model must keep to before PPO may use it; null does not check."""

    min_accuracy: float | None = number(0.0, 1.0)
    min_over_length: float | None = number(-1.0, 1.0)
    max_length_correlation: float | None = number(0.0, 1.0)
    max_calibration_error: float | None = number(0.0, 1.0)
    probes: dict[str, float] = field(default_factory=dict)
    max_batch_difference: float | None = number(0.0)
    max_train_overlap: int | None = number(0)


@dataclass
class RewardConfig:
    """Stage `reward`."""

    pairs: int | None = number(1)
    eval_pairs: int | None = number(2)
    probe_prompts: int = number(1)
    epochs: int = number(1)
    batch_size: int = number(1)
    learning_rate: float = number(0.0)
    warmup: float = number(0.0, 1.0)
    center_coef: float = number(0.0)
    margin_coef: float = number(0.0)
    label_smoothing: float = number(0.0, 0.5)
    ensemble: int = number(1)
    combine: str = one_of("mean", "min", "uncertain")
    combine_coef: float = number(0.0)
    lora_rank: int | None = number(1)
    lora_alpha: float = number(0.0)
    max_length: int = number(8)
    gate: GateConfig = field(default_factory=GateConfig)
    seed: int = number(0)


# losses of stage `dpo`, as TRL calls them: of pairs (DPOTrainer), and of replies labelled one by one (KTOTrainer)
PAIR_LOSSES = (
    "sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down", "sft", "exo_pair", "nca_pair",
    "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop",
)  # fmt: skip
LABEL_LOSSES = ("kto", "apo_zero_unpaired")
# β of each in its paper or in the recipe that made it known, which docs/dpo.md names; otherwise TRL's own default
BETAS = {
    "sigmoid": 0.1, "sigmoid_norm": 5.0, "apo_zero": 0.05, "apo_down": 0.05, "ipo": 0.1, "hinge": 0.1, "robust": 0.01,
    "sft": 0.1, "exo_pair": 0.1, "nca_pair": 0.01, "bco_pair": 0.01, "sppo_hard": 0.001, "aot": 0.1,
    "aot_unpaired": 0.1, "discopop": 0.05, "simpo": 2.0, "kto": 0.1, "apo_zero_unpaired": 0.1,
}  # fmt: skip
WITHOUT = {
    "orpo": "TRL has ORPO among its experiments alone, which change; the nearest are simpo, and sigmoid_norm with "
    "dpo.loss_weights={sft: 1}",
    "cpo": "TRL has CPO among its experiments alone, which change; the nearest is simpo with dpo.loss_weights={sft: 1}",
}


@dataclass
class DpoConfig:
    """Stage `dpo`."""

    pairs: int | None = number(1)
    eval_pairs: int | None = number(1)
    start: str | None = MISSING
    beta: float | None = number(0.0)
    loss_type: str = one_of(*PAIR_LOSSES, "simpo", *LABEL_LOSSES, instead=WITHOUT)
    loss_weights: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = number(0.0, 0.5)
    simpo_gamma: float | None = number(0.0)
    ld_alpha: float | None = number(0.0, 1.0)
    desirable_weight: float = number(0.0)
    undesirable_weight: float = number(0.0)
    reference_sync_every: int | None = number(1)
    reference_mixup: float = number(0.0, 1.0)
    epochs: int = number(1)
    batch_size: int = number(1)
    learning_rate: float = number(0.0)
    warmup: float = number(0.0, 1.0)
    max_length: int = number(8)
    seed: int = number(0)


@dataclass
class PpoConfig:
    """Stage `ppo`."""

    episodes: int = number(1)
    batch_size: int = number(2)
    samples_per_prompt: int = number(1)
    minibatches: int = number(1)
    epochs: int = number(1)
    learning_rate: float = number(0.0)
    critic_learning_rate: float = number(0.0)
    critic_warmup: int = number(0)
    adam_eps: float = number(0.0)
    max_grad_norm: float = number(0.0)
    advantage: str = one_of("gae", "rloo", "grpo", "reinforce++")
    average: str = one_of("tokens", "replies", "sums")
    critic: str = one_of("separate", "shared")
    sampler: str = one_of("own", "vllm")
    vllm_memory_share: float = number(0.01, 1.0)
    lora_rank: int | None = number(1)
    lora_alpha: float = number(0.0)
    gamma: float = number(0.0, 1.0)
    gae_lambda: float = number(0.0, 1.0)
    clip_range: float = number(0.0)
    value_clip_range: float | None = number(0.0)
    value_coef: float = number(0.0)
    kl_controller: str = one_of("fixed", "adaptive")
    kl_coef: float = number(0.0)
    kl_target: float = number(0.0)
    kl_horizon: int = number(1)
    kl_estimator: str = one_of("k1", "k2", "k3")
    kl_in: str = one_of("reward", "loss")
    max_kl: float | None = number(0.0)
    max_loss: float | None = number(0.0)
    min_entropy: float | None = number(0.0)
    min_score_std: float | None = number(0.0)
    max_first_ratio_error: float | None = number(0.0)
    max_engine_ratio: float | None = number(0.0)
    on_trip: str = one_of("stop", "rollback")
    reference_sync_every: int | None = number(1)
    snapshots: int = number(0)
    ptx_coef: float = number(0.0)
    ptx_batch_size: int = number(1)
    ptx_context: int = number(8)
    whiten_rewards: bool = MISSING
    missing_end_penalty: float | None = MISSING
    reward: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    ignore_gate: bool = MISSING
    seed: int = number(0)


@dataclass
class JudgeModelConfig:
    """A local model that judges pairs of replies."""

    path: str | None = MISSING
    revision: str | None = MISSING
    chat: bool = MISSING
    template: str = MISSING
    verdicts: list[str] = field(default_factory=list)
    margin: float = number(0.0, 0.5)
    prompts: int | None = number(2)
    batch_size: int = number(1)


@dataclass
class TaskConfig(SourceConfig):
    """A task of the evaluation: a source of problems, and how a reply to one is checked."""

    check: str = one_of("exact", "numeric", "instructions")
    split: str = field(default="all", metadata={"choices": ("all", "test")})
    problems: int | None = field(default=None, metadata={"low": 1})
    max_new_tokens: int | None = field(default=None, metadata={"low": 1})


@dataclass
class EvaluateConfig:
    """Stage `evaluate`."""

    models: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    prompts: int = number(2)
    validation_prompts: int = number(0)
    text_tokens: int = number(1)
    remove_contaminated: bool = MISSING
    greedy: bool = MISSING
    reward_model: bool = MISSING
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    samples_shown: int = number(0)
    judge: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    second_judge: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    judge_model: JudgeModelConfig = field(default_factory=JudgeModelConfig)
    seed: int = number(0)


@dataclass
class FrontierConfig:
    """Stage `frontier`, and the command that runs it for every method, setting and seed."""

    method: str = one_of("best_of_n", "dpo", "ppo")
    prompts: int = number(2)
    samples: int = number(2)
    best_of: list[int] = field(default_factory=list)
    seed: int = number(0)
    seeds: list[int] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    kl_coefs: list[float] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    snapshots: int = number(0)
    bootstrap: int = number(100)
