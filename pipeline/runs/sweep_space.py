"""What a sweep varies and by which number it chooses: checked without importing torch.

Keys and their values are overrides in Hydra's sweep syntax; the number, its direction and its KL are keys of `sweep`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from threefold import chain
from threefold.config import choices
from threefold.config.compose import compose
from threefold.errors import UserError, nearest
from threefold.stages import STAGES, needed_by

Direction = Literal["maximize", "minimize"]
# ends of metrics of which less is better
LOWER = ("bits_per_byte", "loss", "error", "kl", "kl_k3", "repetition", "repeated", "self_bleu")


@dataclass(frozen=True)
class Dimension:
    """One key that is varied: over `values`, or without any over the interval from `low` to `high`."""

    key: str  # as overrides spell it, for example dpo.beta or reward@ppo.reward
    values: tuple[Any, ...] = ()  # numbers, truth values, and texts as overrides spell them
    step: float | None = None  # where the values are a range: evenly spaced and in order
    low: float = math.nan
    high: float = math.nan
    log: bool = False

    @property
    def repeats(self) -> bool:
        """Whether its values are repetitions of one setting, not settings to choose from."""
        return self.key.lstrip("+").rpartition(".")[2] == "seed"

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all when the configuration is checked."""
        return self.values or (self.low, self.high)


def read(overrides: list[str]) -> tuple[DictConfig, list[str], list[Dimension]]:
    """The configuration that all runs have, its overrides, and the keys that are varied, checked.

    Raises `UserError` for what is wrong with them.
    """
    fixed, space = parse(overrides)
    config, fixed = choices.compose_run(fixed, [dimension.key for dimension in space])
    check_names(config)
    if asked := validation_override(config):
        fixed = [*fixed, *asked]
        config = compose(fixed)
    check(config, fixed, space)
    return config, fixed, space


def parse(overrides: list[str]) -> tuple[list[str], list[Dimension]]:
    """The overrides that all runs have, and the keys that are varied; raises `UserError` for a wrong override."""
    from threefold.config.overrides import parse as parsed_override

    fixed, space = [], []
    for text in overrides:
        parsed = parsed_override(text)
        if parsed.is_sweep_override():
            space.append(_dimension(parsed, text))
        else:
            fixed.append(text)
    named = [text.partition("=")[0] for text in fixed] + [dimension.key for dimension in space]
    if twice := next((dimension.key for dimension in space if named.count(dimension.key) > 1), None):
        raise UserError(f"{twice}: is given twice; name all of its values in one override")
    return fixed, space


def _dimension(parsed: Any, text: str) -> Dimension:
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep, Transformer

    key, value = parsed.get_key_element(), parsed.value()
    if isinstance(value, IntervalSweep):
        return _interval(key, value, text)
    if getattr(value, "shuffle", False) or not hasattr(value, "shuffle"):
        raise UserError(f"{text}: list the values; glob() and shuffle() are not for sweeps here")
    values = tuple(parsed.sweep_iterator(transformer=Transformer.encode))
    if not values:
        raise UserError(f"{text}: holds no value")
    if len(set(map(str, values))) < len(values):
        raise UserError(f"{text}: names a value twice")
    return Dimension(key, values, step=value.step if isinstance(value, RangeSweep) else None)


def _interval(key: str, interval: Any, text: str) -> Dimension:
    low, high, log = interval.start, interval.end, "log" in interval.tags
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{text}: its lower end must be below its upper end")
    if log and low <= 0:
        raise UserError(f"{text}: a logarithmic interval begins above 0")
    dimension = Dimension(key, low=low, high=high, log=log)
    if dimension.repeats:
        raise UserError(f"{text}: seeds are repetitions; list them, for example {key}=1,2,3")
    return dimension


