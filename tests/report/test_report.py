"""The report's numbers and words: the summary, CSV, Markdown, what is missing, and two runs beside each other."""

import base64
import csv
import gzip
import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from reports import change_metrics, change_samples, configuration, copy_of, write

from threefold import chain, cli
from threefold.display.parts import Table, csv_text
from threefold.execution import job
from threefold.fileio import read_json, read_lines
from threefold.report import compare, lineage, page, summary
from threefold.report.models import roles
from threefold.report.run import Run, configured, notices
from threefold.stages import STAGES

CHAIN = [stage for stage in STAGES if stage != "frontier"]  # what a run has without more being asked for


@pytest.fixture(scope="module")
def copied(smoke, tmp_path_factory):
    """One copy for the tests that only read it."""
    return copy_of(smoke, tmp_path_factory.mktemp("copied") / "runs")


@pytest.fixture(scope="module")
def whole(copied):
    """The `runs` folder with a report, its page and its Markdown."""
    return copied, *write(copied)


@pytest.fixture
def runs(copied, tmp_path):
    """A copy that the test may change."""
    return shutil.copytree(copied, tmp_path / "runs", symlinks=True)


def run_of(runs, *overrides, run="smoke"):
    return configured(configuration(runs, *overrides, run=run))


def told(runs, *overrides):
    return " ".join(line for group in summary.groups(run_of(runs, *overrides)) for line in group.sentences)


def table(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


# Words


@pytest.mark.parametrize(
    ("gain", "p", "word"),
    [
        (0.3, 0.001, "raised"),
        (-0.3, 0.001, "lowered"),
        (0.0, 0.001, "is not distinguishable from SFT"),
        (0.3, 0.2, "is not distinguishable from SFT"),
    ],
)
def test_a_change_is_one_only_where_its_paired_interval_leaves_out_zero_and_the_test_agrees(gain, p, word, runs):
    noise = iter(np.random.default_rng(0).normal(0, 0.1, 1000))

    def judge(row):
        row["sft"]["gold"] = next(noise) * 5
        row["ppo"]["gold"] = (
            row["sft"]["gold"] + gain + (next(noise) if gain else 0.4 * (-1) ** len(row["ppo"]["reply"]))
        )

    change_samples(runs, judge)
    tested = read_json(runs / "smoke/evaluate/metrics.json")["paired"]
    change_metrics(runs, "evaluate", paired=[row | {"p_holm": p} for row in tested])
    found = compare.between(read_lines(runs / "smoke/evaluate/samples.jsonl"), "ppo", "sft")
    assert f"PPO {word} " in told(runs) and found.shown() in told(runs)
    assert found.sign == round(gain / 0.3)  # it knows of no test


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"function": "rewards.length:length", "args.cap": 100}, ["was PPO's reward"]),
        ({"function": "rewards.length:length", "args.cap": 50}, []),
        ({"function": None}, []),
        (
            {"function": None, "parts.a.function": None, "parts.b.function": "rewards.length:length",
             "parts.b.args.cap": 100},
            ["was a part of PPO's reward"],
        ),
    ],
)  # fmt: skip
def test_a_judge_that_took_part_in_training_is_named(reward, said):
    judge = {"evaluate.judge.function": "rewards.length:length", "evaluate.judge.args.cap": 100}
    parts = {"evaluate": judge, "ppo": {f"ppo.reward.{key}": value for key, value in reward.items()}}
    run = types.SimpleNamespace(manifests={stage: {"parts": found} for stage, found in parts.items()})
    assert roles(run, "judge") == said


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({}, "labelled by length; the gold judge is length, the same function."),
        ({"comparisons.judge.args.cap": 50}, "labelled by length; the gold judge is length, another function."),
        ({"comparisons.label_by": "people"}, "labelled by people; the gold judge is length."),
        ({"data.preferences.format": "arena"}, "those of the data given; the gold judge is length."),
    ],
)
def test_who_labelled_the_preferences_is_said_beside_the_gold_judge(changed, end):
    judge = {"judge.function": "rewards.length:length", "judge.args.cap": 100}
    parts = {stage: {f"{stage}.{key}": value for key, value in judge.items()} for stage in ("comparisons", "evaluate")}
    parts["comparisons"] |= changed
    manifests = {stage: {"parts": values} for stage, values in parts.items()}
    run = Run("one", Path(), {"evaluate": {"judge": "length"}}, manifests)
    labelled, reading = summary.legend(run)
    assert labelled.endswith(end) and "95 % interval over prompts" in reading
    assert summary.legend(Run("one", Path(), {}, manifests)) == []


