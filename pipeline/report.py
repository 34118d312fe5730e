"""The report of a run, read from its folder alone: summary.json, report.html, and tables for the terminal."""

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.artifact import read_json, read_lines, write_json
from pipeline.errors import UserError
from stages import STAGES

# curves of the report: stage → the logged metrics that it shows, with their meaning
CURVES = {
    "pretrain": {"loss": "training loss, nats per token"},
    "sft": {"loss": "training loss, nats per reply token"},
    "reward": {"loss": "Bradley-Terry loss, nats", "accuracy": "training accuracy"},
    "dpo": {
        "rewards/accuracies": "training accuracy",
        "logps/chosen": "log-probability of chosen, nats",
        "logps/rejected": "log-probability of rejected, nats",
    },
    "ppo": {
        "score": "normalised reward model score",
        "kl": "KL to the SFT model, nats per reply",
        "reply_tokens": "reply length, tokens",
        "entropy": "entropy, nats per token",
    },
}
ORDER = ("human", "base", "sft", "dpo", "ppo")


def write_report(config: DictConfig) -> Path:
    """Write summary.json and report.html of the configured run and return its folder."""
    folder = Path(config.runs) / config.run
    summary = summarise(folder)
    if not summary["stages"]:
        raise UserError(f"{folder}: this run has no finished stage; make one with: threefold run run={config.run}")
    write_json(folder / "summary.json", {"run": config.run} | summary["stages"] | {"outdated": summary["outdated"]})
    page = Environment(loader=PackageLoader("pipeline", "."), autoescape=select_autoescape()).get_template(
        "report.html"
    )
    html = page.render(
        run=config.run,
        written=time.strftime("%Y-%m-%d %H:%M"),
        stages=stage_rows(summary["stages"]),
        models=model_rows(summary["stages"]),
        outdated=summary["outdated"],
        samples=samples(folder, summary["stages"]),
        figures=figures(folder),
        lineage=summary["stages"],
        order=ORDER,
    )
    fresh = folder / ".report.html"
    fresh.write_text(html)
    fresh.replace(folder / "report.html")
    return folder


def summarise(folder: Path) -> dict[str, Any]:
    """Each finished stage's metrics, and the stages that were made from an older artifact than the run now links to."""
    manifests = {
        name: read_json(folder / name / "manifest.json")
        for name in STAGES
        if (folder / name / "manifest.json").is_file()
    }
    outdated = {
        name: [
            p
            for p, made_from in manifest["parents"].items()
            if p in manifests and manifests[p]["fingerprint"] != made_from
        ]
        for name, manifest in manifests.items()
    }
    metrics = {name: read_json(folder / name / "metrics.json") for name in manifests}
    return {"stages": metrics, "outdated": {name: parents for name, parents in outdated.items() if parents}}


