"""The report in plain words: what training did, what it cost, and how far to trust it, from the run's numbers alone.

A sentence calls a difference clear only where its 95 % interval leaves out zero and the evaluation's own test,
corrected for all its tests, agrees.
"""

from dataclasses import dataclass

from threefold.evaluation import checkup, statistics
from threefold.report import compare, evaluation, stages
from threefold.report.compare import Difference, Row
from threefold.report.models import roles
from threefold.report.run import REFERENCE, Run, aligned, display_name, opening
from threefold.runs import frontier, seeds


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
    summary = [
        Group("What training did", [*gains(run, rows), *contest(run, rows), *untrained(run, rows), *learnt(run)]),
        Group("What it cost", compare.costs(run, rows, aligned(run))),
        Group("How far it can be pushed", pushed(run)),
        Group("Over several seeds", over_seeds(run)),
        Group("How far to trust it", [*reward_model(run), *proxy(run, rows), *caveats(run)]),
    ]
    return [group for group in summary if group.sentences]


def learnt(run: Run) -> list[str]:
    """Pretraining and SFT against what costs nothing."""
    sentences, stages = [], run.stages
    if "pretrain" in stages:
        best, bits = min(stages["pretrain"]["baselines"].items(), key=lambda item: item[1])
        sentences.append(
            f"Pretraining reached {stages['pretrain']['bits_per_byte']:.3f} bits per byte on held-out text; the best "
            f"of the baselines, {best}, {bits:.3f}."
        )
    if "sft" in stages:
        after, before = (stages["sft"][f"reply_bits_per_byte{end}"] for end in ("", "_base"))
        word = "lowered" if after < before else "raised"
        sentences.append(
            f"SFT {word} the bits per byte of people's replies from {before:.3f} to {after:.3f}; "
            f"{stages['sft']['ended_share']:.1%} of its samples end."
        )
    return sentences


def gains(run: Run, rows: list[Row]) -> list[str]:
    """What each aligned model gained over SFT by both judges, and at what KL."""
    sentences = []
    for name in aligned(run):
        gain = compare.tested(run.evaluation, rows, name, REFERENCE)
        if gain is None:
            sentences.append(_alone(run, name))
            continue
        second = compare.tested(run.evaluation, rows, name, REFERENCE, "second")
        score = "the score of the gold judge"
        word = {1: f"raised {score}", -1: f"lowered {score}"}.get(
            gain.sign, "is not distinguishable from SFT by the gold judge"
        )
        sentences.append(
            f"{opening(display_name(name))} {word}, {run.evaluation['judge']}: {gain.shown()} over SFT, "
            f"from {gain.other:.3f} to {gain.one:.3f}{_at_kl(run, name)}. {_second(run, gain, second)}"
        )
    return sentences


def _at_kl(run: Run, name: str) -> str:
    kl = run.models[name].get("kl")
    return "" if kl is None else f", at KL {kl:.2f} nats per reply"


def _alone(run: Run, name: str) -> str:
    metrics = run.models[name]
    interval = statistics.shown(metrics["gold_ci95"], ".3f")
    return (
        f"{opening(display_name(name))} scores {metrics['gold_mean']:.3f} {interval} by the gold judge, "
        f"{run.evaluation['judge']}; SFT was not evaluated beside it."
    )


def _second(run: Run, gain: Difference, second: Difference | None) -> str:
    judge = f"The second judge, {run.evaluation['second_judge']}"
    apart = "" if roles(run, "second_judge") else ", which took no part in training,"
    if second is None:
        return f"{judge}, scored too few replies to say."
    if second.sign == 0:
        return f"{judge}{apart} sees no clear difference ({second.shown()})."
    way = "agrees" if second.sign == gain.sign else "sees a rise" if second.sign > 0 else "sees a fall"
    return f"{judge}{apart} {way} ({second.shown()})."


def contest(run: Run, rows: list[Row]) -> list[str]:
    """The best aligned model by the gold judge against each other one."""
    best, sentences = leader(run), []
    if best is None:
        return []
    for name in aligned(run):
        if name != best and (gain := compare.tested(run.evaluation, rows, best, name)):
            sentences.append(f"{opening(_beside(best, name, gain))}.")
    return sentences


def leader(run: Run) -> str | None:
    """The aligned model that the gold judge scores highest on average."""
    return max(aligned(run), key=lambda name: run.models[name]["gold_mean"], default=None)


def _beside(one: str, other: str, gain: Difference) -> str:
    word = {1: "is ahead of", -1: "is behind", 0: "is not distinguishable from"}[gain.sign]
    return f"{display_name(one)} {word} {display_name(other)} by the gold judge ({gain.shown()})"


