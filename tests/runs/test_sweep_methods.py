"""Sweeps over methods: what each varies, what is compared with what, the table for a paper, and what runs cost."""

import contextlib
import csv
import io
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import sweeps
from scipy import stats

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.display.parts import Table, latex
from threefold.errors import UserError
from threefold.fileio import read_json
from threefold.report import studies
from threefold.report.run import Run
from threefold.runs import method_table, sweep, sweep_space, sweep_table, trials

METHODS = ["method=ppo,dpo,best_of_n"]
OWN_KEYS = ["ppo.kl_coef=0.02,0.05", "dpo.beta=0.1,0.3,0.5", "best_of_n.n=4,16"]


def test_a_methods_keys_vary_with_it_alone_and_all_others_with_every_method():
    fixed, space = sweep_space.parse([*METHODS, *OWN_KEYS, "reward@ppo.reward=length,script", "reward.epochs=1,2"])
    settings = [values["setting"] for values in trials.of_grid(space, None).values()]
    assert not fixed and Counter(setting["method"] for setting in settings) == {"ppo": 8, "dpo": 6, "best_of_n": 4}
    assert {tuple(setting) for setting in settings} == {
        ("method", "ppo.kl_coef", "reward@ppo.reward", "reward.epochs"),
        ("method", "dpo.beta", "reward.epochs"),
        ("method", "best_of_n.n", "reward.epochs"),
    }


def test_a_run_of_a_method_evaluates_its_model_beside_the_sft_model():
    _, space = sweep_space.parse(["method=best_of_n,dpo", "best_of_n.n=4", "dpo.beta=0.1", "dpo.seed=1,2"])
    made = {variant.name: variant for variant in trials.of_grid(space, None)}
    assert list(made) == [
        "variants/method=best_of_n,best_of_n.n=4", "variants/method=dpo,dpo.seed=1", "variants/method=dpo,dpo.seed=2",
    ]  # fmt: skip
    best_of, dpo, _ = made.values()
    assert best_of.overrides == ("evaluate.models=[sft,best_of_4]",)
    assert dpo.overrides == ("dpo.seed=1", "evaluate.models=[sft,dpo]")
    config = dpo.member(compose(["experiment=smoke"]), ["evaluate.reward_model=true"]).config
    assert config.evaluate.models == ["sft", "dpo"] and config.dpo.seed == 1


def test_the_reward_model_scores_dpo_where_asked_for_and_nothing_else_changes():
    plain, scored = (
        chain.plan(compose(["experiment=smoke", "evaluate.models=[sft,dpo]", f"evaluate.reward_model={asked}"]))
        for asked in ("false", "true")
    )
    assert "reward" not in plain and "reward" in scored
    assert set(scored["evaluate"].parts) - set(plain["evaluate"].parts) == {"parent.reward"}
    assert all(plain[stage].fingerprint == scored[stage].fingerprint for stage in plain if stage != "evaluate")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=ppo,dop"], "method=dop: must be of ppo, dpo, best_of_n (nearest: dpo)"),
        (["method=ppo,best_of_n"], "say of how many samples"),
        (["method=best_of_n", "best_of_n.n=1,4"], "at least 2"),
        (["method=best_of_n", "best_of_n.n=many"], "must be a whole number"),
        (["best_of_n.n=4,16"], "is a key of method=best_of_n"),
        (["method=ppo", "dpo.beta=0.1,0.2"], "dpo.beta: varies a method that is not compared"),
        (["method=ppo,dpo", "target=dpo"], "target=dpo: methods are compared by the evaluation"),
        (["method=ppo,dpo", "sweep.trials=4"], "a search has one method"),
        (["method=ppo,dpo", "evaluate.models=[sft,ppo]"], "method says which models"),
        (["method=ppo,dpo", "sweep.metric=evaluate.models.ppo.kl"], "write evaluate.models.method.NAME"),
        (["method=ppo,dpo", "dpo.bta=0.1,0.2"], "nearest: dpo.beta"),
        (["method=ppo,dpo", "dpo.beta=0.1,-1"], "at least 0"),
        (["method=ppo,dpo", "cluster.account=a,b"], "make no difference to evaluate with method=ppo"),
    ],
)
def test_methods_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sweep_space.read(["experiment=smoke", *overrides])


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        (["ppo.kl_coef=0.1,0.2"], "ppo"),  # the last of smoke's evaluate.models is ppo_majority_4
        (["dpo.beta=0.1,0.2", "seed=1,2"], "dpo"),
        (["dpo.beta=0.1,0.2", "ppo.kl_coef=0.1,0.2"], "ppo"),
        (["sft.epochs=1,2", "evaluate.models=[base,sft]"], "sft"),
        (["dpo.beta=0.1,0.2", "evaluate.models=[dpo_best_of_4]"], "dpo_best_of_4"),
    ],
)
def test_a_sweep_is_by_the_model_that_varies(overrides, model):
    fixed, space = sweep_space.parse(overrides)
    config = sweeps.quickly(*fixed)
    assert sweep_space.implied(config, space) == [f"sweep.metric=evaluate.models.{model}.gold_mean"]


