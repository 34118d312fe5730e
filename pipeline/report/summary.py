"""The report in plain words: the verdict, what training did, what it cost, and how far to trust it, from numbers alone.

A sentence calls a difference clear only where its 95 % interval leaves out zero and the evaluation's own test,
corrected for all its tests, agrees.
"""

from dataclasses import dataclass

from threefold.evaluation import checkup, statistics
from threefold.report import compare, evaluation, stages
from threefold.report.compare import Difference, Row
from threefold.report.models import labeller, roles
from threefold.report.run import REFERENCE, Run, aligned, display_name, opening, studies_in
from threefold.runs import frontier, seeds, sweep_table


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


def _at_kl(run: Run, name: str, unit: bool = True) -> str:
    kl = run.models[name].get("kl")
    return "" if kl is None else f", at KL {kl:.2f}{' nats per reply' * unit}"


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
    parts = run.manifests.get("ppo", {}).get("parts", {})
    of_parts = [parts[key] for key in parts if key.startswith("ppo.reward.parts.") and key.endswith(".function")]
    functions = of_parts or [parts.get("ppo.reward.function")]
    if failed and parts.get("ppo.ignore_gate") and any(name is None or "learned" in name for name in functions):
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


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 7 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def cards(run: Run) -> list[Card]:
    """The numbers that the page begins with."""
    rows, shown, stages = run.samples(), [], run.stages
    for name in trained(run):
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
    shown.append(Card("Time", duration(seconds), f"{len(stages)} stages together"))
    return shown


ALIGNING = ("comparisons", "reward", "dpo", "ppo")  # the stages whose time alignment costs


@dataclass(frozen=True)
class Example:
    """One prompt with the replies of some models, and the rule that chose it."""

    rule: str
    row: Row
    models: list[str]


@dataclass(frozen=True)
class Verdict:
    """Sentences, whether they say that all went well (None: nothing is claimed), DPO's alarm, and an example."""

    sentences: list[str]
    good: bool | None = None
    alarm: str = ""
    example: Example | None = None


Gains = dict[str, Difference]  # model → gold judge's score over SFT


def verdict(run: Run) -> Verdict:
    """The verdict of a run; of a sweep or a frontier without an evaluation of its own, what these came to."""
    if not run.evaluation:
        return Verdict(studied(run) or ["Whether alignment worked is not known yet: this run has no evaluation."])
    rows, names = run.samples(), trained(run)
    gains = {name: gain for name in names if (gain := compare.tested(run.evaluation, rows, name, REFERENCE))}
    if not gains:
        scores = ", ".join(f"{display_name(name)} {run.models[name]['gold_mean']:.3f}" for name in run.models)
        beside = "SFT was not evaluated beside an aligned model" if names else "no aligned model was evaluated"
        return Verdict([f"Whether alignment worked is not known: {beside}. By {run.evaluation['judge']}: {scores}."])
    best = max(gains, key=lambda name: (gains[name].sign, gains[name].mean))
    second = compare.tested(run.evaluation, rows, best, REFERENCE, "second")
    drift = run.evaluation.get("dpo_drift", {})
    alarm = f"{statistics.alarm_in_words(drift)}." if drift.get("alarm") else ""
    good = (gains[best].sign > 0 and second is not None and second.sign >= 0 and not alarm) if _clear(gains) else None
    sentences = [worked(run, gains, best), doubts(run, rows, best, second), cost(run, best)]
    return Verdict([line for line in sentences if line], good, alarm, example(run, rows, best, list(gains)))


def legend(run: Run) -> list[str]:
    """Which judges labelled and scored, and how the verdict's numbers are to be read; empty without an evaluation."""
    reading = (
        "How to read it: a score is on the scale of its judge; [a, b] is a 95 % interval over prompts; KL is in nats, "
        "0 where a model replies as SFT does; fewer bits per byte are better."
    )
    return [line for line in (labeller(run), reading) if line] if run.evaluation else []


