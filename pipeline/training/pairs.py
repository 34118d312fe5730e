"""The preference pairs that a training stage takes from its comparisons."""

from typing import Any

from threefold.data.preferences import TokenisedPairs, drawn, read, tokenised
from threefold.errors import require_most
from threefold.execution.job import Job

LONG = 2000  # pairs from which on tokenising takes so long that it has a bar


def load_pairs(job: Job, tokenizer: Any) -> tuple[TokenisedPairs, TokenisedPairs]:
    """Training and held-out pairs of a comparisons artifact, as many as the stage of `job` asks for.

    Raises `UserError` when none of either fits, or more than the share that data.preferences allows do not.
    """
    config, share = getattr(job.config, job.stage), job.config.data.preferences.max_unusable_share
    counts = {"train": config.pairs, "test": config.eval_pairs}
    pairs = {split: drawn(read(job.inputs["comparisons"], split), n, config.seed) for split, n in counts.items()}
    total = sum(len(pairs[split][:n]) for split, n in counts.items())
    bar = job.progress(total, "pairs", part="tokens") if total > LONG else None
    train, test = (tokenised(tokenizer, pairs[split], config.max_length, n, bar) for split, n in counts.items())
    if bar is not None:
        bar.close()
    for split, what in ((train, "training pairs"), (test, "held-out pairs")):
        key, allowed = f"{job.stage}.max_length={config.max_length}", "data.preferences.max_unusable_share"
        require_most(split.dropped, split.dropped + len(split.rows), share, key, what, allowed)
    return train, test