def untrained(run: Run, rows: list[Row]) -> list[str]:
    """Where the base model is not below the best aligned one: a judge that it pleases may not ask for much."""
    best = leader(run)
    if best is None or (gain := compare.between(rows, best, "base")) is None or gain.sign > 0:
        return []
    base = run.models["base"]
    return [
        f"{opening(_beside(best, 'base', gain))}, whose replies are {base['length']:.0f} characters long on average "
        f"and of which {base['ended_share']:.1%} end: the judge alone does not say that a reply is good."
    ]


def reward_model(run: Run) -> list[str]:
    """Whether the reward model passed its gate, and whether PPO used it all the same."""
    if not stages.checked(run):
        return []
    metrics = run.stages["reward"]
    failed = checkup.failures(metrics, run.config.reward.gate)
    passed = f"fails its gate: {'; '.join(failed)}" if failed else "passes every limit of its gate"
    right, *compared = checkup.verdict(metrics, run.config.reward.gate)[max(1, len(failed)) :][:3]
    sentences = [f"The reward model {passed}. It is {right[0].lower()}{right[1:]} {' '.join(compared)}"]
    if failed and run.manifests.get("ppo", {}).get("parts", {}).get("ppo.ignore_gate"):
        sentences.append("PPO used that reward model all the same, as ppo.ignore_gate=true asks.")
    return sentences


def proxy(run: Run, rows: list[Row]) -> list[str]:
    """Whether PPO pleased its reward model without pleasing the gold judge."""
    if "ppo" not in run.models or REFERENCE not in run.models:
        return []
    paid, gold = (compare.tested(run.evaluation, rows, "ppo", REFERENCE, judge) for judge in ("reward_model", "gold"))
    if paid is None or gold is None or paid.sign <= 0:
        return []
    ends = {
        1: "and the gold judge's rose with it",
        0: "while of the gold judge's no clear change is seen",
        -1: "while the gold judge's fell: over-optimised",
    }
    rose = f"rose by {paid.shown('+.2f')} of its standard deviations"
    return [f"The reward model's score of PPO's replies {rose}, {ends[gold.sign]}."]


def pushed(run: Run) -> list[str]:
    """What the frontier advises, where it was run."""
    measured = frontier.current(run.folder)
    return measured["advice"] if measured else []


def over_seeds(run: Run) -> list[str]:
    """Which differences between models hold over seeds, where there are several."""
    over_seeds = seeds.current(run.folder)
    return [opening(f"{claim}.") for claim in seeds.claims(over_seeds)] if over_seeds else []


def caveats(run: Run) -> list[str]:
    """Guards that ended training, contamination, and what the intervals leave out."""
    sentences = []
    if stopped := run.stages.get("ppo", {}).get("stopped"):
        sentences.append(f"PPO was ended by a guard: {stopped}.")
    if counts := evaluation.contamination_counts(run):
        sentences.append(evaluation.contamination_sentence(counts))
    for judge, key in (("gold", "gold_unscored"), ("second", "second_judge_unscored")):
        counts = [
            f"{metrics[key]:,} of {display_name(name)}" for name, metrics in run.models.items() if metrics.get(key)
        ]
        if counts:
            sentences.append(
                f"The {judge} judge gives no score to some replies, which its means leave out: {', '.join(counts)}."
            )
    if run.models and not over_seeds(run):
        sentences.append(
            f"Intervals are over {run.evaluation['prompts']} held-out prompts, not over training runs: another seed "
            "may give another result (seeds=5 shows how much)."
        )
    elif run.models:
        sentences.append("Differences over seeds are between training runs; they say little about other prompts.")
    return sentences


def cards(run: Run) -> list[Card]:
    """The numbers that the page begins with."""
    rows, shown, stages = run.samples(), [], run.stages
    for name in aligned(run):
        if gain := compare.between(rows, name, REFERENCE):
            note = f"{run.evaluation['judge']} over SFT, {statistics.shown(gain.interval, '+.3f')}"
            shown.append(Card(f"{opening(display_name(name))}, gain", f"{gain.mean:+.3f}", note, name))
    if "kl" in run.models.get("ppo", {}):
        shown.append(Card("PPO, KL", f"{run.models['ppo']['kl']:.2f}", "nats per reply from SFT", "ppo"))
    if "reward" in stages:
        right, ends = stages["reward"]["accuracy"], statistics.shown(stages["reward"]["accuracy_ci95"], ".1%")
        shown.append(Card("Reward model", f"{right:.1%}", f"right on held-out pairs, {ends}", "reward"))
    if "pretrain" in stages:
        bits = stages["pretrain"]["bits_per_byte"]
        shown.append(Card("Base model", f"{bits:.3f}", "bits per byte, held out", "base"))
    seconds = sum(metrics["seconds"] for metrics in stages.values())
    shown.append(Card("Time", f"{seconds / 60:,.0f} min", f"{len(stages)} stages together"))
    return shown