def studied(run: Run) -> list[str]:
    """What a sweep and a frontier of the run came to."""
    kinds, sentences = studies_in(run.folder), []
    if "sweep" in kinds and (sweep := sweep_table.current(run.folder)):
        first, *others = sweep_table.sentences(sweep)
        sentences += [line for line in others if line.startswith("Best: ")] or [first]
    if "frontier" in kinds and (measured := frontier.current(run.folder)):
        sentences += measured["advice"]
    return sentences


def trained(run: Run) -> list[str]:
    """The models that were trained by preferences or rewards; without any, those whose replies are chosen by them."""
    names = aligned(run)
    return [name for name in names if name in ("dpo", "ppo")] or names


def _clear(gains: Gains) -> bool:
    return any(gain.sign for gain in gains.values())


def worked(run: Run, gains: Gains, best: str) -> str:
    """Whether the gold judge prefers the aligned models to SFT, by how much, and at what KL; the best first."""
    judge = f"the gold judge, {run.evaluation['judge']}"
    if gains[best].sign > 0:
        word = f"Alignment worked by {judge}"
    elif worse := [display_name(name) for name in gains if gains[name].sign < 0]:
        word = f"Alignment did not work: by {judge}, replies of {' and '.join(worse)} became worse"
    else:
        word = f"No effect of alignment is clear by {judge}"
    order = [best, *(name for name in gains if name != best)]
    clauses = [f"{display_name(name)} {gains[name].shown()}{_at_kl(run, name, name == best)}" for name in order]
    return f"{word}. Scores over SFT's {gains[best].other:.3f}: {'; '.join(clauses)}."


def doubts(run: Run, rows: list[Row], best: str, second: Difference | None) -> str:
    """What the second judge and the base model say to the gold judge's verdict on the `best` model."""
    judge = f"the second judge, {run.evaluation['second_judge']}"
    if second is None:
        seen = f"{judge}, scored too few replies to say"
    else:
        word = {1: "sees a rise", 0: "sees no clear change", -1: "sees a fall"}[second.sign]
        seen = f"{judge}, {word} ({second.shown()})"
    base = compare.between(rows, best, "base")
    if base is None or base.sign > 0:
        return f"Of {display_name(best)}, {seen}."
    below = "by the gold judge it is not clearly above the base model, which nobody aligned"
    return f"Of {display_name(best)}, {seen}; {below}."


def cost(run: Run, best: str) -> str:
    """The time of the stages that align, and what became of length and base text."""
    seconds = sum(run.stages[stage]["seconds"] for stage in ALIGNING if stage in run.stages)
    before, after = run.models[REFERENCE], run.models[best]
    changes = [f"replies go from {before['length']:.0f} to {after['length']:.0f} characters"]
    if "text_bits_per_byte" in before and "text_bits_per_byte" in after:
        bits = [metrics["text_bits_per_byte"] for metrics in (before, after)]
        changes.append(f"held-out text from {bits[0]:.3f} to {bits[1]:.3f} bits per byte")
    return f"It cost {duration(seconds)} after SFT; with {display_name(best)}, {' and '.join(changes)}."


def example(run: Run, rows: list[Row], best: str, models: list[str]) -> Example | None:
    """The prompt at which `best` gains the median over SFT; None where the configuration asks for no samples."""
    changes = []
    for number, row in enumerate(rows):
        if all(name in row for name in (best, REFERENCE, *models)):
            after, before = (compare.value(row, name, "gold") for name in (best, REFERENCE))
            if after is not None and before is not None:
                changes.append((after - before, number))
    if not changes or not run.evaluation.get("shown", 0):
        return None
    number = sorted(changes)[(len(changes) - 1) // 2][1]
    rule = (
        f"Chosen by a rule: of {len(changes)} held-out prompts, the one at which {display_name(best)}'s gain over SFT "
        f"by {run.evaluation['judge']} is the median."
    )
    return Example(rule, rows[number], [REFERENCE, *models])
