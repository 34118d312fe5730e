"""What alignment cost, in plain words: length, replies that never end, repetition, and the language model."""

from threefold.evaluation import statistics
from threefold.report import differences
from threefold.report.differences import LENGTH, REPETITION, Row
from threefold.report.names import REFERENCE, display_name, opening
from threefold.report.run import Run

ALIKE = 0.005  # a smaller relative change of bits per byte is not called one


def sentences(run: Run, rows: list[Row], models: list[str]) -> list[str]:
    """What became longer, endless, repetitive or less likely, for each of the aligned `models` against SFT."""
    lines = []
    for name in models if REFERENCE in run.models else []:
        clauses = [length(rows, name), ended(run, name), repetition(rows, name), tax(run, name)]
        lines.append(f"{opening(display_name(name))}: {'; '.join(clause for clause in clauses if clause)}.")
    return lines


def length(rows: list[Row], name: str) -> str:
    """Whether replies are longer or shorter than those of SFT."""
    change = differences.between(rows, name, REFERENCE, LENGTH)
    if change is None:
        return ""
    word = {1: "replies are longer", -1: "replies are shorter"}.get(change.sign, "length did not clearly change")
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
    change = differences.between(rows, name, REFERENCE, REPETITION)
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
    word = "about as well" if abs(after / before - 1) < ALIKE else "worse" if after > before else "better"
    change = f"{before:.3f} to {after:.3f} bits per byte ({after / before - 1:+.1%})"
    return f"base text is predicted {word}, {change}{beside}"
