"""Preference pairs: the formats they are read from, rows on disk between stages, and their tokens.

The formats of preference data: who compared two or more replies to a prompt, and how the rows say which is better.

A pair is {"key", "prompt", "chosen", "rejected"}, with "margin" (above 0) where the data says how much better. Ties,
and equal replies among several, do not tell which is better: they are dropped and counted. Replies that were labelled
one by one are no pairs yet; stage `comparisons` matches them.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from threefold.columns import Message, Row, UnusableRowError, dialogue_of, key_of, messages_of, number_of, plain_text_of
from threefold.errors import UserError
from threefold.fileio import read_lines, write_lines
from threefold.models import chat

PASSAGE_CHARS = 600  # with a question and a reply, 95 % of the pairs fit 512 tokens of a small vocabulary
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
WINNERS = {"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0}


def preference(raw: Row, dropped: Counter) -> list[Row]:
    """Columns `chosen` and `rejected` (text or messages), `prompt`, and `margin` where there is one.

    Where both sides are whole dialogues, the prompt may be part of them.
    """
    margin = number_of(raw, "margin") if raw.get("margin") not in (None, "") else None
    if margin is not None and margin <= 0:
        raise UnusableRowError("margin is not above 0")
    return [_labelled(raw, margin)]


def preference_dialogues(raw: Row, dropped: Counter) -> list[Row]:
    """Anthropic's format: `chosen` and `rejected` are whole dialogues that differ from some reply on."""
    chosen, rejected = _transcript(raw, "chosen"), _transcript(raw, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRowError("chosen and rejected do not share their prompt")
    return [_pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])]


def ultrafeedback(raw: Row, dropped: Counter) -> list[Row]:
    """UltraFeedback: `instruction` with scored `completions`, or binarized to `chosen` and `rejected` with scores.

    Any two completions with different scores are a pair. The margin is the difference of the scores.
    """
    if raw.get("completions") is not None or "chosen" not in raw:
        return _scored_completions(raw, dropped)
    if raw.get("score_chosen") is None and raw.get("score_rejected") is None:
        return [_labelled(raw)]
    margin = number_of(raw, "score_chosen") - number_of(raw, "score_rejected")
    if margin < 0:
        raise UnusableRowError("score_rejected is above score_chosen")
    pair = _labelled(raw, margin)
    if not margin:
        dropped["tie"] += 1
    return [pair] if margin else []


def pandalm(raw: Row, dropped: Counter) -> list[Row]:
    """PandaLM: `instruction`, `input`, two responses, and votes of `annotator1` and others: 1, 2, or 0 for a tie.

    The label that most annotators gave counts. Where there is no such label, or it is 0, the row is a tie. The margin
    is the share of votes for the better response less the share for the other.
    """
    context = raw.get("input")
    context = f"\n\n{context.strip()}" if isinstance(context, str) and context.strip() else ""
    prompt = [{"role": "user", "content": plain_text_of(raw, "instruction") + context}]
    replies = [plain_text_of(raw, "response1"), plain_text_of(raw, "response2")]
    columns = [name for name in raw if re.fullmatch(r"annotator_?\d+", name) and raw[name] not in (None, "")]
    if not columns:
        raise UnusableRowError("no column annotator1")
    votes = [_vote(raw[name], "an annotator's label") for name in columns]
    (winner, most), *others = Counter(votes).most_common()
    if not winner or (others and others[0][1] == most):
        winner = 0
    margin = (votes.count(winner) - votes.count(3 - winner)) / len(votes)
    return _compared(prompt, replies, winner, dropped, margin)