def test_runs_without_an_evaluation_are_not_compared_and_the_command_is_said():
    whole, bare = Run("one", Path(), {"evaluate": {"judge": "length"}}, {}), Run("two", Path(), {}, {})
    [line] = compare.preferred(whole, bare)
    assert (
        "run two has no evaluation, which threefold run target=evaluate run=two makes" in line and "run one" not in line
    )


def test_the_test_of_two_models_counts_either_way_round():
    rows = [{"a": {"reply": "", "gold": 1.0}, "b": {"reply": "", "gold": 0.0}} for _ in range(9)]
    evaluate = {"paired": [{"model": "a", "against": "b", "judge": "gold", "p_holm": 0.4}]}
    assert compare.between(rows, "b", "a").sign == -1
    assert [compare.tested(evaluate, rows, *pair).sign for pair in (("a", "b"), ("b", "a"))] == [0, 0]
    few, alike = compare.between(rows[:5], "b", "a"), compare.between(rows, "b", "a")
    assert few.sign == 0 and few.shown() == alike.shown() == "-1.000 [–]"  # alike: no interval, and 2 / 2^5 > 0.05


def test_a_paired_interval_is_that_of_the_differences():
    draw = np.random.default_rng(1)
    before = draw.normal(0, 10, 400)
    after = before + draw.normal(0.5, 1, 400)
    rows = [{"a": {"reply": "", "gold": x}, "b": {"reply": "", "gold": y}} for x, y in zip(after, before, strict=True)]
    found, error = compare.between(rows, "a", "b"), (after - before).std() / 20
    assert found.mean == pytest.approx((after - before).mean()) and found.prompts == 400
    assert found.interval == pytest.approx([found.mean - 1.966 * error, found.mean + 1.966 * error], abs=error / 20)
    rows[0]["a"]["gold"] = None
    assert compare.between(rows, "a", "b").prompts == 399 and compare.between(rows[:1], "a", "b") is None


def test_what_became_worse_is_said(runs):
    def lengthen(row):
        row["sft"]["reply"], row["ppo"]["reply"] = "a word of mine", "the same old thing " * 9

    change_samples(runs, lengthen)
    metrics = read_json(runs / "smoke/evaluate/metrics.json")
    metrics["models"]["sft"] |= {"ended_share": 1.0, "text_bits_per_byte": 2.0}
    metrics["models"]["ppo"] |= {"ended_share": 0.25, "text_bits_per_byte": 2.1}
    change_metrics(runs, "evaluate", models=metrics["models"])
    cost = next(line for group in summary.groups(run_of(runs)) for line in group.sentences if line.startswith("PPO: "))
    for words in ("replies are longer, 14 to 171 characters", "end fell, 100.0% to 25.0%", "repeat themselves more",
                  "predicted worse, 2.000 to 2.100 bits per byte (+5.0%)"):  # fmt: skip
        assert words in cost


def test_over_optimisation_is_named(runs):
    def please_the_reward_model_alone(row):
        row["sft"] |= {"gold": 0.5, "reward_model": 0.0}
        row["ppo"] |= {"gold": 0.4, "reward_model": 2.0}

    change_samples(runs, please_the_reward_model_alone)
    tested = read_json(runs / "smoke/evaluate/metrics.json")["paired"]
    for p, said in ((0.001, "while the gold judge's fell: over-optimised"), (0.2, "no clear change is seen")):
        change_metrics(runs, "evaluate", paired=[row | {"p_holm": p} for row in tested])
        assert said in told(runs)


