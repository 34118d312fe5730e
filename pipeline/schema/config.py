"""The schema of the configuration: the types and limits that every value is held to. Values and comments: `conf/`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from threefold.schema.stages import (
    ComparisonsConfig,
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    FrontierConfig,
    ModelConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    TokenizerConfig,
    number,
    number_or_null,
    one_of,
)

SHARDED = ("fsdp2", "deepspeed_zero3")  # modes of `launch` in which each process holds a share of the model


@dataclass
class RuntimeConfig:
    """How this machine runs a stage; nothing here changes what the stage computes beyond rounding."""

    device: str = one_of("auto", "cpu", "cuda")
    threads: int | None = number(1)
    keep_freed_memory: bool = MISSING
    micro_batch_size: int | None = number(1)
    checkpoints: int = number(1)
    log_every: int = number(1)
    evaluations: int = number(0)


@dataclass
class LaunchConfig:
    """How many processes run a training stage together, where, and what each of them holds of the model."""

    mode: str = one_of("single", "ddp", *SHARDED)
    processes: int = number(1)
    nodes: int = number(1)
    node_rank: int = number(0)
    main_address: str | None = MISSING
    main_port: int = number(1, 65534)


@dataclass
class LauncherConfig:
    """Where the stages of a run are made."""

    kind: str = one_of("local", "slurm")
    jobs: int | None = number(1)
    poll_seconds: float = number(0.1)
    requeue: bool = MISSING
    max_timeouts: int = number(1)
    signal_seconds: int = number(5)


@dataclass
class ClusterConfig:
    """Where on a Slurm cluster jobs go."""

    partition: str | None = MISSING
    account: str | None = MISSING
    qos: str | None = MISSING
    constraint: str | None = MISSING
    setup: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageResourcesConfig:
    """What the Slurm job of one stage asks for; null is what all stages ask for."""

    nodes: int | None = number_or_null(1)
    gpus: int | None = number_or_null(0)
    cpus: int | None = number_or_null(1)
    memory_gb: float | None = number_or_null(0.1)
    minutes: int | None = number_or_null(1)


@dataclass
class ResourcesOfStagesConfig:
    """The stages of the chain."""

    tokenizer: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    pretrain: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    sft: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    comparisons: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    reward: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    dpo: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    ppo: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    frontier: StageResourcesConfig = field(default_factory=StageResourcesConfig)
    evaluate: StageResourcesConfig = field(default_factory=StageResourcesConfig)


@dataclass
class ResourcesConfig:
    """What the Slurm job of a stage asks for."""

    nodes: int = number(1)
    gpus: int = number(0)
    cpus: int = number(1)
    memory_gb: float | None = number(0.1)
    minutes: int = number(1)
    stages: ResourcesOfStagesConfig = field(default_factory=ResourcesOfStagesConfig)


@dataclass
class LabelConfig:
    """`threefold label`: the page where people compare replies; no stage sees this."""

    port: int = number(0, 65535)
    pairs: str | None = MISSING
    votes: str | None = MISSING
    seed: int = number(0)


@dataclass
class SweepConfig:
    """`threefold sweep`: how settings are compared, searched and ended early; no stage sees this."""

    metric: str | None = MISSING
    direction: str | None = one_of("maximize", "minimize")
    kl: str | None = MISSING
    trials: int | None = number(1)
    batch: int = number(1)
    random_trials: int = number(1)
    seed: int = number(0)
    prune: str | None = MISSING
    prune_direction: str | None = one_of("maximize", "minimize")
    prune_after_trials: int = number(1)
    prune_after_steps: int = number(0)


@dataclass
class ChatConfig:
    """`threefold chat`: a conversation in the terminal; no stage sees this."""

    model: str = MISSING
    system: str | None = MISSING
    seed: int = number(0)


@dataclass
class TrackerConfig:
    """Where metrics go besides the run folder."""

    kinds: list[str] = field(default_factory=list)
    project: str = MISSING
    entity: str | None = MISSING
    mode: str = one_of("auto", "online", "offline")
    tags: list[str] = field(default_factory=list)
    samples: int = number(0)
    upload: bool = MISSING


@dataclass
class DashboardConfig:
    """`threefold dashboard`: where tracked runs are looked at; no stage sees this."""

    show: str = one_of("auto", "trackio", "leet", "tensorboard", "wandb")
    port: int = number(1, 65535)


@dataclass
class Config:
    """The whole configuration; `conf/config.yaml` and its groups fill it."""

    run: str = MISSING
    runs: str = MISSING
    takeover: bool = MISSING
    target: str | None = MISSING
    dependents: bool = MISSING
    seed: int = number(0)
    seeds: int | None = number(2)
    rounds: int | None = number(2)
    precision: str = one_of("auto", "fp32", "bf16")
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    comparisons: ComparisonsConfig = field(default_factory=ComparisonsConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    dashboard: DashboardConfig = field(default_factory=DashboardConfig)
