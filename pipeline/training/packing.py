"""Texts as one stream of tokens, cut into rows of equal length."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from threefold.data import reading
from threefold.errors import UserError
from threefold.execution import ranks
from threefold.execution.job import Job


def packed(texts: list[str], tokenizer: Any, file: Path) -> np.ndarray:
    """All texts as one stream of tokens, a BOS before each, in a memory-mapped file [tokens]."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    if not file.exists():
        fresh = file.with_suffix(".part")
        with fresh.open("wb") as stream:
            for start in range(0, len(texts), 1000):
                for ids in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
                    np.array([document_start(tokenizer), *ids], dtype=dtype).tofile(stream)
        fresh.replace(file)
    return np.memmap(file, dtype=dtype, mode="r")


def document_start(tokenizer: Any) -> int:
    """The token between documents: BOS, or for tokenizers without one the separator, or the end token."""
    ids = (tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id)
    return next(token for token in ids if token is not None)


class PackedRows(Dataset):
    """Rows of `context` tokens cut one after the other from a token stream; with `count` so many, from its start again.

    A trainer that went over the rows several times by itself would have a batch that is not full at each end.
    Raises `UserError` where the stream does not fill a row.
    """

    def __init__(self, stream: np.ndarray, context: int, count: int | None = None):
        self.stream, self.context, self.distinct = stream, context, len(stream) // context
        if not self.distinct:
            raise UserError(f"data.text: {len(stream)} tokens, which do not fill a row of {context}; give more text")
        self.count = self.distinct if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index % self.distinct * self.context
        ids = torch.from_numpy(self.stream[start : start + self.context].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class EvenedRows(Dataset):
    """Rows with each batch filled up so that all processes take as many: with rows whose tokens no loss counts."""

    def __init__(self, rows: PackedRows, batch_size: int, processes: int):
        order = list(range(len(rows)))
        self.rows, self.order = rows, ranks.evened(order, batch_size, processes, None)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.order[index] is not None:
            return self.rows[self.order[index]]
        ids = self.rows[0]["input_ids"]
        return {"input_ids": ids, "labels": torch.full_like(ids, -100)}


def shuffled_rows(job: Job, tokenizer: Any, context: int, seed: int) -> PackedRows:
    """Rows of the pretraining text in an order that the seed decides."""
    texts = reading.texts(reading.load(job.config.data.text, "train").rows)
    stream = packed(reading.draw(texts, len(texts), seed), tokenizer, job.checkpoints / "tokens.bin")
    return PackedRows(stream, context)