def test_the_reward_models_gate_and_going_on_all_the_same_are_said(copied):
    strict = told(copied, "reward.gate.min_accuracy=0.999")
    assert "The reward model fails its gate: lower end of the accuracy's" in strict and "ppo.ignore_gate=true" in strict
    gate = [
        "max_length_correlation",
        "max_calibration_error",
        "probes.empty",
        "probes.whitespace",
        "probes.prompt_echoed",
    ]
    lenient = [f"reward.gate.{key}=1.0" for key in gate]
    passed = told(copied, "reward.gate.min_accuracy=0.0", "reward.gate.min_over_length=-1.0", *lenient)
    assert "passes every limit of its gate" in passed


def test_models_without_sft_beside_them_are_not_compared(runs):
    change_samples(runs, lambda row: row.pop("sft"))
    models = read_json(runs / "smoke/evaluate/metrics.json")["models"]
    change_metrics(runs, "evaluate", models={name: m for name, m in models.items() if name != "sft"})
    assert "is not known: SFT was not evaluated beside" in summary.verdict(run_of(runs)).sentences[0]
    assert "SFT was not evaluated beside it" in told(runs) and " over SFT" not in told(runs)


# The verdict


def drift(alarm):
    ends = {"chosen_logprob_change_ci95": [-3.0, -1.0], "length_change_ci95": [4.0, 9.0]}
    return {"chosen_logprob_change": -2.0, "length_change": 6.0, "alarm": alarm} | ends


@pytest.mark.parametrize(
    ("gain", "second", "alarm", "words", "good"),
    [
        (0.3, 0.2, False, ("Alignment worked by the gold judge, vader.", "sees a rise"), True),
        (0.3, 0.2, True, ("Alignment worked by the gold judge, vader.",), False),
        (0.3, -0.2, False, ("Alignment worked by the gold judge, vader.", "sees a fall"), False),
        (
            -0.3,
            0.0,
            False,
            ("Alignment did not work: by the gold judge, vader, replies of DPO and PPO became worse.",),
            False,
        ),
        (0.0, 0.0, False, ("No effect of alignment is clear by the gold judge, vader.",), None),
    ],
)
def test_the_report_opens_with_a_verdict(gain, second, alarm, words, good, runs):
    noise = np.random.default_rng(0)

    def judge(row):
        row["sft"] |= {"gold": 0.1, "second": 0.1}
        for model in ("dpo", "ppo"):
            row[model] |= {"gold": 0.1 + gain + noise.normal(0, 0.01), "second": 0.1 + second + noise.normal(0, 0.01)}

    change_samples(runs, judge)
    change_metrics(runs, "evaluate", paired=[], dpo_drift=drift(alarm))
    if not gain:  # differences as large as their noise
        change_samples(runs, lambda row: [row[m].update(gold=0.1 + noise.normal(0, 0.1)) for m in ("dpo", "ppo")])
    run = run_of(runs)
    verdict = summary.verdict(run)
    found = compare.between(run.samples(), "ppo", "sft")
    text = " ".join(verdict.sentences)
    assert 2 <= len(verdict.sentences) <= 3 and verdict.good is good
    assert all(part in text for part in (*words, f"PPO {found.shown()}, at KL {run.models['ppo']['kl']:.2f}"))
    assert ("ALARM: DPO made chosen replies less likely" in verdict.alarm) == alarm
    seconds = sum(run.stages[stage]["seconds"] for stage in ("comparisons", "reward", "dpo", "ppo"))
    assert f"It cost {summary.duration(seconds)} after SFT" in text
    html, markdown = write(runs)
    assert html.index('id="verdict"') < html.index('id="summary"') and ("ALARM" in html) == alarm
    assert markdown.splitlines()[2].startswith(words[0]) and ("**ALARM" in markdown) == alarm


