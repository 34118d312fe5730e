"""The report of a run, read from its folder alone: summary.json, report.html, and tables for the terminal."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import evaluated_pairs, report_arena, report_effects, report_reward, report_tasks, seeds, votes_arena
from pipeline.artifact import read_json, read_lines, write_json, write_text
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
        "rewards/chosen": "change of chosen against SFT, β nats",
        "rewards/rejected": "change of rejected against SFT, β nats",
    },
    "ppo": {
        "score": "score, normalised where a reward model gives it",
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
    add_votes(summary["stages"], config)
    write_json(folder / "summary.json", {"run": config.run} | summary["stages"] | {"outdated": summary["outdated"]})
    checked = None
    if "reliability" in summary["stages"].get("reward", {}):
        metrics, gate = summary["stages"]["reward"], config.reward.gate
        checked = report_reward.section(metrics, gate)
        report_reward.write_verdict(folder / "reward_model.md", config.run, metrics, gate)
    effects = None
    if "evaluate" in summary["stages"]:
        rows = read_lines(evaluated_pairs.samples_file(config))
        effects = report_effects.section(summary["stages"]["evaluate"], rows)
    drawn = Drawn()
    page = Environment(loader=PackageLoader("pipeline", "."), autoescape=select_autoescape()).get_template(
        "report.html"
    )
    html = page.render(
        run=config.run,
        written=time.strftime("%Y-%m-%d %H:%M"),
        stages=stage_rows(summary["stages"]),
        models=model_table(summary["stages"]),
        tasks=task_table(summary["stages"]),
        task_overlap=report_tasks.overlap(summary["stages"].get("evaluate", {})),
        outdated=summary["outdated"],
        samples=samples(folder, summary["stages"]),
        contamination=summary["stages"].get("evaluate", {}).get("contamination"),
        arenas=report_arena.sections(summary["stages"]["evaluate"]) if "evaluate" in summary["stages"] else [],
        effects=effects,
        figures=[drawn.html(figure) for figure in curves(folder)],
        reward=checked and checked | {"figure": drawn.html(checked["figure"])},
        lineage=summary["stages"],
        order=in_order(summary["stages"].get("evaluate", {}).get("models", ())),
    )
    write_text(folder / "report.html", html)
    return folder


def add_votes(stages: dict[str, Any], config: DictConfig) -> None:
    """Add the arena by people's votes, where there are any on the evaluation's replies; says so in one line."""
    if "evaluate" not in stages or (found := votes_arena.of_run(config)) is None:
        return
    print(f"{evaluated_pairs.votes_file(config)}: {votes_arena.in_words(found)}")
    if "arena" in found:
        stages["evaluate"].setdefault("arena", {})["people"] = found.pop("arena")
    stages["evaluate"]["people"] = found


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
        "comparisons": lambda m: (_pairs(m), ""),
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
            "SFT model: KL 0, and 0 ± 1 where a reward model scores",
        ),
        "evaluate": lambda m: (
            f"{m['judge']} {_gold_means(m['models'], {'ppo': 'with PPO', 'dpo': 'with DPO'})}",
            _gold_means(m["models"], {"base": "base", "sft": "SFT", "human": "people"}),
        ),
    }
    return [
        (name, *describe[name](stages[name]), f"{stages[name]['seconds']:.0f} s") for name in STAGES if name in stages
    ]


def _pairs(metrics: dict[str, Any]) -> str:
    if "pairs" not in metrics:
        return f"{metrics['pool']:,} pairs for people to label"
    return f"{metrics['pairs']:,} pairs, {metrics['test_pairs']:,} held out"


def _gold_means(models: dict[str, Any], words: dict[str, str]) -> str:
    return ", ".join(f"{models[name]['gold_mean']:.3f} {said}" for name, said in words.items() if name in models)


# columns of the table of models: metric → (heading, format); a column that no model has is left out
COLUMNS = {
    "gold_mean": ("gold judge: {judge}", ".3f"),
    "greedy_gold_mean": ("{judge}, greedy", ".3f"),
    "second_judge_mean": ("second judge: {second_judge}", ".3f"),
    "proxy_mean": ("reward model", "+.2f"),
    "kl": ("KL, nats per reply", ".2f"),
    "length": ("length, characters", ".1f"),
    "distinct_2": ("distinct-2", ".3f"),
    "self_bleu": ("self-BLEU", ".3f"),
    "ended_share": ("ended", ".1%"),
    "repetition": ("repeated", ".1%"),
    "reply_bits_per_byte": ("reply bits per byte", ".3f"),
    "text_bits_per_byte": ("text bits per byte", ".3f"),
}


def model_table(stages: dict[str, Any]) -> list[tuple[str, ...]]:
    """The heading and a row for each model that was evaluated; empty when none was."""
    if "evaluate" not in stages:
        return []
    evaluate, models = stages["evaluate"], stages["evaluate"]["models"]
    columns = {key: column for key, column in COLUMNS.items() if any(key in m for m in models.values())}
    heading = ("model", *(said.format(**evaluate) for said, _ in columns.values()))
    rows = [
        (name, *(_cell(models[name], key, form) for key, (_, form) in columns.items()))
        for name in in_order(models)
        if name in models
    ]
    return [heading, *rows]


def task_table(stages: dict[str, Any]) -> list[tuple[str, ...]]:
    """Heading and rows of the tasks whose answers are checked by rule; empty where there are none."""
    if "evaluate" not in stages:
        return []
    return report_tasks.table(stages["evaluate"], in_order(stages["evaluate"]["models"]))


def in_order(names: Iterable[str]) -> list[str]:
    """Names as the report lists them: ways to decode behind the model they sample from, other runs' models last."""
    return sorted(names, key=_place)