PROMPTS = 8


def gold(config, model: str) -> np.ndarray:
    """Gold of each prompt [PROMPTS] for a model, with what its key and its seed do."""
    prompts = np.arange(PROMPTS) / 100
    if model == "ppo":
        return 0.7 - config.ppo.kl_coef + 0.01 * config.ppo.seed**2 + prompts**2
    if model == "dpo":
        return 0.5 - config.dpo.beta + 0.02 * config.dpo.seed - prompts
    return 0.3 + prompts if model == "sft" else 0.4 + 0.01 * int(model.rpartition("_")[2]) + prompts


def of_model(config, model: str) -> dict:
    measured = {"kl": 2.0, "length": 50.0, "ended_share": 0.5, "proxy_mean": 1.0, "second_judge_mean": 0.25}
    return measured | {"gold_mean": float(gold(config, model).mean())}


def evaluation(config) -> dict:
    """Metrics; on validation prompts a stronger pull looks better than on test prompts."""
    models = {model: of_model(config, model) for model in config.evaluate.models}
    models["human"] = {"gold_mean": 0.9, "second_judge_mean": 0.25, "length": 50.0}
    on_validation = {name: metrics | {"gold_mean": 1 - metrics["gold_mean"]} for name, metrics in models.items()}
    names = {"judge": "vader_compound", "second_judge": "textblob"}
    return {"models": models, "validation": {"models": on_validation}} | names


def samples(config) -> list[dict]:
    by_model = {model: gold(config, model).tolist() for model in config.evaluate.models}
    return [
        {"prompt": f"prompt {i}"} | {m: {"reply": "", "gold": v[i], "second": 0.25} for m, v in by_model.items()}
        for i in range(PROMPTS)
    ]