@pytest.mark.parametrize(
    ("sure", "words"),
    [
        (0.3, "Alignment worked by the gold judge, vader. Scores over SFT's 0.000: DPO +0."),
        (
            -0.3,
            "Alignment did not work: by the gold judge, vader, replies of DPO became worse. "
            "Scores over SFT's 0.000: PPO +0.500",
        ),
    ],
)
def test_the_verdict_is_of_what_is_clear_where_the_best_mean_is_not(sure, words, runs):
    noise = np.random.default_rng(0)

    def judge(row):
        row["sft"]["gold"], row["dpo"]["gold"] = 0.0, sure + noise.normal(0, 0.01)

    change_samples(runs, judge)
    unclear = iter(np.resize([-9.0, 10.0], 16))  # a mean of 0.5
    change_samples(runs, lambda row: row["ppo"].update(gold=next(unclear)))
    change_metrics(runs, "evaluate", paired=[], dpo_drift=drift(False))
    assert words in summary.verdict(run_of(runs)).sentences[0]


def test_the_example_is_the_prompt_of_the_median_gain(runs):
    gains = iter(np.random.default_rng(1).permutation(16))

    def judge(row):
        gain = next(gains) / 10
        row["sft"]["gold"], row["ppo"]["gold"], row["dpo"]["gold"] = 0.0, gain, -1.0
        row["ppo"]["reply"] = f"gains {gain}"

    change_samples(runs, judge)
    example = summary.verdict(run_of(runs)).example
    assert example.row["ppo"]["reply"] == "gains 0.7" and example.models == ["sft", "dpo", "ppo"]
    assert example.rule.endswith("of 16 held-out prompts, the one at which PPO's gain over SFT by vader is the median.")
    change_metrics(runs, "evaluate", shown=0)
    assert summary.verdict(run_of(runs)).example is None


def test_a_verdict_is_not_given_without_an_evaluation(partial):
    assert "this run has no evaluation" in summary.verdict(run_of(partial, run="partial")).sentences[0]


def test_what_is_long_is_folded_and_contamination_is_told_in_words(whole):
    _, html, _ = whole
    words = {"arena": "First of the models: ", "reward": 'class="verdict', "contamination": "training text: "}
    for name, first in (words | {"effects": "differences were tested"}).items():
        seen, _, folded = re.search(rf'<section id="{name}">(.*?)</section>', html, re.DOTALL)[1].partition("<details")
        assert first in seen and "<table" not in seen and "<table" in folded, name
    assert 'data-part="reward_probe_scores"' in html and "<details open><summary>How far to trust it" in html


@pytest.fixture
def swept(partial):
    """A run whose sweep is over what it has not made itself."""
    row = {"setting": {"dpo.beta": 0.1}, "state": "complete", "runs": 1, "made": 1, "mean": 0.5, "std": None,
           "kl": None, "values": [0.5], "best": True, "front": False}  # fmt: skip
    content = {"metric": "dpo.accuracy", "direction": "maximize", "keys": ["dpo.beta"], "log_keys": [], "search": False,
               "repeated": [], "settings": [row], "importance": {}, "importance_by": "", "kl_metric": None,
               "failed": [], "runs": [], "made_from": {}, "reported": None}  # fmt: skip
    (partial / "partial/sweep.json").write_text(json.dumps(content))
    return partial


def test_a_report_of_a_sweep_begins_with_its_table(swept):
    asked = ("ppo.kl_coef=0.3", "dpo.beta=0.3")
    html, markdown = write(swept, *asked, run="partial")
    assert re.findall(r'<section id="(\w+)"', html)[:3] == ["verdict", "sweep", "summary"]
    assert html.index('data-part="sweep"') < html.index('data-figure="sweep_by_dpo.beta"')
    assert "not part of this run" not in html and "has not run" not in html and "have not run" not in html
    assert all(f'id="{name}"' not in html for name in ("models", "arena", "samples"))
    assert "Best: dpo.beta 0.1, 0.5 in one run." in summary.verdict(run_of(swept, *asked, run="partial")).sentences
    assert markdown.index("## Settings by dpo.accuracy") < markdown.index("## What training did")
    (swept / "partial/sweep.json").unlink()
    assert "have not run" in write(swept, *asked, run="partial")[0]


# Numbers


def test_every_table_and_figure_is_a_csv_that_the_page_names(whole):
    runs, html, _ = whole
    names = re.findall(r'href="report/(\w+)\.csv"', html)
    assert len(names) == len(set(names)) > 30
    assert {file.stem for file in (runs / "smoke/report").iterdir()} == set(names)
    assert re.findall(r'data-part="(\w+)"', html) == names


