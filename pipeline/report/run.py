"""What a run has left behind, what the configuration asks for beyond it, and how its models are ordered and named."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from threefold import chain
from threefold.chain.plans import FRESH, State, state_in_run
from threefold.errors import UserError, nearest
from threefold.evaluation.players import player
from threefold.fileio import read_json, read_lines
from threefold.labelling import votes_arena
from threefold.runs import frontier, sweep_table
from threefold.stages import STAGES, needed_by, parents

ORDER = ("human", "base", "sft", "dpo", "ppo")
REFERENCE = "sft"  # what aligned models are compared with
DISPLAY_NAMES = {"human": "people", "base": "the base model", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
UNALIGNED = ("human", "base", REFERENCE)


@dataclass(frozen=True)
class Run:
    """A run's finished stages with metrics and manifests, and the state of each that the configuration asks for."""

    name: str
    folder: Path
    stages: dict[str, dict[str, Any]]  # finished stage → its metrics
    manifests: dict[str, dict[str, Any]]
    config: DictConfig = field(default_factory=lambda: DictConfig({}))  # empty of a run that is only compared with
    states: dict[str, State] = field(default_factory=dict)
    unknown: str = ""  # why the states could not be found out
    other: "Run | None" = None  # the run that this one is compared with

    @property
    def outdated(self) -> dict[str, list[str]]:
        """Stages that were made from an older artifact than the run now links to, with those parents."""
        linked = {name: manifest["fingerprint"] for name, manifest in self.manifests.items()}
        older_parents = {
            name: [p for p, made_from in manifest["parents"].items() if linked.get(p, made_from) != made_from]
            for name, manifest in self.manifests.items()
        }
        return {name: older for name, older in older_parents.items() if older}

    @property
    def evaluation(self) -> dict[str, Any]:
        """Metrics of the evaluation; empty where there is none."""
        return self.stages.get("evaluate", {})

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Metrics of each model that was evaluated."""
        return self.evaluation.get("models", {})

    def asks_for(self, stage: str) -> bool:
        """Whether the run has the stage or the configuration asks for it."""
        return stage in self.stages or stage in self.states

    def lacks(self, stage: str) -> str:
        """A sentence saying why there is nothing of a stage to show; empty where there is."""
        return "" if stage in self.stages else f"{sentence(self.name, [stage], self.states[stage])}."

    def samples(self) -> list[dict[str, Any]]:
        """Every held-out prompt with each model's reply and its scores."""
        return read_lines(self.folder / "evaluate" / "samples.jsonl")

    def parents(self, stage: str) -> list[str]:
        """The stages that a stage was made from, or would be."""
        return list(self.manifests[stage]["parents"]) if stage in self.manifests else parents(stage, self.config)


def finished(folder: Path) -> list[str]:
    """The finished stages of the run in `folder`, in the order they run."""
    return [name for name in STAGES if (folder / name / "manifest.json").is_file()]


def read(folder: Path) -> Run:
    """What the finished stages of the run in `folder` left behind."""
    made = finished(folder)
    metrics = {name: read_json(folder / name / "metrics.json") for name in made}
    return Run(folder.name, folder, metrics, {name: read_json(folder / name / "manifest.json") for name in made})


def configured(config: DictConfig, compare: str | None = None) -> Run:
    """The run of a configuration, beside the run `compare`; raises `UserError` where either has no finished stage."""
    chain.require_finished(config)
    folder = Path(config.runs) / config.run
    run = read(folder)
    other = None if compare is None else _other(folder, compare)
    try:
        planned, unknown = chain.plan(config), ""
        states = {name: state_in_run(entry, run.manifests.get(name)) for name, entry in planned.items()}
        if studies_in(folder) and "evaluate" not in run.stages:  # what its variants have, the run itself need not have
            states = {name: state for name, state in states.items() if state.word not in ("missing", "unlinked")}
    except UserError as error:  # a run can be read on a machine without its data
        states = {name: State(FRESH if name in run.stages else "missing") for name in needed_by(None, config)}
        unknown = str(error)
    add_votes(run.stages, config)
    return Run(run.name, folder, run.stages, run.manifests, config, states, unknown, other)


