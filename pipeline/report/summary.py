"""The report in plain words: what training did, what it cost, and how far to trust it, from the run's numbers alone.

A difference is called one only where its 95 % interval leaves out zero.
"""

from dataclasses import dataclass

from pipeline import checkup, statistics
from pipeline.report import differences
from pipeline.report.differences import LENGTH, Difference, Row
from pipeline.report.models import contaminated
from pipeline.report.names import in_order, interval, opening, said
from pipeline.report.run import Run

REFERENCE = "sft"  # what aligned models are compared with
UNALIGNED = ("human", "base", REFERENCE)


@dataclass(frozen=True)
class Group:
    """Sentences under one heading."""

    title: str
    sentences: list[str]


@dataclass(frozen=True)
class Card:
    """A number that the page begins with: what it is, how large, and what it is measured against."""

    label: str
    value: str
    note: str
    model: str = ""  # whose colour it has


def groups(run: Run) -> list[Group]:
    """The whole summary; groups that would be empty are left out."""
    rows = run.samples()
    found = [
        Group("What training did", [*learnt(run), *gains(run, rows), *contest(run, rows), *untrained(run, rows)]),
        Group("What it cost", costs(run, rows)),
        Group("How far to trust it", [*reward_model(run), *proxy(run, rows), *caveats(run)]),
    ]
    return [group for group in found if group.sentences]


def aligned(run: Run) -> list[str]:
    """The models that were trained, or chosen, by preferences or rewards."""
    return [name for name in in_order(run.models) if name not in UNALIGNED]


def learnt(run: Run) -> list[str]:
    """Pretraining and SFT against what costs nothing."""
    found, stages = [], run.stages
    if "pretrain" in stages:
        best, bits = min(stages["pretrain"]["baselines"].items(), key=lambda item: item[1])
        found.append(
            f"Pretraining reached {stages['pretrain']['bits_per_byte']:.3f} bits per byte on held-out text; the best of the "
            f"baselines, {best}, {bits:.3f}."
        )
    if "sft" in stages:
        after, before = (stages["sft"][f"reply_bits_per_byte{end}"] for end in ("", "_base"))
        word = "lowered" if after < before else "raised"
        found.append(
            f"SFT {word} the bits per byte of people's replies from {before:.3f} to {after:.3f}; "
            f"{stages['sft']['ended_share']:.1%} of its samples end."
        )
    return found


def gains(run: Run, rows: list[Row]) -> list[str]:
    """What each aligned model gained over SFT by both judges, and at what KL."""
    found = []
    for name in aligned(run):
        gain = differences.between(rows, name, REFERENCE)
        if gain is None:
            found.append(_alone(run, name))
            continue
        second = differences.between(rows, name, REFERENCE, "second")
        word = {1: "raised", -1: "lowered", 0: "did not clearly change"}[gain.sign]
        found.append(
            f"{opening(said(name))} {word} the score of the gold judge, {run.evaluation['judge']}: {gain.shown()} over SFT, from "
            f"{gain.other:.3f} to {gain.one:.3f}, at KL {run.models[name]['kl']:.2f} nats per reply. {_second(run, gain, second)}"
        )
    return found


def _alone(run: Run, name: str) -> str:
    metrics = run.models[name]
    return (
        f"{opening(said(name))} scores {metrics['gold_mean']:.3f} {interval(metrics['gold_ci95'], '.3f')} by the gold judge, "
        f"{run.evaluation['judge']}; SFT was not evaluated beside it."
    )


def _second(run: Run, gain: Difference, second: Difference | None) -> str:
    judge = f"The second judge, {run.evaluation['second_judge']}"
    if second is None:
        return f"{judge}, scored too few replies to say."
    if second.sign == 0:
        return f"{judge}, which took no part in training, sees no clear difference ({second.shown()})."
    way = "agrees" if second.sign == gain.sign else "sees a rise" if second.sign > 0 else "sees a fall"
    return f"{judge}, which took no part in training, {way} ({second.shown()})."


def contest(run: Run, rows: list[Row]) -> list[str]:
    """Each two aligned models against each other by the gold judge."""
    names, found = aligned(run), []
    for place, later in enumerate(names):
        for earlier in names[:place]:
            if gain := differences.between(rows, later, earlier):
                found.append(f"{opening(_beside(later, earlier, gain))}.")
    return found


def _beside(one: str, other: str, gain: Difference) -> str:
    word = {1: "is ahead of", -1: "is behind", 0: "is not distinguishable from"}[gain.sign]
    return f"{said(one)} {word} {said(other)} by the gold judge ({gain.shown()})"


def untrained(run: Run, rows: list[Row]) -> list[str]:
    """Where the base model is not below the best aligned one: a judge that it pleases may not ask for much."""
    best = max(aligned(run), key=lambda name: run.models[name]["gold_mean"], default=None)
    gain = differences.between(rows, best, "base") if best else None
    if gain is None or gain.sign > 0:
        return []
    base = run.models["base"]
    return [
        f"{opening(_beside(best, 'base', gain))}, whose replies are {base['length']:.0f} characters long on average and of which "
        f"{base['ended_share']:.1%} end: the judge alone does not say that a reply is good."
    ]


def costs(run: Run, rows: list[Row]) -> list[str]:
    """What became longer, endless, repetitive or less likely, for each aligned model against SFT."""
    found = []
    for name in aligned(run) if REFERENCE in run.models else []:
        clauses = [length(rows, name), ended(run, name), repetition(rows, name), tax(run, name)]
        found.append(f"{opening(said(name))}: {'; '.join(clause for clause in clauses if clause)}.")
    return found


