"""Who sees which pair next, and in which order its replies stand; what is recorded, skipped and taken back.

The order of pairs is the same for everybody, so that labellers who stop early still share pairs. Which reply stands
first is drawn for each labeller and pair. Both come from the seed alone, and everything else from the files: whoever
starts the page again goes on where they were.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

from threefold.errors import UserError
from threefold.labelling.votes import Comparison, Journal, Skip, Vote

CHOICES = {"first": "reply 1 is better", "second": "reply 2 is better", "tie": "a tie", "skip": "skipped"}


@dataclass(frozen=True)
class Shown:
    """A comparison as one labeller sees it. `token` says on the way back what was shown, without names."""

    comparison: Comparison
    first: str
    second: str
    a_first: bool
    reason: str  # of the vote that was taken back, to be kept or changed
    token: str

    def winner(self, choice: str) -> str:
        """The choice `first`, `second` or `tie` in terms of the models."""
        return "tie" if choice == "tie" else "model_a" if (choice == "first") == self.a_first else "model_b"


@dataclass(frozen=True)
class Progress:
    """Counts of one labeller."""

    done: int
    skipped: int
    total: int


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _one_at_a_time(method: Callable) -> Callable:
    @wraps(method)
    def alone(self: "Labelling", *arguments: Any) -> Any:
        with self.lock:
            return method(self, *arguments)

    return alone


def in_turns(pool: list[Comparison], seed: int) -> list[Comparison]:
    """The pool in an order drawn from `seed`, in which pairs of models take turns: few votes reach all of them."""
    turns: dict[tuple[str, ...], list[Comparison]] = {}
    for comparison in sorted(pool, key=lambda c: _digest("order", seed, c.pair)):
        turns.setdefault(tuple(sorted((comparison.model_a, comparison.model_b))), []).append(comparison)
    rounds = itertools.zip_longest(*turns.values())
    return [comparison for turn in rounds for comparison in turn if comparison is not None]


class Labelling:
    """The comparisons of a pool, and what is known of each labeller's work on them. Safe to use from threads."""

    def __init__(self, pool: list[Comparison], votes_file: Path, seed: int):
        self.pool = {c.pair: c for c in in_turns(pool, seed)}
        self.seed = seed
        self.votes = Journal(votes_file, Vote)
        self.skips = Journal(votes_file.with_name(f"{votes_file.stem}.skipped{votes_file.suffix}"), Skip)
        self.returned: dict[str, Vote | Skip] = {}  # labeller → what was taken back last; its pair comes next
        self.lock = threading.RLock()
        for vote in self.votes.rows:
            _check_same_replies(vote, self.pool.get(vote.pair), votes_file)

    @_one_at_a_time
    def next(self, labeller: str) -> Shown | None:
        """The pair that `labeller` should see now, None when none is left but skipped ones."""
        settled = {row.pair for row in self._answers(labeller)}
        waiting = (pair for pair in self.pool if pair not in settled)
        returned = self.returned.get(labeller)
        pair = returned.pair if returned and returned.pair not in settled else next(waiting, None)
        return None if pair is None else self.shown(labeller, self.pool[pair])

    def shown(self, labeller: str, comparison: Comparison) -> Shown:
        """A comparison with its replies in the order that `labeller` sees."""
        a_first = int(_digest("side", self.seed, labeller, comparison.pair)[:8], 16) % 2 == 0
        a, b = comparison.response_a, comparison.response_b
        first, second = (a, b) if a_first else (b, a)
        returned = self.returned.get(labeller)
        reason = returned.reason if returned and returned.pair == comparison.pair else ""
        token = _digest(labeller, comparison.pair, first, second)[:16]
        return Shown(comparison, first, second, a_first, reason, token)

    @_one_at_a_time
    def record(self, labeller: str, token: str, choice: str, reason: str) -> str:
        """Write down a vote or a skip and return what to say; nothing is written for a page that is out of date."""
        every = (self.shown(labeller, comparison) for comparison in self.pool.values())
        shown = next((shown for shown in every if shown.token == token), None)
        if shown is None:
            return "That page was out of date, so nothing was recorded; please look again."
        pair = shown.comparison.pair
        if any(row.pair == pair for row in self._answers(labeller)):
            return "That pair has your answer already; here is the next one."
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if choice == "skip":
            self.skips.append(Skip(pair, labeller, reason, now))
        else:
            answer = {"winner": shown.winner(choice), "labeller": labeller, "reason": reason, "time": now}
            self.votes.append(Vote(**asdict(shown.comparison), **answer))
        self.returned.pop(labeller, None)
        return f"Recorded: {CHOICES[choice]}." if choice != "skip" else "Skipped; you can come back to it at the end."

    @_one_at_a_time
    def undo(self, labeller: str) -> str:
        """Take back the labeller's last vote or skip, whichever came later, and show its pair again."""
        last = max(reversed(self._answers(labeller)), key=lambda row: row.time, default=None)
        if last is None:
            return "There is nothing to take back."
        if isinstance(last, Skip):
            self.skips.remove(last)
        else:
            self.votes.remove(last)
        self.returned[labeller] = last
        return f"Your last {type(last).__name__.lower()} is taken back; here is its pair again."

    @_one_at_a_time
    def take_up_skipped(self, labeller: str) -> str:
        """Put the pairs that `labeller` skipped back among those that wait."""
        skipped = [row for row in self._answers(labeller) if isinstance(row, Skip)]
        self.skips.remove(*skipped)
        return f"Skipped pairs once more: {len(skipped)}."

    @_one_at_a_time
    def progress(self, labeller: str) -> Progress:
        """How far `labeller` is."""
        answers = self._answers(labeller)
        skipped = sum(isinstance(row, Skip) for row in answers)
        return Progress(len({row.pair for row in answers if isinstance(row, Vote)}), skipped, len(self.pool))

    @_one_at_a_time
    def labellers(self) -> dict[str, int]:
        """Everybody who has voted, by name, with their number of votes on this pool."""
        names = sorted({vote.labeller for vote in self.votes.rows})
        return {name: self.progress(name).done for name in names}

    @_one_at_a_time
    def all_votes(self) -> list[Vote]:
        """A copy of every vote in the file, in its order."""
        return list(self.votes.rows)

    def _answers(self, labeller: str) -> list[Vote | Skip]:
        """Votes and skips of `labeller` on this pool, votes first, each in the order given."""
        rows = [*self.votes.rows, *self.skips.rows]
        return [row for row in rows if row.labeller == labeller and row.pair in self.pool]


def _check_same_replies(vote: Vote, comparison: Comparison | None, file: Path) -> None:
    """Refuse a votes file that knows a pair of this pool with other content."""
    if comparison is not None and any(getattr(vote, key) != value for key, value in asdict(comparison).items()):
        raise UserError(
            f"{file}: has a vote on pair {vote.pair} with another content than label.pairs; set label.votes=NEWFILE"
        )
