"""Threefold in a program or notebook; the command line is built on these functions.

import threefold

run = threefold.make("experiment=smoke", "run=tiny", "target=ppo")
run.steps("ppo")[["step", "kl", "score"]]
run.sample("ppo", ["Hello there"], count=2)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from threefold.artifacts.artifact import COSTS
from threefold.errors import UserError
from threefold.fileio import numbers, read_json, read_lines
from threefold.schema.config import Config
from threefold.stages import STAGES, needed_by

if TYPE_CHECKING:  # these take seconds to import
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from threefold.columns import Message


def compose(*overrides: str) -> Config:
    """The checked, read-only configuration of `conf/` with `overrides` in Hydra's syntax, as "ppo.kl_coef=0.1".

    That of a run which is there starts from what the run was told, as every command does.
    Raises `UserError`, one line, for an unknown key or choice, a wrong type, or a value outside its limits.
    """
    from threefold.config import choices

    return cast(Config, choices.compose_run(overrides)[0])


def make(*overrides: str) -> "Run":
    """Bring `target`, or the whole chain, up to date, as `threefold run` does; returns the run.

    `launcher=slurm` waits for its jobs, `seeds=N` makes a run for each seed, `rounds=N` one for each round of DPO.
    Raises `UserError` for bad input, before any long work.
    """
    config, told = begin(overrides)
    config, last = last_round(config, told)
    bring_up_to_date(config, last)
    return Run(Path(config.runs) / config.run)


def begin(overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """The configuration of a run that is to be made, and all overrides that it is composed from.

    A target before DPO is made without the rounds that the run keeps, and what depends on it waits for them.
    """
    from threefold.config import choices

    config, told = choices.compose_run(overrides)
    kept = config.rounds is not None and "rounds" not in map(choices.key_of, overrides)
    if kept and config.target in STAGES and "dpo" not in needed_by(config.target, config):
        told += ["rounds=null", "dependents=false"]  # behind `run`, so that they are not stored
        config = choices.compose(told)
    let_go(config)
    return config, told


def let_go(config: Any) -> None:
    """With takeover=true, have jobs that were sent for the run link nothing into it any more.

    Raises `UserError` before that where data or rewards cannot be read.
    """
    if config.takeover:
        from threefold import chain
        from threefold.runs import rounds
        from threefold.slurm import job_records

        if config.rounds is not None:
            rounds.require(config)
        planned = chain.plan(config, chain.wanted(config) if config.rounds is None else needed_by(None, config))
        chain.check_sources(config, planned)
        chain.check_rewards(config, planned)
        job_records.let_go(config)


def last_round(config: Any, overrides: list[str]) -> tuple[Any, list[str]]:
    """The last round of `rounds`, all before it made: its configuration and overrides. Without rounds both as given."""
    if config.rounds is None:
        return config, overrides
    from threefold.config.compose import compose
    from threefold.runs import rounds

    *earlier, last = rounds.overrides_of(config, overrides)
    for number, given in enumerate(earlier, 1):
        if bring_up_to_date(compose(given), given):
            print(f"round {number} of {config.rounds} is made", flush=True)
    return compose(last), last


def bring_up_to_date(config: Any, overrides: list[str]) -> bool:
    """Make what `config`, composed from `overrides`, asks for; whether there was anything to make.

    Seeds and jobs in Slurm are composed anew from the overrides; for these the answer is always true.
    """
    if config.seeds is not None:
        from threefold.runs import seeds

        seeds.run(config, overrides)
        return True
    if config.launcher.kind == "slurm":
        from threefold.slurm import submission

        submission.run_in_slurm(config, overrides)
        return True
    from threefold import chain

    return bool(chain.bring_up_to_date(config, overrides))


def status(*overrides: str) -> "DataFrame":
    """A row for each stage of the chain: its state, the reason, fingerprint, time of making and main metric."""
    import pandas

    return pandas.DataFrame(states(composed(overrides)))


def composed(overrides: Sequence[str]) -> Any:
    """The configuration of a run that is there, with `rounds` that of the last round, which is the run itself."""
    from threefold.config.choices import compose_run

    config, told = compose_run(overrides, reads=True)
    if config.rounds is None:
        return config
    from threefold.config.compose import compose
    from threefold.runs import rounds

    return compose(rounds.overrides_of(config, told)[-1])


def states(config: Any) -> list[dict[str, Any]]:
    """A row for each stage of the chain, those that are with Slurm among them."""
    from threefold import chain
    from threefold.slurm import job_records

    return job_records.with_jobs(config, chain.status(config))


def open_run(folder: str | Path) -> "Run":
    """The run in a folder, for example runs/demo. Raises `UserError` where no stage of it is finished."""
    run = Run(Path(folder))
    if not run.stages:
        raise UserError(f"{folder}: has no finished stage; name the folder of a run, for example runs/demo")
    return run


class Run:
    """What a run has left in its folder. Stages are named as in the chain: pretrain, sft, reward, dpo, ppo, ..."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, stages={self.stages})"

    @property
    def stages(self) -> list[str]:
        """The finished stages, in the order they run."""
        return [stage for stage in STAGES if (self.folder / stage / "manifest.json").is_file()]

    def place(self, stage: str) -> Path:
        """The folder of a finished stage. Raises `UserError` for another name, or a stage that is not finished."""
        if stage not in self.stages:
            there = ", ".join(self.stages) or "none"
            raise UserError(f"{self.folder}: has no finished stage {stage}; finished: {there}")
        return self.folder / stage

    def config(self, stage: str) -> Any:
        """The configuration that the stage read, an OmegaConf `DictConfig`."""
        from omegaconf import OmegaConf

        return OmegaConf.load(self.place(stage) / "config.yaml")

    def metrics(self) -> "DataFrame":
        """The results that docs/metrics.md lists, without time and memory: columns stage, metric and value.

        Numbers within numbers have names with dots.
        """
        import pandas

        rows = [
            (stage, metric, value)
            for stage in self.stages
            for metric, value in numbers(read_json(self.place(stage) / "metrics.json"), COSTS).items()
        ]
        return pandas.DataFrame(rows, columns=["stage", "metric", "value"])

    def steps(self, stage: str) -> "DataFrame":
        """What a training stage logged, a row for each step, with the columns that docs/metrics.md lists."""
        import pandas

        return pandas.DataFrame(read_lines(self.place(stage) / "log.jsonl"))

    def model(self, stage: str, device: str = "cpu") -> "PreTrainedModel":
        """The model of a stage, ready for inference: a causal language model, or the first reward model."""
        from threefold.models import loading

        load = loading.load_reward_model if stage == "reward" else loading.load_policy
        return load(self.place(stage), device)

    def tokenizer(self, stage: str) -> "PreTrainedTokenizerBase":
        """The tokenizer of a stage, with the chat template that the run trains on."""
        from threefold.models import chat

        return chat.load_tokenizer(self.place(stage))

    def sample(
        self, stage: str, prompts: "list[str] | list[list[Message]]", count: int = 1, seed: int = 1, **settings: Any
    ) -> list[list[str]]:
        """`count` replies of a stage's model to each prompt: a text of the user, or messages with role and content.

        `settings` replace those of the run's `sampling`, for example temperature=0.5 or max_new_tokens=16. The same
        seed gives the same replies. Raises `UserError` where a prompt leaves too little room for a reply.
        """
        from omegaconf import OmegaConf

        from threefold.evaluation import measuring
        from threefold.models import chat

        sampling = self.config("sft").sampling
        if unknown := settings.keys() - sampling.keys():
            raise UserError(f"sample: has no setting {unknown.pop()}; there are {', '.join(sampling)}")
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        tokenizer = self.tokenizer(stage)
        prompt_ids = [chat.prompt_ids(tokenizer, messages) for messages in conversations]
        with_settings = cast(Any, OmegaConf.merge(sampling, settings))
        sampled = measuring.samples(self.model(stage), prompt_ids, count, with_settings, tokenizer, seed)
        return measuring.texts_of(tokenizer, sampled)