def test_csv_holds_what_a_figure_shows(whole):
    runs, html, _ = whole
    shown = json.loads(re.search(r'id="figure-data">(.*?)</script>', html)[1])
    assert set(shown) == set(re.findall(r'data-figure="(\w+)"', html))
    for name, figure in shown.items():
        numbers = {float(v) for row in table(runs / f"smoke/report/{name}.csv") for v in row.values() if is_number(v)}
        for trace in figure["data"]:
            if trace.get("hoverinfo") != "skip":
                drawn = {v for axis in ("x", "y") for v in trace[axis] if isinstance(v, float | int)}
                assert drawn and drawn <= numbers, name


def is_number(text):
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text) is not None


def test_a_curve_is_the_step_log(whole):
    runs, _, _ = whole
    rows, steps = table(runs / "smoke/report/ppo_score.csv"), read_lines(runs / "smoke/ppo/log.jsonl")
    assert [(float(row["step"]), float(row["score"])) for row in rows] == [(row["step"], row["score"]) for row in steps]


def test_a_tables_csv_has_the_metrics_unrounded(whole):
    runs, _, _ = whole
    models = read_json(runs / "smoke/evaluate/metrics.json")["models"]
    for row in table(runs / "smoke/report/models.csv"):
        assert float(row["gold_mean"]) == models[row["model"]]["gold_mean"]
        assert [float(row["gold_mean_low"]), float(row["gold_mean_high"])] == models[row["model"]]["gold_ci95"]


def test_csv_of_an_earlier_report_goes(runs):
    (runs / "smoke/report").mkdir(exist_ok=True)
    (runs / "smoke/report/frontier_of_old.csv").write_text("x\n1\n")
    write(runs)
    assert not (runs / "smoke/report/frontier_of_old.csv").exists()


def test_csv_quotes_what_needs_it():
    rows = [{"a": 'x,"y"\nz', "b": None}, {"a": 1.5, "c": "é"}]
    assert csv_text(rows) == 'a,b,c\n"x,""y""\nz",,\n1.5,,é\n'


def test_markdown_has_the_summary_and_the_tables_for_a_pull_request(whole):
    _, _, text = whole
    for heading in ("# Run smoke", "## What training did", "## What it cost", "## How far to trust it",
                    "## What each stage reached", "## What the judges say, and KL",
                    "## Standings, gold judge: vader"):  # fmt: skip
        assert f"\n{heading}\n" in f"\n{text}"
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.endswith(" |")
    assert all(f"| {stage} | " in text for stage in CHAIN)


def test_a_cell_cannot_end_its_column_in_markdown():
    from threefold.display.parts import table_lines

    lines = table_lines(Table("t", "t", [("a", "b"), ("x|y", "one\ntwo")], []))
    assert lines == ["| a | b |", "| :-- | --: |", "| x\\|y | one two |"]


def test_the_environment_is_that_of_the_manifests(whole):
    runs, html, _ = whole
    environment = read_json(runs / "smoke/ppo/manifest.json")["environment"]
    rows = {row["what"]: row for row in table(runs / "smoke/report/environment.csv")}
    assert {name: rows[name]["value"] for name in environment} == environment
    assert "1 CPU thread" in html and rows["python"]["stages"] == "all"
    keys = {row["key"]: row["value"] for row in table(runs / "smoke/report/configuration.csv")}
    assert keys["ppo.kl_coef"] == "0.05" and keys["evaluate.models"].startswith("[base, sft, dpo, ppo")


def test_the_commit_of_the_code_is_part_of_the_environment():
    root = Path(job.__file__).parents[2]
    if not (root / ".git").exists():
        assert job.commit() == {}
        return
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert head.startswith(job.commit()["commit"].removesuffix("-dirty"))


