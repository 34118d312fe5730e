"""All that can be known to be wrong before the first stage starts."""

from omegaconf import DictConfig, OmegaConf

from threefold import rewards
from threefold.chain.plans import TASKS, Planned
from threefold.config.checks import check_shares
from threefold.errors import UserError
from threefold.execution import launch
from threefold.stages import STAGES, sources
from threefold.tracking import backends


def check(config: DictConfig, planned: dict[str, Planned]) -> None:
    """All that can be known to be wrong before the first of the planned stages starts; raises `UserError`."""
    check_processes(config, planned)
    check_pairs(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        backends.require(config.tracker)
    check_checkpoint(config, planned)
    check_sources(config, planned)
    check_rewards(config, planned)
    if not all(entry.artifact.finished for entry in planned.values()):
        from threefold.chain import preflight  # imports torch

        preflight.check(config, planned)


def check_pairs(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Raise `UserError` where DPO is to be made of replies that were labelled one by one."""
    given = config.data.preferences
    if given.path and given.format == "unpaired" and "dpo" in planned and not planned["dpo"].artifact.finished:
        raise UserError(
            "data.preferences.format=unpaired: replies that were labelled one by one are no pairs, which dpo needs; "
            "set target=reward or ppo, or take dpo out of evaluate.models"
        )


def check_checkpoint(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Look at the checkpoint of model=hf before the first stage that reads it; raises `UserError` for a bad one."""
    if not config.model.checkpoint or all(planned[name].artifact.finished for name in planned if name in READ_IT):
        return
    from threefold.models.loading import check_checkpoint

    if check_checkpoint(config.model) and not set(planned) <= READ_IT:
        raise UserError(
            f"model.checkpoint={config.model.checkpoint}: needs code of its own, and stages after pretrain run none; "
            "set target=pretrain, or take a model whose architecture transformers has"
        )


READ_IT = {"tokenizer", "pretrain"}  # stages that read the checkpoint; later ones read what they made of it


def check_processes(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Hold what several processes would share to what they can, for the stages to be made; raises `UserError`."""
    stages = [name for name, entry in planned.items() if not entry.artifact.finished]
    if any(STAGES[stage].several_processes for stage in stages):
        check_shares(config, stages)
        launch.check(config)


def check_sources(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Read the data of the stages to be made before the first of them starts; raises `UserError` for a bad source.

    A broken file of preferences would otherwise show after pretraining. A source that a finished artifact was made from
    is known to be good, and what is read here stays in memory for the stages, so a good source is read once as before.
    """
    from threefold.data import reading
    from threefold.evaluation import tasks

    proven = {key for entry in planned.values() if entry.artifact.finished for key in sources(entry.stage, config)}
    needed = {key for entry in planned.values() if not entry.artifact.finished for key in sources(entry.stage, config)}
    for key in sorted(needed - proven):
        source = OmegaConf.select(config, key)
        if key.startswith(TASKS):
            tasks.check(key, source)
        elif source.path is not None:
            reading.check(source)
        if key == "data.replies":
            unfinished = {entry.stage for entry in planned.values() if not entry.artifact.finished}
            reading.check_replies(source, config.data.dialogue, _splits_of_replies(unfinished, config))


def _splits_of_replies(stages: set[str], config: DictConfig) -> set[str]:
    """The splits of `data.replies` that some of `stages` take prompts from."""
    given = config.data.preferences.path is not None
    needed = {"sft": {"train", "validation"}, "ppo": {"train"}, "frontier": {"test"}, "evaluate": {"test"}}
    needed["evaluate"] |= {"validation"} if config.evaluate.validation_prompts else set()
    needed["comparisons"] = set() if given else {"train", "validation"}
    return set().union(*(needed.get(stage, set()) for stage in stages))


def check_rewards(config: DictConfig, planned: dict[str, Planned]) -> None:
    """Try the reward functions of the stages to be made before the first of them starts; raises `UserError`."""
    from threefold.chain import reward_checks

    for entry in planned.values():
        for key in STAGES[entry.stage].functions if not entry.artifact.finished else ():
            rewards.load(OmegaConf.select(config, key), rewards.GIVEN[entry.stage])
            reward_checks.check(config, entry.stage, key)