def length(rows: list[Row], name: str) -> str:
    """Whether replies are longer or shorter than those of SFT."""
    change = differences.between(rows, name, REFERENCE, LENGTH)
    if change is None:
        return ""
    word = {1: "replies are longer", -1: "replies are shorter", 0: "the length of replies did not clearly change"}[change.sign]
    return f"{word}, {change.other:.0f} to {change.one:.0f} characters ({change.shown('+.0f')})"


def ended(run: Run, name: str) -> str:
    """Whether replies end less often; shares are told apart where their own intervals do not overlap."""
    shares, prompts = [run.models[model].get("ended_share") for model in (REFERENCE, name)], run.evaluation["prompts"]
    if None in shares:
        return ""
    before, after = (share_interval(share, prompts) for share in shares)
    word = "did not clearly change"
    if after[1] < before[0] or after[0] > before[1]:
        word = "fell" if after[1] < before[0] else "rose"
    return f"the share of replies that end {word}, {shares[0]:.1%} to {shares[1]:.1%}"


def share_interval(share: float, count: int) -> list[float]:
    """Wilson's interval of a share of `count`."""
    ones = round(share * count)
    return statistics.share_interval([1.0] * ones + [0.0] * (count - ones))


def repetition(rows: list[Row], name: str) -> str:
    """Whether replies repeat themselves more."""
    change = differences.between(rows, name, REFERENCE, differences.REPETITION)
    if change is None:
        return ""
    word = {1: "replies repeat themselves more", -1: "replies repeat themselves less"}.get(change.sign)
    return f"{word or 'repetition did not clearly change'}, {change.other:.1%} to {change.one:.1%} of word triples"


def tax(run: Run, name: str) -> str:
    """What became of the language model: bits per byte of base text."""
    before, after = (run.models[model].get("text_bits_per_byte") for model in (REFERENCE, name))
    if before is None or after is None:
        return ""
    base = run.models.get("base", {}).get("text_bits_per_byte")
    beside = f", the base model {base:.3f}" if base is not None else ""
    word = "worse" if after > before else "better"
    return f"base text is predicted {word}, {before:.3f} to {after:.3f} bits per byte ({after / before - 1:+.1%}){beside}"


def reward_model(run: Run) -> list[str]:
    """Whether the reward model passed its gate, and whether PPO used it all the same."""
    metrics = run.stages.get("reward", {})
    if "reliability" not in metrics:
        return []
    failed = checkup.failures(metrics, run.config.reward.gate)
    passed = f"fails its gate: {'; '.join(failed)}" if failed else "passes every limit of its gate"
    right, *compared = checkup.verdict(metrics, run.config.reward.gate)[max(1, len(failed)) :][:3]
    found = [f"The reward model {passed}. It is {right[0].lower()}{right[1:]} {' '.join(compared)}"]
    if failed and run.manifests.get("ppo", {}).get("parts", {}).get("ppo.ignore_gate"):
        found.append("PPO used that reward model all the same, as ppo.ignore_gate=true asks.")
    return found


def proxy(run: Run, rows: list[Row]) -> list[str]:
    """Whether PPO pleased its reward model without pleasing the gold judge."""
    if "ppo" not in run.models or REFERENCE not in run.models:
        return []
    paid, gold = (differences.between(rows, "ppo", REFERENCE, judge) for judge in ("reward_model", "gold"))
    if paid is None or gold is None or paid.sign <= 0:
        return []
    end = "and the gold judge's rose with it" if gold.sign > 0 else "while the gold judge's did not: over-optimised"
    return [f"The reward model's score of PPO's replies rose by {paid.shown('+.2f')} of its standard deviations, {end}."]


def caveats(run: Run) -> list[str]:
    """Guards that ended training, contamination, and what the intervals leave out."""
    found = []
    if stopped := run.stages.get("ppo", {}).get("stopped"):
        found.append(f"PPO was ended by a guard: {stopped}.")
    if contamination := run.evaluation.get("contamination"):
        found.append(contaminated(contamination))
    if run.models:
        found.append(
            f"Intervals are over {run.evaluation['prompts']} held-out prompts, not over training runs: another seed may give "
            "another result."
        )
    return found


def cards(run: Run) -> list[Card]:
    """Up to six numbers that the page begins with."""
    rows, found, stages = run.samples(), [], run.stages
    for name in aligned(run):
        if gain := differences.between(rows, name, REFERENCE):
            note = f"{run.evaluation['judge']} over SFT, {interval((gain.low, gain.high), '+.3f')}"
            found.append(Card(f"{opening(said(name))}, gain", f"{gain.mean:+.3f}", note, name))
    if "kl" in run.models.get("ppo", {}):
        found.append(Card("PPO, KL", f"{run.models['ppo']['kl']:.2f}", "nats per reply from SFT", "ppo"))
    if "reward" in stages:
        ends = interval(stages["reward"]["accuracy_ci95"], ".1%")
        found.append(Card("Reward model, accuracy", f"{stages['reward']['accuracy']:.1%}", f"held-out pairs, {ends}"))
    if "pretrain" in stages:
        found.append(Card("Base model", f"{stages['pretrain']['bits_per_byte']:.3f}", "bits per byte, held out", "base"))
    seconds = sum(metrics["seconds"] for metrics in stages.values())
    found.append(Card("Time", f"{seconds / 60:,.1f} min", f"{len(stages)} stages together"))
    return found