SEEDED = ["ppo.kl_coef=0.05,0.1", "dpo.beta=0.1,0.3", "ppo.seed=1,2,3", "dpo.seed=1,2,3"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """PPO and DPO at two strengths, three seeds, best-of-n at two n: stages, sweep.json, folder, what is said."""
    folder, said = tmp_path_factory.mktemp("methods"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        stages = sweeps.stand_in(patch, evaluation=evaluation, samples=samples)
        overrides = ["experiment=smoke", f"runs={folder}", *METHODS, *SEEDED, "best_of_n.n=4,16", "launcher.jobs=1"]
        results = sweep.run(*sweep_space.read(overrides))
    return SimpleNamespace(stages=stages, results=results, folder=folder / "smoke", said=said.getvalue())


def test_one_command_compares_methods_at_their_chosen_settings(compared):
    results = compared.results
    assert Counter(stage for stage, _ in compared.stages.made) == {
        "tokenizer": 1, "pretrain": 1, "sft": 1, "comparisons": 1, "reward": 1, "dpo": 6, "ppo": 6, "evaluate": 14,
    }  # fmt: skip
    chosen = {row["setting"]["method"]: row for row in results["settings"] if row["best"]}
    assert {name: list(row["setting"].values())[1] for name, row in chosen.items()} == {
        "ppo": 0.1, "dpo": 0.3, "best_of_n": 4,
    }  # fmt: skip
    ppo = next(row for row in results["methods"]["models"] if row["setting"].get("ppo.kl_coef") == 0.05)
    means = [0.65 + 0.01 * seed**2 + np.mean((np.arange(PROMPTS) / 100) ** 2) for seed in (1, 2, 3)]
    assert ppo["gold_mean"] == {"mean": pytest.approx(np.mean(means)), "std": pytest.approx(np.std(means, ddof=1))}
    assert ppo["kl"] == {"mean": 2.0, "std": 0.0} and ppo["proxy_mean"]["mean"] == 1.0
    assert re.search(r"ppo +ppo\.kl_coef 0\.1 +0\.648 ± 0\.040 .* chosen", compared.said), compared.said
    assert re.search(r"SFT +– +0\.335 +0\.250 .* 1 +–", compared.said)  # one model and one set of prompts
    assert re.search(r"people +– +0\.900 +0\.250 +– +– +50\.0 +– ", compared.said)
    assert "Best: method dpo, dpo.beta 0.3" in compared.said


def test_methods_are_tested_in_pairs_over_prompts_and_over_seeds(compared):
    tests = {(row["method"], row["against"], row["judge"]): row for row in compared.results["methods"]["tests"]}
    pairs = {
        ("ppo", "dpo"),
        ("ppo", "best_of_n"),
        ("dpo", "best_of_n"),
        *((m, "sft") for m in ("ppo", "dpo", "best_of_n")),
    }
    assert set(tests) == {(*pair, judge) for pair in pairs for judge in ("gold", "second")}
    test, place = tests["ppo", "dpo", "gold"], np.arange(PROMPTS) / 100
    ppo = [0.6 + 0.01 * seed**2 + place**2 for seed in (1, 2, 3)]
    dpo = [0.2 + 0.02 * seed - place for seed in (1, 2, 3)]
    over_seeds = stats.ttest_rel(np.mean(ppo, 1), np.mean(dpo, 1))
    assert test["difference"] == pytest.approx(np.mean(ppo) - np.mean(dpo)) == pytest.approx(test["seeds_difference"])
    assert (test["pairs"], test["p"]) == (PROMPTS, pytest.approx(2 / 2**PROMPTS))  # every prompt has the same sign
    assert test["seeds"] == 3 and test["seeds_p"] == pytest.approx(over_seeds.pvalue)
    assert test["seeds_ci95"] == pytest.approx([*over_seeds.confidence_interval()])
    assert test["p_holm"] >= test["p"] and test["seeds_p_holm"] >= test["seeds_p"]
    same = tests["ppo", "dpo", "second"]  # all scores are equal
    assert same["difference"] == 0 and same["p_holm"] == 1 and same["seeds_p"] is None
    beside_one = tests["ppo", "best_of_n", "gold"]  # its one run is paired with each, and says nothing over seeds
    assert (beside_one["seeds"], beside_one["seeds_p"]) == (1, None)
    assert beside_one["difference"] == pytest.approx(np.mean(ppo) - np.mean(0.44 + place))


def test_runs_are_paired_by_the_seeds_that_both_have(monkeypatch):
    def run(gain, **repetition):
        return {"gain": gain, "repetition": {key.replace("_", "."): value for key, value in repetition.items()}}

    monkeypatch.setattr(method_table, "scores", lambda _, run, *__: {str(i): run["gain"] + i / 9 for i in range(6)})
    ppo = [run(2 * a + b, seed=a, ppo_seed=b) for a in (1, 2) for b in (1, 2)]
    dpo = [run(a, seed=a) for a in (1, 2)]
    test = method_table.compare(None, (ppo, "ppo"), (dpo, "dpo"), "gold")
    assert test["seeds"] == 2 and test["seeds_difference"] == pytest.approx(3.0) == pytest.approx(test["difference"])
    expected = stats.ttest_rel([3.5, 5.5], [1, 2])  # PPO's mean over its own seeds beside DPO's run of the same seed
    assert test["seeds_p"] == pytest.approx(expected.pvalue)


def test_every_number_of_every_run_is_in_the_long_form(compared):
    with (compared.folder / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    keys = ["method", "ppo.kl_coef", "ppo.seed", "dpo.beta", "dpo.seed", "best_of_n.n"]
    columns = ["run", *keys, "state", "reason", "stage", "model", "metric", "value"]
    assert list(rows[0]) == columns
    test_kl = [row for row in rows if row["metric"] == "kl" and row["model"] not in ("sft", "human")]
    assert len(test_kl) == 14 and Counter(row["model"] for row in test_kl) == {
        "ppo": 6, "dpo": 6, "best_of_4": 1, "best_of_16": 1,
    }  # fmt: skip
    [value] = [
        float(row["value"]) for row in rows
        if row["method"] == "dpo" and (row["dpo.beta"], row["dpo.seed"]) == ("0.1", "2")
        and (row["model"], row["metric"]) == ("dpo", "validation.gold_mean")
    ]  # fmt: skip
    assert value == pytest.approx(1 - (0.44 - np.mean(np.arange(PROMPTS) / 100)))


def test_what_runs_share_is_counted_once_and_stands_apart(compared):
    measured = compared.results["methods"]
    shared = {row["stage"]: row for row in measured["shared"]}
    assert set(shared) == {"tokenizer", "pretrain", "sft", "comparisons", "reward"}
    assert all((row["artifacts"], row["seconds"]) == (1, 2.0) for row in shared.values())
    cost = {row["model"]: (row["seconds"]["mean"], row["device_hours"]["mean"]) for row in measured["models"][2:]}
    assert cost["ppo"] == (12.0, pytest.approx((4 * 10 + 2) / 3600)) and cost["dpo"][0] == 4.0
    assert cost["best_of_4"] == (2.0, pytest.approx(2 / 3600))
    heading, *rows = sweep_table.tables(compared.results)[0].rows
    assert heading[-2] == "device hours" and rows[2][-3] == "12.0 ± 0.0 s"
    on_gpus = measured | {"total": measured["total"] | {"devices": ["cuda"]}}
    assert method_table.of_models(on_gpus).rows[0][-2] == "GPU hours"
    total = 5 * 2 + 6 * 10 + 6 * 2 + 14 * 2  # what is shared; PPO, DPO and the evaluation of every run
    assert measured["total"]["seconds"] == total
    assert measured["total"]["device_hours"] == pytest.approx((total + 3 * 6 * 10) / 3600)


def test_the_table_is_in_the_report_in_markdown_and_in_latex(compared):
    tables = sweep_table.tables(compared.results)
    assert [table.name for table in tables] == ["sweep_methods", "sweep_methods_tests", "sweep_methods_shared"]
    section = studies.sweep_section(Run("smoke", compared.folder, {}, {}))
    assert [part.name for part in section.parts][:3] == [table.name for table in tables]
    assert [part.name for part in section.parts if "by_dpo" in part.name] == ["sweep_by_dpo.beta"]
    text = (compared.folder / "sweep.md").read_text()
    assert "| method | setting | gold: vader_compound |" in text and text.count("\n## ") == 2
    assert read_latex((compared.folder / "sweep.tex").read_text()) == [[list(row) for row in t.rows] for t in tables]


SIGNS = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"$\pm$": "±", "$-$": "−", r"$\times$": "×", r"$\le$": "≤",
    r"\dots{}": "…", "--": "–", "{[}": "[", "{*}": "*",
}  # fmt: skip


def read_latex(text: str) -> list[list[list[str]]]:
    """The cells of every tabular of a document, as LaTeX shows them; environments, braces and rows must be whole."""
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert not opened and bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    tables = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*?)\\bottomrule\n", text, re.DOTALL):
        rows = [re.split(r"(?<!\\)&", line) for line in body.replace("\\midrule\n", "").split("\\\\\n") if line]
        assert not re.search(r"\\\\\s*[\[*]", body)  # the end of a row takes these for its own
        assert {len(row) for row in rows} == {len(columns)} and body.count("\\midrule") == 1
        tables.append([[as_shown(cell.strip()) for cell in row] for row in rows])
    return tables


def as_shown(cell: str) -> str:
    plain = re.compile("|".join(map(re.escape, SIGNS)) + r"|\\([&%$#_{}])|([&%$#_{}\\~^])|.", re.DOTALL)

    def sign(part: re.Match) -> str:
        assert not part[2], f"{part[2]} is not escaped in {cell}"
        return SIGNS.get(part[0]) or part[1] or part[0]

    return plain.sub(sign, cell)


def test_latex_shows_every_sign_as_it_is():
    odd = "a_b & 50% $x$ {y} #1 ~ ^ \\ \\% <i> |  ± − × ≤ – …"
    table = Table(
        "odd",
        odd,
        [("ppo.kl_coef", odd, "n"), (odd, "\\\\", "1 ± 2"), ("[1, 2]", "-", "−1"), ("*", "", "")],
        [],
        odd,
        texts=2,
    )
    text = latex(table)
    shown = [[" ".join(cell.split()) for cell in row] for row in table.rows]
    assert read_latex(text) == [shown] and "\\label{tab:odd}" in text and "{llr}" in text
    assert as_shown(re.search(r"\\caption\{(.*)\}\n", text)[1]) == " ".join(f"{odd}. {odd}".split())


def test_a_failed_run_leaves_the_table_of_the_others(tmp_path, monkeypatch, capsys):
    def breaks(config):
        if config.dpo.beta == 0.3:
            raise RuntimeError("no such luck")

    sweeps.stand_in(monkeypatch, evaluation=evaluation, samples=samples, breaks=breaks)
    command = ["sweep", "experiment=smoke", f"runs={tmp_path}", "method=ppo,dpo", "dpo.beta=0.1,0.3"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "launcher.jobs=1"])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert re.search(r"dpo +dpo\.beta 0\.3 .* 0 of 1 .* failed", printed), printed
    assert "1 of 3 runs failed" in printed and re.search(r"ppo +dpo +gold", printed)
    with (tmp_path / "smoke/sweep.csv").open() as stream:
        [failed] = [row for row in csv.DictReader(stream) if row["state"] == "failed"]
    assert failed["reason"].startswith("no such luck") and failed["value"] == ""


@pytest.mark.slow
def test_methods_are_compared_on_real_stages(borrowed, capsys):
    command = ["sweep", "experiment=smoke", "tracker=none", f"runs={borrowed}", *METHODS, "best_of_n.n=2"]
    cli.main([*command, "launcher.jobs=2"])
    results = read_json(borrowed / "smoke/sweep.json")
    rows = {row["model"]: row for row in results["methods"]["models"]}
    assert set(rows) == {"human", "sft", "ppo", "dpo", "best_of_2"}
    for run in results["runs"]:
        model = sweep_space.own_model(run["setting"])
        metrics = read_json(borrowed / run["run"] / "evaluate/metrics.json")
        assert rows[model]["proxy_mean"]["mean"] == metrics["models"][model]["proxy_mean"]
        assert run["value"] == metrics["validation"]["models"][model]["gold_mean"]
        assert run["kl"] == metrics["models"][model]["kl"] and rows[model]["device_hours"]["mean"] > 0
    assert rows["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert "Methods and settings" in (borrowed / "smoke/report.md").read_text() and "chosen" in capsys.readouterr().out