def arena(raw: Row, dropped: Counter) -> list[Row]:
    """Votes between two models: two conversations, or a `prompt` with two responses, and `winner`.

    Conversations in which an earlier reply differs have no common prompt; they are dropped.
    """
    winner = raw.get("winner")
    if "winner" not in raw:
        raise UnusableRowError("no column winner")
    if not isinstance(winner, str) or winner not in WINNERS:
        raise UnusableRowError(f"winner is not {', '.join(WINNERS)}")
    if raw.get("conversation_a") is None:
        replies = [dialogue_of(raw, f"response_{side}")[-1]["content"] for side in "ab"]
        return _compared(messages_of(raw, "prompt"), replies, WINNERS[winner], dropped)
    a, b = dialogue_of(raw, "conversation_a"), dialogue_of(raw, "conversation_b")
    if len(a) < 2 or _asked(a) != _asked(b):
        raise UnusableRowError("conversation_a and conversation_b do not share their prompt")
    if a[:-1] != b[:-1]:
        dropped["an earlier reply differs"] += 1
        return []
    return _compared(a[:-1], [a[-1]["content"], b[-1]["content"]], WINNERS[winner], dropped)


def finegrained_rlhf(raw: Row, dropped: Counter) -> list[Row]:
    """Fine-grained RLHF (Wu et al. 2023): `prediction 1` and others, and `preference`, a vote on every two of them.

    The votes are in the order 1 and 2, 1 and 3, ..., 2 and 3, ...: 1 for the first, 2 for the second, 0 for a tie. The
    prompt is the passages, shortened to PASSAGE_CHARS, and then the question.
    """
    question, votes = plain_text_of(raw, "question"), raw.get("preference")
    names = [name for name in raw if name.startswith("prediction ") and raw[name] is not None]
    if len(names) < 2:
        raise UnusableRowError("fewer than two predictions")
    replies = [plain_text_of(raw, f"prediction {number}") for number in range(1, len(names) + 1)]
    pairs = list(itertools.combinations(replies, 2))
    if not isinstance(votes, list) or len(votes) != len(pairs):
        raise UnusableRowError("preference does not hold one vote on each two predictions")
    winners = [_vote(vote, "a vote of preference") for vote in votes]
    context = _shortened(_passages_of(raw), PASSAGE_CHARS)
    prompt = [{"role": "user", "content": "\n\n".join([*context, question])}]
    rows = [
        pair for both, winner in zip(pairs, winners, strict=True) for pair in _compared(prompt, both, winner, dropped)
    ]
    return [pair | {"key": question} for pair in rows]


def unpaired(raw: Row, dropped: Counter) -> list[Row]:
    """TRL's unpaired preferences: `prompt`, `completion`, and `label`, whether the completion is good.

    A row is {"key", "prompt", "reply", "label"} rather than a pair. Its dialogue leaves out the reply where it is bad.
    """
    prompt, reply = messages_of(raw, "prompt"), dialogue_of(raw, "completion")[-1]
    if (label := LABELS.get(str(raw.get("label")).lower())) is None:
        raise UnusableRowError("label is neither true nor false" if "label" in raw else "no column label")
    dialogue = {"messages": [*prompt, reply] if label else prompt, "symmetric": False}
    return [{"key": key_of(prompt), "prompt": prompt, "reply": reply["content"], "label": label, **dialogue}]


PREFERENCE_FORMATS: dict[str, Callable[[Row, Counter], list[Row]]] = {
    f.__name__: f for f in (preference, preference_dialogues, ultrafeedback, pandalm, arena, finegrained_rlhf, unpaired)
}


