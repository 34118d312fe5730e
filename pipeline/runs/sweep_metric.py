"""By which number a sweep chooses its settings, which KL belongs to it, and whether more of it is better."""

from omegaconf import DictConfig

from threefold.errors import UserError, nearest
from threefold.stages import STAGES, needed_by

# ends of metrics of which less is better
LOWER = ("bits_per_byte", "loss", "error", "kl", "kl_k3", "repetition", "repeated", "self_bleu")


def check_names(config: DictConfig) -> None:
    """Raises `UserError` where the target is no stage, or a key of `sweep` names none that is made."""
    if config.target is not None and config.target not in STAGES:
        raise UserError(f"target={config.target}: must be one of {', '.join(STAGES)}{nearest(config.target, STAGES)}")
    made = needed_by(config.target, config)
    for key, text in {"metric": metric(config), "kl": config.sweep.kl, "prune": config.sweep.prune}.items():
        stage, _, name = (text or "").partition(".")
        if text is not None and (stage not in made or not name):
            known = ", ".join(made)
            raise UserError(f"sweep.{key}={text}: must be STAGE.METRIC, of one of {known}{nearest(stage, made)}")
    if config.sweep.prune and config.sweep.trials is None:
        raise UserError("sweep.prune: only a search ends runs early; set sweep.trials")


def stage_wanted(config: DictConfig) -> str:
    """The stage that is made with every setting: the target, or the last one of the chain."""
    return config.target or list(STAGES)[-1]


def metric(config: DictConfig) -> str:
    """The number that is wanted of settings, as STAGE.METRIC."""
    stage = stage_wanted(config)
    if config.sweep.metric is not None:
        return config.sweep.metric
    if stage == "evaluate":
        return f"evaluate.models.{config.evaluate.models[-1]}.gold_mean"
    if not STAGES[stage].metric:
        raise UserError(f"sweep.metric: stage {stage} has no main metric; name one, as {stage}.METRIC")
    return f"{stage}.{STAGES[stage].metric}"


def objective(config: DictConfig) -> str:
    """The number that settings are chosen by: the metric, of the evaluation that on the validation prompts.

    Of figures that the evaluation does not have of them (tasks, the arena, base text) it is the metric itself.
    """
    stage, _, name = metric(config).partition(".")
    name = "models.ppo.gold_mean" if name == "ppo_gold_mean" else name
    judged = name.startswith("models.") and ".tasks." not in name and not name.endswith(".text_bits_per_byte")
    return f"evaluate.validation.{name}" if stage == "evaluate" and judged else metric(config)


def validation_override(config: DictConfig) -> list[str]:
    """What has the evaluation measure what settings are chosen by, where nothing in `config` does."""
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


def direction(name: str, given: str | None) -> str:
    """Whether to maximize or minimize the metric `name`, where it is not `given`."""
    return given or ("minimize" if name.endswith(LOWER) else "maximize")