def studies_in(folder: Path) -> list[str]:
    """Which of a sweep and a frontier the run in `folder` has, made from the stages that it has now."""
    kinds = {"sweep": sweep_table.current, "frontier": frontier.current}
    return [name for name, current in kinds.items() if current(folder) is not None]


def add_votes(stages: dict[str, Any], config: DictConfig) -> None:
    """Add the arena by people's votes, where there are any on the evaluation's replies; says so in one line."""
    if "evaluate" not in stages or (votes := votes_arena.of_run(config)) is None:
        return
    print(f"{votes_arena.votes_file(config)}: {votes_arena.in_words(votes)}")
    if "arena" in votes:
        stages["evaluate"].setdefault("arena", {})["people"] = votes.pop("arena")
    stages["evaluate"]["people"] = votes


def _other(folder: Path, name: str) -> Run:
    names = [other.name for other in sorted(folder.parent.iterdir()) if other != folder and finished(other)]
    if name not in names:
        listed = f"{nearest(name, names)}; there are {', '.join(names)}" if names else "; there is no other"
        raise UserError(f"--compare {name}: no other run of {folder.parent} with a finished stage{listed}")
    return read(folder.parent / name)


def command(run: str, target: str | None) -> str:
    """The command that makes `target`, or the whole run; it takes the overrides that the run keeps."""
    return f"threefold run {f'target={target} ' if target else ''}run={run}"


def sentence(run: str, stages: list[str], state: State) -> str:
    """What became of stages that are not fresh, all in the same state, and what to do."""
    one = len(stages) == 1
    make = command(run, stages[0] if one else None)
    words = {
        "missing": f"{'has' if one else 'have'} not run; to make {'it' if one else 'them'}: {make}",
        "unlinked": f"{'is' if one else 'are'} not part of this run, although made elsewhere; to take over: {make}",
        "failed": f"failed: {state.reason.removeprefix(f'{stages[0]}: ')}; to try again: {make}",
        "interrupted": f"was interrupted; to go on from its last checkpoint: {make}",
        "running": "is running now; write the report again when it is done",
        "stale": f"is not what the configuration given asks for: {state.reason}",
    }
    return f"{', '.join(stages)} {words[state.word]}"


def notices(run: Run) -> list[str]:
    """What is missing, failed or out of date, one sentence each; empty for a run that is whole."""
    sentences = [f"Whether the stages are up to date is not known: {run.unknown}"] if run.unknown else []
    for word in ("failed", "interrupted", "running"):
        sentences += [sentence(run.name, [s], state) for s, state in run.states.items() if state.word == word]
    for word in ("missing", "unlinked"):
        if stages := [stage for stage, state in run.states.items() if state.word == word]:
            sentences.append(sentence(run.name, stages, State(word)))
    if stale := [f"{stage} ({state.reason})" for stage, state in run.states.items() if state.word == "stale"]:
        sentences.append(f"Made with another configuration than the one given: {'; '.join(stale)}")
    older = run.outdated.items()
    return sentences + [
        f"{stage} was made from an earlier {', '.join(parents)} than the one listed here" for stage, parents in older
    ]


def in_order(names: Iterable[str]) -> list[str]:
    """Names as the report lists them: ways to decode behind the model they sample from, other runs' models last."""
    return sorted(names, key=lambda name: (_place(name), len(name), name))


def _place(name: str) -> float:
    if name in ORDER:
        return ORDER.index(name)
    model = name.partition("_")[0]
    return len(ORDER) if "/" in name else ORDER.index(model if model in ORDER else REFERENCE) + 0.5


def display_name(name: str) -> str:
    """A model's name within a sentence."""
    return DISPLAY_NAMES.get(name, name.replace("_", "-"))


def opening(sentence: str) -> str:
    """The sentence with a capital letter."""
    return sentence[:1].upper() + sentence[1:]


def aligned(run: Run) -> list[str]:
    """The models of this run that were trained, or whose replies are chosen, by preferences or rewards."""
    return [name for name in in_order(run.models) if _by_preferences(name)]


def _by_preferences(name: str) -> bool:
    """Whether preferences or rewards are behind a model of this run; behind a vote over samples there are none."""
    if "/" in name or name in UNALIGNED:
        return False
    parsed = player(name, "evaluate.models")
    return parsed.model in ("dpo", "ppo") or parsed.decoding == "best_of"
