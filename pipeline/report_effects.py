"""Paired tests and side effects in the report: who is better than whom, DPO's alarm, and the most changed prompts."""

from typing import Any

from pipeline import changes, displacement

ALIGNED = ("dpo", "ppo")  # whose replies are held against those of the SFT model


def section(evaluate: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows, from the evaluation's metrics and the rows of samples.jsonl."""
    drift = evaluate.get("dpo_drift")
    return {
        "paired": paired(evaluate),
        "drift": drift and {"alarm": drift["alarm"], "line": displacement.in_words(drift)},
        "changed": {model: found for model in ALIGNED if (found := changes.most_changed(rows, model))},
    }


def paired(evaluate: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows of the paired tests; empty where nothing was compared."""
    names = {"gold": evaluate["judge"], "second": evaluate["second_judge"]}
    rows = [
        (
            names[row["judge"]],
            f"{row['model']} − {row['against']}",
            f"{row['difference']:+.3f}",
            f"{row['ci95'][0]:+.3f} to {row['ci95'][1]:+.3f}",
            f"{row['p']:.4f}",
            f"{row['p_holm']:.4f}",
            f"{row['prompts']:,}",
        )
        for row in evaluate.get("paired", ())
    ]
    heading = ("judge", "difference of", "mean", "95 % interval", "p", "p, all together (Holm)", "prompts")
    return [heading, *rows] if rows else []
