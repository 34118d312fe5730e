"""Preference pairs between stages: rows on disk, and their tokens."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from threefold.columns import Message
from threefold.errors import UserError
from threefold.fileio import read_lines, write_lines
from threefold.models import chat


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt; `gap` is the judge's score difference or the data's margin, None without either.

    Where replies were labelled one by one, a good reply is paired with a bad one, which answers `rejected_prompt`.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    gap: float | None
    source: str  # samples, people, dataset or labels
    rejected_prompt: list[Message] | None = None

    def exchanged(self) -> "Pair":
        """The pair with the other label."""
        chosen, rejected = self.prompts()
        other = None if self.rejected_prompt is None else chosen
        return Pair(rejected, self.rejected, self.chosen, self.gap, self.source, other)

    def different_prompts(self) -> list[list[Message]]:
        """The one prompt of both replies, or those of replies that were labelled one by one."""
        return [self.prompt] if self.rejected_prompt is None else self.prompts()

    def prompts(self) -> list[list[Message]]:
        """The prompt of the chosen reply and that of the rejected one."""
        return [self.prompt, self.rejected_prompt or self.prompt]


def matched(labelled: list[tuple[list[Message], str, bool]], seed: int, once: bool = False) -> list[Pair]:
    """Pairs of replies that were labelled one by one as good or bad: (prompt, reply, whether it is good).

    Every reply is in a pair, and those of the rarer label are in several. With `once`, no reply is in two pairs, and
    those left over are in none.
    """
    generator = np.random.default_rng(seed)
    good, bad = ([(p, r) for p, r, label in labelled if label == wanted] for wanted in (True, False))
    if not good or not bad:
        return []
    count = min(len(good), len(bad)) if once else max(len(good), len(bad))
    good, bad = ([side[i] for i in generator.permutation(len(side))] for side in (good, bad))
    sides = [[side[i % len(side)] for i in range(count)] for side in (good, bad)]
    order = generator.permutation(count)
    return [
        Pair(sides[0][i][0], sides[0][i][1], sides[1][j][1], None, "labels", sides[1][j][0])
        for i, j in enumerate(order)
    ]


def write(file: Path, pairs: list[Pair]) -> None:
    """Pairs as JSON lines."""
    write_lines(file, [asdict(pair) for pair in pairs])


def read(folder: Path, split: str) -> list[Pair]:
    """The pairs of one split of a comparisons artifact. Raises `UserError` where they are not labelled yet."""
    if not (folder / f"{split}.jsonl").is_file():
        raise UserError(
            f"comparisons: {folder.name} has no labels yet; label its pairs with: make label, then set "
            "data.preferences.path to the votes and data.preferences.format=arena"
        )
    return [Pair(**row) for row in read_lines(folder / f"{split}.jsonl")]


@dataclass(frozen=True)
class TokenisedPairs:
    """Pairs that fit a length limit, each with its tokens: prompt_ids, chosen_ids, rejected_ids.

    Those of replies that were labelled one by one have rejected_prompt_ids as well.
    """

    rows: list[dict[str, list[int]]]
    pairs: list[Pair]
    dropped: int

    @property
    def unpaired(self) -> bool:
        """Whether replies were labelled one by one."""
        return any(pair.rejected_prompt is not None for pair in self.pairs)

    def take(self, order: list[int]) -> "TokenisedPairs":
        """The pairs numbered in `order`, in that order."""
        return TokenisedPairs([self.rows[i] for i in order], [self.pairs[i] for i in order], self.dropped)

    def tokens(self) -> int:
        """Tokens of both replies with their prompts, over all pairs."""
        return sum(len(ids) for row in self.rows for ids in sequences(row))

    def lengths(self) -> list[int]:
        """Tokens of the longer reply with its prompt, for each pair."""
        return [max(map(len, sequences(row))) for row in self.rows]


def sequences(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt with chosen reply, and prompt with rejected reply."""
    rejected = row.get("rejected_prompt_ids", row["prompt_ids"]) + row["rejected_ids"]
    return row["prompt_ids"] + row["chosen_ids"], rejected


def tokenised(
    tokenizer: Any, pairs: list[Pair], max_length: int, count: int | None = None, bar: Any = None
) -> TokenisedPairs:
    """Token ids of pairs, both replies with their end token; pairs longer than `max_length` tokens are dropped.

    Tokenising ends when `count` pairs fit. `bar` is a progress bar that counts these.
    """
    rows, kept, dropped = [], [], 0
    for pair in pairs:
        if len(rows) == count:
            break
        chosen, rejected = chat.reply_ids(tokenizer, pair.chosen), chat.reply_ids(tokenizer, pair.rejected)
        row = {"prompt_ids": chat.prompt_ids(tokenizer, pair.prompt), "chosen_ids": chosen, "rejected_ids": rejected}
        if pair.rejected_prompt is not None:
            row["rejected_prompt_ids"] = chat.prompt_ids(tokenizer, pair.rejected_prompt)
        if max(map(len, sequences(row))) <= max_length:
            rows.append(row)
            kept.append(pair)
            if bar is not None:
                bar.update(1)
        else:
            dropped += 1
    return TokenisedPairs(rows, kept, dropped)


def drawn(pairs: list[Pair], count: int | None, seed: int) -> list[Pair]:
    """The pairs in an order that the seed decides, of which a stage takes the first `count`; as given for None."""
    return pairs if count is None else [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
