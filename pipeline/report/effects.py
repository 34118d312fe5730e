"""Paired tests and side effects in the report: who is better than whom, DPO's alarm, and the most changed prompts."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.evaluation import side_effects, statistics
from threefold.report.names import in_order
from threefold.report.run import Run
from threefold.report.summary import aligned

LEAD = (
    "Both models' replies to the same prompts, by the two judges: the mean difference, its 95 % interval, and p "
    "of the paired permutation test; the last p is corrected for all comparisons of the table."
)
CHANGED = (
    "Where the gold judge's score of a model's reply rose most over that of the SFT model's, and where it fell most."
)


def section(run: Run) -> Section | None:
    """Paired tests, DPO's drift, and the most changed prompts; None where there is no evaluation to show them of."""
    if not run.evaluation:
        return None
    tables = [paired(run.evaluation), *(changed(model, run.samples()) for model in in_order(aligned(run)))]
    drift = run.evaluation.get("dpo_drift")
    verdict = (not drift["alarm"], f"{side_effects.alarm_in_words(drift)}.") if drift else None
    return Section("effects", "Who is better, and what changed", (LEAD,), verdict, parts=tuple(t for t in tables if t))


def paired(evaluate: dict[str, Any]) -> Table | None:
    """The paired tests; None where nothing was compared."""
    names = {"gold": evaluate["judge"], "second": evaluate["second_judge"]}
    tests = evaluate.get("paired", ())
    rows = [
        (
            names[row["judge"]],
            f"{row['model']} − {row['against']}",
            f"{row['difference']:+.3f}",
            statistics.shown(row["ci95"], "+.3f"),
            f"{row['p']:.4f}",
            f"{row['p_holm']:.4f}",
            f"{row['prompts']:,}",
        )
        for row in tests
    ]
    heading = ("judge", "difference of", "mean", "95 % interval", "p", "p, all together (Holm)", "prompts")
    data = [
        {k: v for k, v in row.items() if k != "ci95"}
        | dict(zip(("low", "high"), statistics.ends(row["ci95"]), strict=True))
        for row in tests
    ]
    return Table("paired", "Is one better than the other?", [heading, *rows], data, texts=2) if rows else None


def changed(model: str, samples: list[dict[str, Any]]) -> Table | None:
    """The prompts that changed most from SFT to `model`, with both replies; None where none changed."""
    changed_prompts = side_effects.most_changed(samples, model)
    rows = [
        (
            f"{row['prompt'][-1]['content']}",
            row["reply_against"],
            row["reply"],
            f"{row['score_against']:+.2f} → {row['score']:+.2f}",
            f"{row['text_change']:.0%}",
        )
        for row in changed_prompts
    ]
    heading = ("prompt, last turn", "SFT", model, "gold", "words changed")
    data = [row | {"prompt": row["prompt"][-1]["content"]} for row in changed_prompts]
    title = f"Most changed prompts: {model}"
    return Table(f"changed_{model}", title, [heading, *rows], data, CHANGED, texts=3, folded=True) if rows else None