def stage_rows(stages: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row for each stage: name, result, what it is measured against, time."""
    describe = {
        "tokenizer": lambda m: (f"{m['bytes_per_token']:.2f} bytes per token", f"{m['vocab_size']:,} tokens"),
        "pretrain": lambda m: (
            f"{m['bits_per_byte']:.3f} bits per byte, held out",
            ", ".join(f"{name} {bits:.2f}" for name, bits in m["baselines"].items()),
        ),
        "sft": lambda m: (
            f"{m['reply_bits_per_byte']:.3f} bits per byte of replies; {m['ended_share']:.1%} of samples end",
            f"base model {m['reply_bits_per_byte_base']:.3f}",
        ),
        "comparisons": lambda m: (f"{m['pairs']:,} pairs, {m['test_pairs']:,} held out", ""),
        "reward": lambda m: (
            f"{m['accuracy']:.1%} {_interval(m['accuracy_ci95'], '.1%')} accuracy, held out",
            f"length only {m['accuracy_length_only']:.1%}, bag of words {m['accuracy_bag_of_words']:.1%}",
        ),
        "dpo": lambda m: (
            f"{m['accuracy']:.1%} {_interval(m['accuracy_ci95'], '.1%')} accuracy of the implicit reward",
            f"chosen {m['chosen_logprob_change']:+.1f}, rejected {m['rejected_logprob_change']:+.1f} nats",
        ),
        "ppo": lambda m: (
            f"score {m['score']:+.2f} at KL {m['kl']:.1f} nats per reply, {m['episodes']:,} episodes",
            "SFT model: score 0 ± 1, KL 0",
        ),
        "evaluate": lambda m: (
            f"gold mean {m['models']['ppo']['gold_mean']:.3f} with PPO, {m['models']['dpo']['gold_mean']:.3f} with DPO",
            f"SFT {m['models']['sft']['gold_mean']:.3f}, people {m['models']['human']['gold_mean']:.3f}",
        ),
    }
    return [
        (name, *describe[name](stages[name]), f"{stages[name]['seconds']:.0f} s") for name in STAGES if name in stages
    ]


def model_rows(stages: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each model that was evaluated; empty when none was."""
    models = stages.get("evaluate", {}).get("models", {})
    return [(name, *_model_row(models[name])) for name in ORDER if name in models]


MODEL_COLUMNS = (
    "model", "gold judge", "second judge", "reward model", "KL, nats per reply", "length, characters", "distinct-2",
    "ended", "reply bits per byte",
)  # fmt: skip


def _model_row(m: dict[str, Any]) -> tuple[str, ...]:
    def cell(key: str, form: str) -> str:
        return format(m[key], form) if key in m else "–"

    gold = f"{m['gold_mean']:.3f} {_interval(m['gold_ci95'], '.3f')}"
    return (
        gold, cell("second_judge_mean", ".3f"), cell("proxy_mean", "+.2f"), cell("kl", ".2f"), cell("length", ".1f"),
        cell("distinct_2", ".3f"), cell("ended_share", ".1%"), cell("reply_bits_per_byte", ".3f"),
    )  # fmt: skip


def _interval(bounds: list[float], form: str) -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]"


def print_table(folder: Path) -> None:
    """The stages and the models of a run as tables on the terminal, and where the report is."""
    stages = summarise(folder)["stages"]
    console = Console(width=None if Console().is_terminal else 170)
    console.print(_table(("stage", "result", "measured against", "time"), stage_rows(stages)))
    if rows := model_rows(stages):
        console.print(_table(MODEL_COLUMNS, rows))
    console.print(f"report: {folder / 'report.html'}   numbers: {folder / 'summary.json'}", highlight=False)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def samples(folder: Path, stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out prompts with the replies of every model and of a person."""
    return read_lines(folder / "evaluate" / "samples.jsonl")[: stages.get("evaluate", {}).get("shown", 0)]


def figures(folder: Path) -> list[dict[str, str]]:
    """Training curves as HTML; the first one carries the plotting library, so the page needs no network."""
    from plotly import graph_objects, io

    found: list[dict[str, str]] = []
    for stage, curves in CURVES.items():
        steps = read_lines(folder / stage / "log.jsonl")
        for key, meaning in curves.items():
            points = [(row["step"], row[key]) for row in steps if key in row]
            if len(points) < 2:
                continue
            figure = graph_objects.Figure(
                graph_objects.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines")
            )
            figure.update_layout(
                title={"text": f"{stage}: {meaning}", "font": {"size": 14}}, height=260, xaxis_title="step",
                margin={"l": 50, "r": 15, "t": 40, "b": 40},
                paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
                font={"color": "#888"}, xaxis={"gridcolor": "#8883"}, yaxis={"gridcolor": "#8883"},
            )  # fmt: skip
            html = io.to_html(
                figure,
                full_html=False,
                include_plotlyjs=not found,
                config={"displayModeBar": False, "responsive": True},
            )
            found.append({"stage": stage, "html": html})
    return found