def _place(name: str) -> float:
    if name in ORDER:
        return ORDER.index(name)
    model = name.partition("_")[0]
    return len(ORDER) if "/" in name else ORDER.index(model if model in ORDER else "sft") + 0.5


def _cell(metrics: dict[str, Any], key: str, form: str) -> str:
    if key not in metrics:
        return "–"
    interval = metrics.get(f"{key.removesuffix('_mean')}_ci95")
    return format(metrics[key], form) + (f" {_interval(interval, form)}" if interval else "")


def _interval(bounds: list[float], form: str) -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]"


def print_table(folder: Path) -> None:
    """The stages and the models of a run as tables on the terminal, and where the report is."""
    stages = summarise(folder)["stages"]
    console = Console(width=None if Console().is_terminal else 200)
    console.print(_table(("stage", "result", "measured against", "time"), stage_rows(stages)))
    for table in (model_table(stages), task_table(stages)):
        if table:
            console.print(_table(table[0], table[1:]))
    if found := seeds.current(folder):
        heading, *rows = seeds.main_metrics(found)
        console.print(_table(heading, rows))
        if table := seeds.models(
            found, {key: (said.format(**stages["evaluate"]), form) for key, (said, form) in COLUMNS.items()}
        ):
            console.print(_table(table[0], table[1:]))
        for line in seeds.claims(found):
            console.print(escape(line), highlight=False)
    console.print(f"report: {folder / 'report.html'}   numbers: {folder / 'summary.json'}", highlight=False)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def samples(folder: Path, stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out prompts with the replies of every model and of a person."""
    return read_lines(folder / "evaluate" / "samples.jsonl")[: stages.get("evaluate", {}).get("shown", 0)]


class Drawn:
    """Figures as HTML; the first one carries the plotting library, so that the page needs no network."""

    def __init__(self) -> None:
        self.count = 0

    def html(self, figure: Any) -> str:
        """One figure of plotly, in the colours of the page."""
        from plotly import io

        figure.update_layout(
            height=260, margin={"l": 50, "r": 15, "t": 40, "b": 40},
            paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
            font={"color": "#888"}, xaxis={"gridcolor": "#8883"}, yaxis={"gridcolor": "#8883"},
        )  # fmt: skip
        self.count += 1
        options = {"displayModeBar": False, "responsive": True}
        return io.to_html(figure, full_html=False, include_plotlyjs=self.count == 1, config=options)


def curves(folder: Path) -> list[Any]:
    """Training curves as figures of plotly."""
    from plotly import graph_objects

    found = []
    for stage, shown in CURVES.items():
        steps = read_lines(folder / stage / "log.jsonl")
        for key, meaning in shown.items():
            points = [(row["step"], row[key]) for row in steps if key in row]
            if len(points) < 2:
                continue
            figure = graph_objects.Figure(
                graph_objects.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines")
            )
            figure.update_layout(title={"text": f"{stage}: {meaning}", "font": {"size": 14}}, xaxis_title="step")
            found.append(figure)
    return found
