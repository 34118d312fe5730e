"""What a sweep varies and by which number it chooses: checked without importing torch.

Keys and their values are overrides in Hydra's sweep syntax; the number, its direction and its KL are keys of `sweep`.

With `method=ppo,dpo,best_of_n` a sweep compares methods. Keys of a section that is named after a method (`ppo.kl_coef`,
`dpo.beta`, `best_of_n.n`) vary with that method alone, all others with every method. In the names of metrics `method`
stands for the model that a method makes: `evaluate.models.method.gold_mean`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from threefold import chain, rewards
from threefold.config import choices
from threefold.config.compose import compose
from threefold.errors import UserError, nearest
from threefold.evaluation.players import MODELS
from threefold.stages import STAGES, needed_by

Direction = Literal["maximize", "minimize"]
# ends of metrics of which less is better
LOWER = ("bits_per_byte", "loss", "error", "kl", "kl_k3", "repetition", "repeated", "self_bleu")
METHOD, METHODS, COUNT = "method", ("ppo", "dpo", "best_of_n"), "best_of_n.n"
OWN = "evaluate.models.method."  # how metrics of each method's own model begin


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
    def method(self) -> str | None:
        """The method whose key it is; None where it varies with every method."""
        section = self.key.lstrip("+").rpartition("@")[2].partition(".")[0]
        return section if section in METHODS else None

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all when the configuration is checked."""
        return self.values or (self.low, self.high)


def read(overrides: list[str]) -> tuple[DictConfig, list[str], list[Dimension]]:
    """The configuration that all runs have, its overrides, and the keys that are varied, checked.

    Raises `UserError` for what is wrong with them.
    """
    fixed, space = parse(overrides)
    varied = [dimension.key for dimension in space] + (["evaluate.models"] if methods(space) else [])
    config, fixed = choices.compose_run(fixed, varied)
    check_methods(config, fixed, space)
    fixed = [*fixed, *implied(config, space)]
    config = compose(fixed)
    check_names(config)
    if asked := validation_override(config):
        fixed = [*fixed, *asked]
        config = compose(fixed)
    check(config, fixed, space)
    return config, fixed, space


def is_sweep(overrides: list[str]) -> bool:
    """Whether `overrides` are those of a sweep: some key has several values, or a method is named."""
    return bool(parse(overrides)[1])


def parse(overrides: list[str]) -> tuple[list[str], list[Dimension]]:
    """The overrides that all runs have, and the keys that are varied; raises `UserError` for a wrong override."""
    from threefold.config.overrides import parse as parsed_override

    fixed, space = [], []
    for text in overrides:
        parsed = parsed_override(text)
        if parsed.is_sweep_override():
            space.append(_dimension(parsed, text))
        elif parsed.get_key_element() in (METHOD, COUNT):  # no keys of the configuration
            space.append(Dimension(parsed.get_key_element(), (parsed.value(),)))
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
    for dimension in space:
        if not dimension.values and config.sweep.trials is None:
            raise UserError(f"{dimension.key}: an interval is for a search; say how long, for example sweep.trials=20")
        if dimension.key == "target":
            raise UserError("target: a sweep compares settings by one stage; choose one target")
    for part in by_method(space):
        _check_differences(config, overrides, part)


def _check_differences(config: DictConfig, overrides: list[str], space: list[Dimension]) -> None:
    """Raise `UserError` where a key changes nothing."""
    first = {dimension.key: dimension.ends[0] for dimension in space}  # some values are right only beside others
    whom = f"{stage_wanted(config)} with method={first[METHOD]}" if METHOD in first else stage_wanted(config)
    of_first = target_fingerprint(compose([*overrides, *spelt(first)]))
    for dimension in space:
        others = [compose([*overrides, *spelt(first | {dimension.key: value})]) for value in dimension.ends[1:]]
        if len({of_first, *map(target_fingerprint, others)}) <= len(others):
            raise UserError(f"{dimension.key}: its values make no difference to {whom}; leave it out")