def test_lineage_draws_every_stage_and_every_parent(whole):
    runs, html, _ = whole
    run = run_of(runs)
    for frame in lineage.FRAMES:
        drawn = str(lineage.diagram(run, frame))
        assert drawn in html
        assert drawn.count('class="arrow') == sum(len(manifest["parents"]) for manifest in run.manifests.values())
        assert all(manifest["fingerprint"] in drawn for manifest in run.manifests.values())
        assert drawn.count('class="stage fresh"') == len(CHAIN)
    columns = lineage.columns(run)
    assert all(columns[parent] < columns[stage] for stage in CHAIN for parent in run.parents(stage))
    assert len(set(lineage.places(run).values())) == len(CHAIN)


# What is missing


def state_of(runs, stage, *overrides):
    """The place of an artifact that the configuration asks for."""
    return chain.plan(configuration(runs, *overrides))[stage].artifact


@pytest.fixture
def partial(runs):
    """A run that got as far as its reward model."""
    (runs / "partial").mkdir()
    for stage in ("tokenizer", "pretrain", "sft", "comparisons", "reward"):
        (runs / "smoke" / stage).rename(runs / "partial" / stage)
    for artifact in (runs / "artifacts").glob("evaluate-*"):
        shutil.rmtree(artifact)
    return runs


def test_a_run_in_the_middle_says_what_is_missing(partial):
    asked = ["ppo.kl_coef=0.3", "dpo.beta=0.3"]
    failed, interrupted = state_of(partial, "dpo", *asked), state_of(partial, "ppo", *asked)
    failed.open(), interrupted.open()
    (failed.work / "failed.txt").write_text("dpo: loss is nan at step 3\n")
    html, text = write(partial, *asked, run="partial")
    assert "dpo failed: loss is nan at step 3; to try again: threefold run target=dpo run=partial" in text
    assert "ppo was interrupted; to go on from its last checkpoint: threefold run target=ppo run=partial" in text
    assert "evaluate has not run; to make it: threefold run target=evaluate run=partial" in text
    for section in ("models", "arena", "samples"):
        found = re.search(rf'<section id="{section}">(.*?)</section>', html, re.DOTALL)[1]
        assert "evaluate has not run" in found
    curves = re.search(r'<section id="curves">(.*?)</section>', html, re.DOTALL)[1]
    assert "dpo failed" in curves and 'data-figure="reward_loss"' in curves
    assert html.count('class="stage failed"') == 2 and "What training did" in text and "gold judge" not in text
    with FileLock(interrupted.lock().lock_file):
        assert "ppo is running now; write the report again" in " ".join(notices(run_of(partial, *asked, run="partial")))


def test_what_was_made_elsewhere_or_with_other_values_is_told_from_what_was_not_made(partial):
    found = notices(run_of(partial, "reward.epochs=3", run="partial"))
    assert found[0].startswith("ppo, evaluate have not run;") and found[1].startswith("dpo is not part of this run,")
    assert found[2] == "Made with another configuration than the one given: reward (reward.epochs 1 → 3)"


def test_data_that_is_gone_keeps_nobody_from_reading_the_report(copied):
    found = notices(run_of(copied, "data.text.path=/none/of/it"))
    assert len(found) == 1 and found[0].startswith("Whether the stages are up to date is not known: ")


def test_stages_that_the_configuration_does_not_ask_for_have_no_section(runs):
    for stage in ("comparisons", "reward", "dpo", "ppo"):
        (runs / "smoke" / stage).unlink()
    html, _ = write(runs, "evaluate.models=[base,sft]")
    assert 'id="reward"' not in html and "dpo has not run" not in html and 'id="models"' in html


def test_no_sample_is_shown_where_none_is_asked_for(runs):
    change_metrics(runs, "evaluate", shown=0)
    reply = read_lines(runs / "smoke/evaluate/samples.jsonl")[0]["human"]["reply"]
    html, _ = write(runs)
    assert "as evaluate.samples_shown=0 asks" in html and reply not in html


# Two runs