def _pair(prompt: list[Message], chosen: str, rejected: str, margin: float | None = None) -> Row:
    if chosen == rejected:
        raise UnusableRowError("chosen equals rejected")
    row = {"key": key_of(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row if margin is None else row | {"margin": margin}


def _compared(
    prompt: list[Message], replies: Sequence[str], winner: int, dropped: Counter, margin: float | None = None
) -> list[Row]:
    """The pair of two replies of which the first (1) or the second (2) is better; none, counted, for a tie (0)."""
    if not winner or replies[0] == replies[1]:
        dropped["same reply twice" if winner else "tie"] += 1
        return []
    return [_pair(prompt, replies[winner - 1], replies[2 - winner], margin)]


def _labelled(raw: Row, margin: float | None = None) -> Row:
    """The pair of `chosen` and `rejected`; its prompt is `prompt`, or else what both dialogues begin with."""
    sides = {column: dialogue_of(raw, column) for column in ("chosen", "rejected")}
    before = [side[:-1] for side in sides.values()]
    if raw.get("prompt") is not None:
        prompt = messages_of(raw, "prompt")
        if any(turns and turns[-len(prompt) :] != prompt for turns in before):
            raise UnusableRowError("chosen or rejected does not go on from prompt")
    elif not all(before):
        raise UnusableRowError("no column prompt")
    else:
        prompt = before[0]
    if before[0] != before[1] and all(before):
        raise UnusableRowError("chosen and rejected do not share their prompt")
    return _pair(max(prompt, *before, key=len), *(side[-1]["content"] for side in sides.values()), margin)


def _scored_completions(raw: Row, dropped: Counter) -> list[Row]:
    prompt = messages_of(raw, "instruction" if "instruction" in raw else "prompt")
    completions = raw.get("completions")
    if "completions" not in raw:
        raise UnusableRowError("no column completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise UnusableRowError("completions is not a list of objects with response and overall_score")
    if len(completions) < 2:
        raise UnusableRowError("fewer than two completions")
    scored = [(number_of(c, "overall_score"), plain_text_of(c, "response")) for c in completions]
    rows = []
    for (a, first), (b, second) in itertools.combinations(scored, 2):
        winner = 0 if a == b else 1 if a > b else 2
        rows += _compared(prompt, (first, second), winner, dropped, abs(a - b))
    return rows


def _vote(value: Any, what: str) -> int:
    if isinstance(value, bool) or str(value) not in ("0", "1", "2", "0.0", "1.0", "2.0"):
        raise UnusableRowError(f"{what} is not 0, 1 or 2")
    return int(float(value))


def _asked(dialogue: list[Message]) -> list[Message]:
    return [m for m in dialogue if m["role"] != "assistant"]


def _transcript(raw: Row, column: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + plain_text_of(raw, column))
    if parts[0].strip() or len(parts) < 5:
        raise UnusableRowError(f"{column} does not alternate Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise UnusableRowError(f"{column} does not end with an assistant's reply")
    return turns


def _passages_of(raw: Row) -> list[list[str]]:
    """The passages, each its title and its sentences, of which the first may repeat the title."""
    passages = raw.get("passages") or []
    if not isinstance(passages, list) or not all(
        isinstance(p, list) and p and all(isinstance(sentence, str) for sentence in p) for p in passages
    ):
        raise UnusableRowError("passages is not a list of lists of text")
    cleaned = [[title.strip(), *(s.strip() for s in sentences)] for title, *sentences in passages]
    return [[title, *(s.removeprefix(f"{title}\n\n") for s in sentences)] for title, *sentences in cleaned]


def _shortened(passages: list[list[str]], limit: int) -> list[str]:
    """Passages as "title: sentences", with the first sentences of each in turn while all hold `limit` characters."""
    counts, room = [0] * len(passages), limit
    longest = max((len(p) - 1 for p in passages), default=0)
    for rank, i in itertools.product(range(longest), range(len(passages))):
        if rank < len(passages[i]) - 1:
            room -= len(passages[i][rank + 1])
            if room < 0:
                break
            counts[i] = rank + 1
    return [f"{title}: {' '.join(sentences[:n])}" for (title, *sentences), n in zip(passages, counts, strict=True) if n]


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

    def dialogues(self) -> list[tuple[list[Message], *tuple[str, ...]]]:
        """Each different prompt with the replies to it."""
        if self.rejected_prompt is None:
            return [(self.prompt, self.chosen, self.rejected)]
        return [(self.prompt, self.chosen), (self.rejected_prompt, self.rejected)]

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


def row_of(tokenizer: Any, pair: Pair) -> dict[str, list[int]]:
    """The tokens of a pair, as in `TokenisedPairs`."""
    (prompt, replies), *other = (chat.row_ids(tokenizer, *dialogue) for dialogue in pair.dialogues())
    row = {"prompt_ids": prompt, "chosen_ids": replies[0], "rejected_ids": replies[-1]}
    for rejected_prompt, [rejected] in other:
        row |= {"rejected_prompt_ids": rejected_prompt, "rejected_ids": rejected}
    return row


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
        row = row_of(tokenizer, pair)
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