def check_methods(config: DictConfig, fixed: list[str], space: list[Dimension]) -> None:
    """Raise `UserError` where methods, or what is given beside them, make no sense."""
    named = methods(space)
    if other := next((name for name in named if name not in METHODS), None):
        raise UserError(f"method={other}: must be of {', '.join(METHODS)}{nearest(str(other), METHODS)}")
    counts = next((dimension.values for dimension in space if dimension.key == COUNT), ())
    if wrong := [count for count in counts if type(count) is not int or count < 2]:
        raise UserError(f"{COUNT}={wrong[0]}: must be a whole number of samples, at least 2")
    if counts and "best_of_n" not in named:
        raise UserError(f"{COUNT}: is a key of method=best_of_n; name that method, or leave it out")
    if not named:
        return
    if "best_of_n" in named and not counts:
        raise UserError(f"method=best_of_n: say of how many samples the best is taken, for example {COUNT}=4,16")
    if unused := next((d for d in space if d.method and d.method not in named), None):
        raise UserError(
            f"{unused.key}: varies a method that is not compared; add {unused.method} to method, or leave it"
        )
    if config.target not in (None, "evaluate"):
        raise UserError(f"target={config.target}: methods are compared by the evaluation; leave target out")
    if config.sweep.trials is not None:
        raise UserError("sweep.trials: a search has one method; search each by itself, and compare what is best")
    if any(text.lstrip("+").partition("=")[0] == "evaluate.models" for text in [*fixed, *(d.key for d in space)]):
        raise UserError("evaluate.models: method says which models are compared; leave it out")
    for key in ("metric", "kl"):
        if (text := config.sweep[key]) is not None and not text.startswith(OWN):
            raise UserError(f"sweep.{key}={text}: with method it is of each method's own model; write {OWN}NAME")


def methods(space: list[Dimension]) -> list[str]:
    """The methods that are compared; none in an ordinary sweep."""
    return [name for dimension in space if dimension.key == METHOD for name in dimension.values]


def by_method(space: list[Dimension]) -> list[list[Dimension]]:
    """What varies with each method; of an ordinary sweep all of `space`."""
    if not (named := methods(space)):
        return [space]
    others = [dimension for dimension in space if dimension.key != METHOD]
    return [
        [Dimension(METHOD, (name,)), *(dimension for dimension in others if dimension.method in (None, name))]
        for name in named
    ]


def implied(config: DictConfig, space: list[Dimension]) -> list[str]:
    """The overrides that the keys which vary bring with them: the metric, and with methods a reward model for all."""
    named, given = methods(space), config.sweep.metric is not None
    if not named:
        evaluated = stage_wanted(config) == "evaluate" and not given
        return [f"sweep.metric=evaluate.models.{varied_model(config, space)}.gold_mean"] if evaluated else []
    scored = "best_of_n" in named or rewards.uses_model(config.ppo.reward)
    return [*([] if given else [f"sweep.metric={OWN}gold_mean"]), *(["evaluate.reward_model=true"] if scored else [])]


def varied_model(config: DictConfig, space: list[Dimension]) -> str:
    """The model whose section alone varies, where it is evaluated; otherwise the last that was trained."""
    varied = {name for dimension in space if (name := dimension.method)}
    evaluated: list[str] = list(config.evaluate.models)
    wanted = [*(varied if len(varied) == 1 else ()), *reversed(MODELS)]
    return next((model for model in wanted if model in evaluated), evaluated[-1])


def own_model(setting: dict[str, Any]) -> str:
    """The player of the evaluation that stands for the method of a setting."""
    return f"best_of_{setting[COUNT]}" if setting[METHOD] == "best_of_n" else setting[METHOD]


def own(name: str, setting: dict[str, Any]) -> str:
    """The metric `name` of a run with `setting`: `models.method` is the model of its method."""
    return name.replace("models.method.", f"models.{own_model(setting)}.") if METHOD in setting else name


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
    """Values by key as overrides; a method is the model that is evaluated beside the SFT model."""
    texts = [f"{key}={value}" for key, value in values.items() if key not in (METHOD, COUNT)]
    return [*texts, *([f"evaluate.models=[sft,{own_model(values)}]"] if METHOD in values else [])]


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
        return f"evaluate.models.{varied_model(config, [])}.gold_mean"
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
    measured = stage == "evaluate" and model in (METHOD, *config.evaluate.models)
    return f"evaluate.models.{model}.kl" if measured else None


def direction(name: str, given: Direction | None) -> Direction:
    """Whether to maximize or minimize the metric `name`, where it is not `given`."""
    return given or ("minimize" if name.endswith(LOWER) else "maximize")