def check(config: DictConfig, overrides: list[str], space: list[Dimension]) -> None:
    """Compose with the values of every key; raises `UserError` for a wrong one, and for a key that changes nothing."""
    if not space:
        raise UserError("nothing to sweep: give a key several values, for example ppo.kl_coef=0.02,0.05,0.1")
    if config.seeds is not None:
        raise UserError(f"seeds={config.seeds}: a sweep repeats what lists its seeds, for example seed=1,2,3")
    if config.sweep.trials is not None and all(dimension.repeats for dimension in space):
        raise UserError("sweep.trials: only seeds vary, and there is nothing to search; leave it null")
    first = {dimension.key: dimension.ends[0] for dimension in space}  # some values are right only beside others
    for dimension in space:
        if not dimension.values and config.sweep.trials is None:
            raise UserError(f"{dimension.key}: an interval is for a search; say how long, for example sweep.trials=20")
        if dimension.key == "target":
            raise UserError("target: a sweep compares settings by one stage; choose one target")
        composed = [compose([*overrides, *spelt(first | {dimension.key: value})]) for value in dimension.ends]
        if len(set(map(target_fingerprint, composed))) < len(composed):
            raise UserError(f"{dimension.key}: its values make no difference to {stage_wanted(config)}; leave it out")


def target_fingerprint(config: DictConfig) -> str:
    """The fingerprint of what `config` wants made."""
    return chain.plan(config, needed_by(config.target, config))[stage_wanted(config)].fingerprint


def combinations(space: list[Dimension]) -> list[dict[str, Any]]:
    """Every combination of values by key, the last key varying fastest; of no key, the empty one."""
    keys = [dimension.key for dimension in space]
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(dimension.values for dimension in space))
    ]


def spelt(values: dict[str, Any]) -> list[str]:
    """Values by key as overrides."""
    return [f"{key}={value}" for key, value in values.items()]


def check_names(config: DictConfig) -> None:
    """Raises `UserError` where the target is no stage, or a key of `sweep` names none that is made."""
    if config.target is not None and config.target not in STAGES:
        raise UserError(f"target={config.target}: must be one of {', '.join(STAGES)}{nearest(config.target, STAGES)}")
    made = needed_by(config.target, config)
    for key, text in {"metric": metric(config), "kl": config.sweep.kl, "prune": config.sweep.prune}.items():
        stage, _, name = (text or "").partition(".")
        if text is not None and (stage not in made or not name):
            stages = ", ".join(made)
            raise UserError(f"sweep.{key}={text}: must be STAGE.METRIC, of one of {stages}{nearest(stage, made)}")
    if config.sweep.prune and config.sweep.trials is None:
        raise UserError("sweep.prune: only a search ends runs early; set sweep.trials")


def stage_wanted(config: DictConfig) -> str:
    """The stage that is made with every setting: the target, or the last one of the chain."""
    return config.target or list(STAGES)[-1]


def metric(config: DictConfig) -> str:
    """The number that the sweep is about, as STAGE.METRIC."""
    stage = stage_wanted(config)
    if config.sweep.metric is not None:
        return config.sweep.metric
    if stage == "evaluate":
        return f"evaluate.models.{config.evaluate.models[-1]}.gold_mean"
    if not STAGES[stage].metric:
        raise UserError(f"sweep.metric: stage {stage} has no main metric; name one, as {stage}.METRIC")
    return f"{stage}.{STAGES[stage].metric}"


def objective(config: DictConfig) -> str:
    """The number that settings are chosen by: the metric, and for the evaluation the metric on the validation prompts.

    The evaluation has no tasks, arena and base text on validation prompts; there it is the metric itself.
    """
    stage, _, name = metric(config).partition(".")
    name = "models.ppo.gold_mean" if name == "ppo_gold_mean" else name
    judged = name.startswith("models.") and ".tasks." not in name and not name.endswith(".text_bits_per_byte")
    return f"evaluate.validation.{name}" if stage == "evaluate" and judged else metric(config)


def validation_override(config: DictConfig) -> list[str]:
    """The override that has the evaluation measure the objective; none where `config` does so already."""
    if not objective(config).startswith("evaluate.validation.") or config.evaluate.validation_prompts:
        return []
    return [f"evaluate.validation_prompts={config.evaluate.prompts}"]


def kl_metric(config: DictConfig) -> str | None:
    """The KL that belongs to the metric, if any."""
    stage, *path = metric(config).split(".")
    if config.sweep.kl is not None or stage == "ppo":
        return config.sweep.kl or "ppo.kl"
    model = path[1] if path[0] == "models" and len(path) > 1 else path[0].removesuffix("_gold_mean")
    return f"evaluate.models.{model}.kl" if stage == "evaluate" and model in config.evaluate.models else None


def direction(name: str, given: Direction | None) -> Direction:
    """Whether to maximize or minimize the metric `name`, where it is not `given`."""
    return given or ("minimize" if name.endswith(LOWER) else "maximize")
