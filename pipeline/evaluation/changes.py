"""Which prompts alignment changed most: where a model's reply and its score differ most from those of the SFT model."""

import difflib
from typing import Any


def most_changed(
    rows: list[dict[str, Any]], model: str, against: str = "sft", judge: str = "gold", count: int = 3
) -> list[dict[str, Any]]:
    """The prompts on which `model` gained most over `against` by `judge`, and those on which it lost most.

    At most `count` of each. `rows` are those of samples.jsonl. Each comes back with `change`, the difference of the
    scores, and `text_change`, the share of words that differ (1 less difflib's ratio), which decides between equal
    changes of score. Replies that are the same, or that the judge has no score for, take no part.
    """
    found = [_changed(row, model, against, judge) for row in rows if _comparable(row, model, against, judge)]
    gained = sorted((r for r in found if r["change"] > 0), key=lambda r: (-r["change"], -r["text_change"]))
    lost = sorted((r for r in found if r["change"] < 0), key=lambda r: (r["change"], -r["text_change"]))
    return gained[:count] + lost[:count]


def _comparable(row: dict[str, Any], model: str, against: str, judge: str) -> bool:
    if model not in row or against not in row:
        return False
    scored = row[model][judge] is not None and row[against][judge] is not None
    return scored and row[model]["reply"] != row[against]["reply"]


def _changed(row: dict[str, Any], model: str, against: str, judge: str) -> dict[str, Any]:
    ours, theirs = row[model], row[against]
    alike = difflib.SequenceMatcher(None, theirs["reply"].split(), ours["reply"].split(), autojunk=False).ratio()
    return {
        "prompt": row["prompt"],
        "model": model,
        "against": against,
        "reply": ours["reply"],
        "reply_against": theirs["reply"],
        "score": ours[judge],
        "score_against": theirs[judge],
        "change": ours[judge] - theirs[judge],
        "text_change": 1 - alike,
    }