@pytest.fixture
def two(runs):
    """Beside the smoke run one whose PPO had another KL coefficient, and replies that all score 0.1 more."""
    shutil.copytree(runs / "smoke", runs / "other", symlinks=True)
    for stage in ("ppo", "evaluate"):
        made = shutil.copytree((runs / "smoke" / stage).resolve(), runs / "artifacts" / f"{stage}-0123456789ab")
        (runs / "other" / stage).unlink()
        (runs / "other" / stage).symlink_to(made)
        manifest = read_json(made / "manifest.json") | {"fingerprint": "0123456789ab"}
        manifest["parts"] |= {"ppo.kl_coef": 0.4} if stage == "ppo" else {}
        (made / "manifest.json").write_text(json.dumps(manifest))
    metrics = read_json(runs / "other/ppo/metrics.json")
    (runs / "other/ppo/metrics.json").write_text(json.dumps(metrics | {"score": metrics["score"] - 1.25}))
    rows = read_lines(runs / "other/evaluate/samples.jsonl")
    for row in rows:
        row["ppo"]["gold"] += 0.1
    (runs / "other/evaluate/samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return runs


def test_two_runs_beside_each_other(two):
    html, text = write(two, compare="other")
    keys = table(two / "smoke/report/compare_configuration.csv")
    assert keys == [{"key": "ppo.kl_coef", "in smoke": "0.05", "in other": "0.4", "stages": "ppo"}]
    metrics = {row["metric"]: row for row in table(two / "smoke/report/compare_metrics.csv")}
    assert float(metrics["ppo.score"]["difference"]) == pytest.approx(1.25)
    assert float(metrics["pretrain.bits_per_byte"]["difference"]) == 0
    assert "Both runs use the same tokenizer, pretrain, sft, comparisons, reward, dpo." in html
    assert "PPO of smoke scores lower than that of other by vader: -0.100 [–] on 16 common prompts." in html
    assert "DPO of smoke is not distinguishable from that of other" in html and "## Configuration that differs" in text
    html, _ = write(two)
    assert 'id="compare"' not in html


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_option_may_stand_between_overrides(place, monkeypatch):
    got, arguments = [], ["experiment=smoke", "seed=7"]
    monkeypatch.setattr("threefold.chain.require_finished", lambda config: None)
    monkeypatch.setattr("threefold.report.write_report", lambda config, compare: got.append((config.seed, compare)))
    monkeypatch.setattr("threefold.report.print_table", lambda folder: None)
    cli.main(["report", *arguments[:place], "--compare", "other", *arguments[place:]])
    assert got == [(7, "other")]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["report", "--compare", "smokey"],
            "error: --compare smokey: no other run of {runs} with a finished stage; there ",
        ),
        (["report", "--compare"], "error: --compare: name the run to set beside it, for example --compare demo-2\n"),
        (["run", "--compare", "other"], "error: --compare: is an option of report, not of run\n"),
        (
            ["report", "--comp", "other"],
            "error: --comp: no such option; overrides are written KEY=VALUE (nearest: --compare)\n",
        ),
    ],
)
def test_a_wrong_comparison_is_one_line_and_status_2(arguments, line, copied, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([arguments[0], f"runs={copied}", "experiment=smoke", *arguments[1:]])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(line.format(runs=copied)) and said.count("\n") == 1


# The page as text; test_report_page.py opens it


def test_replies_and_names_cannot_become_markup(runs):
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'

    def spoil(row):
        row["ppo"]["reply"], row["prompt"][-1]["content"] = evil, evil

    change_samples(runs, spoil)
    change_metrics(runs, "evaluate", judge=evil)
    html, _ = write(runs)
    assert "alert(1)" in html and "<script>alert" not in html and "<img" not in html
    assert html.count("</script>") == html.count("<script")


def test_the_policy_of_the_page_names_its_scripts_and_no_host(whole):
    _, html, _ = whole
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src &#39;none&#39;" in policy or "default-src 'none'" in policy
    assert "http" not in policy and page.digest(page.file_text("page.js")) in policy.replace("&#39;", "'").replace(
        "&#43;", "+"
    )
    assert html.count(page.file_text("page.js").strip()) == 1
    plotly = gzip.decompress(base64.b64decode(re.search(r'id="plotly">([^<]+)<', html)[1])).decode()
    assert page.digest(plotly) in policy.replace("&#39;", "'").replace("&#43;", "+") and "plotly.js v" in plotly
    assert len(html) < 2_400_000  # of which plotly.js is 1.96 million characters, uncompressed 4.8
