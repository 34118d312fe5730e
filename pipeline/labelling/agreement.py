"""How far labellers agree: the share of agreeing votes, and kappa, which corrects it for agreement by chance.

Cohen 1960 (two labellers) and Fleiss 1971 (more). 1 is full agreement, 0 what chance alone would bring.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from threefold.labelling.votes import Vote

ENOUGH = 30  # shared pairs below which kappa's standard error is around 0.15 and more


@dataclass(frozen=True)
class Agreement:
    """What the votes of `labellers` on the pairs that all of them labelled say.

    `agreeing` is the share of pairs of votes that are equal, and None without shared pairs; `kappa` is None also
    where it is not defined, as everybody always gave one and the same answer.
    """

    labellers: tuple[str, ...]
    shared: int
    agreeing: float | None
    kappa: float | None


def cohen_kappa(first: list[str], second: list[str]) -> float | None:
    """Cohen's kappa of two labellers' answers to the same questions; chance is each one's own habit."""
    n = len(first)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    habits, others = Counter(first), Counter(second)
    return _corrected(observed, sum(habits[answer] * others[answer] for answer in habits) / n**2)


def fleiss_kappa(answers: list[list[str]]) -> float | None:
    """Fleiss' kappa; one list of answers a question, all of one length of two or more. Chance is the common habit."""
    if not answers:
        return None
    common = Counter(itertools.chain.from_iterable(answers))
    total = sum(common.values())
    return _corrected(agreeing_share(answers), sum((count / total) ** 2 for count in common.values()))


def agreeing_share(answers: list[list[str]]) -> float:
    """The share of pairs of answers to one question that are equal, averaged over questions."""
    shares = [
        sum(a == b for a, b in itertools.combinations(given, 2)) / (len(given) * (len(given) - 1) / 2)
        for given in answers
    ]
    return sum(shares) / len(shares)


def _corrected(observed: float, by_chance: float) -> float | None:
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def between(votes: Iterable[Vote], labellers: tuple[str, ...]) -> Agreement:
    """The agreement of two or more labellers on the pairs that each of them labelled."""
    winners: dict[str, dict[str, str]] = {labeller: {} for labeller in labellers}
    for vote in votes:
        if vote.labeller in winners:
            winners[vote.labeller][vote.pair] = vote.winner
    shared = set.intersection(*(set(given) for given in winners.values()))
    answers = [[winners[labeller][pair] for labeller in labellers] for pair in sorted(shared)]
    if not answers:
        return Agreement(labellers, 0, None, None)
    kappa = cohen_kappa(*map(list, zip(*answers, strict=True))) if len(labellers) == 2 else fleiss_kappa(answers)
    return Agreement(labellers, len(shared), agreeing_share(answers), kappa)


def summary(votes: list[Vote]) -> list[Agreement]:
    """All labellers together first, then, where there are three or more, each two of them; empty for fewer than two."""
    labellers = tuple(sorted({vote.labeller for vote in votes}))
    if len(labellers) < 2:
        return []
    twos = itertools.combinations(labellers, 2) if len(labellers) > 2 else ()
    return [between(votes, group) for group in (labellers, *twos)]


def in_words(agreement: Agreement) -> str:
    """An agreement as a sentence or two."""
    name = "Cohen’s" if len(agreement.labellers) == 2 else "Fleiss’"
    who = f"{', '.join(agreement.labellers[:-1])} and {agreement.labellers[-1]}"
    if not agreement.shared:
        return f"{who} have no pair in common yet."
    pairs = "1 shared pair" if agreement.shared == 1 else f"{agreement.shared} shared pairs"
    message = f"{who} agree on {agreement.agreeing:.0%} of {pairs}; {name} kappa is {kappa_in_words(agreement)}."
    return message if agreement.shared >= ENOUGH else f"{message} Fewer than {ENOUGH} shared pairs say little."


def kappa_in_words(agreement: Agreement) -> str:
    """Kappa with two digits, or that there is none."""
    return "not defined" if agreement.kappa is None else f"{agreement.kappa:.2f}".replace("-", "−")
