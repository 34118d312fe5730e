"""The frontier: points of the smoke run's models, the runs it needs, what it writes, and what it advises."""

import itertools

import numpy as np
import pytest
from documents import documented
from helpers import composed, make_job

from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.evaluation import best_of
from threefold.fileio import read_json, read_lines, write_json, write_lines
from threefold.report import studies
from threefold.report.run import configured
from threefold.report.studies import frontier_section
from threefold.runs import frontier, variants
from threefold.stages import frontier as stage
from threefold.stages import parents, ppo

SETTINGS = ["frontier.prompts=6", "frontier.samples=8", "frontier.best_of=[2,4,8]"]


def points_of(method, smoke, folder):
    job = make_job("frontier", folder, *SETTINGS, f"frontier.method={method}")
    names = parents("frontier", job.config)
    job.inputs |= {name: (smoke / "smoke" / name).resolve() for name in names}
    metrics = stage.run(job)
    return metrics, read_lines(job.out / "points.jsonl"), names


def test_best_of_n_is_estimated_from_all_samples_of_the_sft_model(smoke, tmp_path):
    metrics, points, names = points_of("best_of_n", smoke, tmp_path)
    assert names == ["sft", "comparisons", "reward"] and metrics["prompts"] == 6
    assert [point["n"] for point in points] == [1, 2, 4, 8]
    assert [point["kl"] for point in points] == [best_of.kl_bound(n) for n in (1, 2, 4, 8)]
    assert points[0]["kl_measured"] == pytest.approx(0, abs=1e-12) and points[2]["kl_measured"] <= points[2]["kl"]
    for lower, higher in itertools.pairwise(points):  # of more samples the best has a higher score
        assert (np.array(higher["proxy"]) >= np.array(lower["proxy"])).all()
    for point, means in zip(points, metrics["points"], strict=True):
        assert means["gold"] == pytest.approx(np.mean(point["gold"])) and len(point["gold"]) == 6


def test_its_results_equal_their_documentation(smoke, tmp_path):
    written = set()
    for method in ("best_of_n", "dpo"):
        metrics, _, _ = points_of(method, smoke, tmp_path / method)
        written |= {f"points.<number>.{key}" for point in metrics.pop("points") for key in point} | set(metrics)
    assert written == documented("frontier")


def test_a_trained_policy_is_measured_against_the_sft_model(smoke, tmp_path):
    _, points, names = points_of("dpo", smoke, tmp_path)
    assert names == ["sft", "comparisons", "reward", "dpo"]
    pairs = read_json(smoke / "smoke" / "dpo" / "metrics.json")["pairs"]
    assert [point["episodes"] for point in points] == [0, pairs]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-5) and points[1]["kl"] > points[0]["kl"]


def test_snapshots_are_taken_in_even_steps_and_the_last_rollout_is_the_result():
    assert ppo.snapshots(0, 10) == set()
    assert ppo.snapshots(4, 10) == {2, 4, 6, 8}
    assert ppo.snapshots(9, 4) == {1, 2, 3}  # not more than there are rollouts before the last


def test_every_method_setting_and_seed_is_a_run_of_its_own():
    config = compose(["frontier.seeds=[1,2]", "frontier.betas=[0.1,0.3]", "frontier.kl_coefs=[0.0]"])
    members = frontier.variants_of(config.frontier)
    names = [variant.name for variant in members]
    assert len(set(names)) == len(names) == 2 * (1 + 2 + 1)
    variant = next(v for v in members if "dpo-beta0.3-seed2" in v.name)
    assert members[variant] == {"beta": 0.3, "seed": 2} and variant.target == "frontier"
    made = compose(variant.arguments(config, ["experiment=demo"]))
    assert (made.dpo.beta, made.dpo.seed, made.ppo.seed, made.frontier.method) == (0.3, 2, 1, "dpo")


def run_here(work, jobs):
    """Make variants one after the other in this process, which has imported everything already."""
    return {name: reason for name, task in work.items() if (reason := variants._make_one(*task))}


@pytest.fixture(scope="module")
def written(smoke, tmp_path_factory):
    """frontier.json of a small frontier on the smoke run's models."""
    runs = tmp_path_factory.mktemp("frontier") / "runs"
    (runs / "artifacts").mkdir(parents=True)
    for artifact in (smoke / "artifacts").iterdir():
        if (artifact / "manifest.json").is_file():
            (runs / "artifacts" / artifact.name).symlink_to(artifact.resolve())
    few = ["frontier.seeds=[1,2]", "frontier.betas=[0.1]", "frontier.snapshots=2", "frontier.bootstrap=100"]
    overrides = ["experiment=smoke", "tracker=none", f"runs={runs}", *SETTINGS, *few]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "_run", run_here)
        folder = frontier.write(compose(overrides), overrides)
    return folder, read_json(folder / "frontier.json")


@pytest.mark.slow
def test_the_command_makes_every_point_once_and_fits_what_has_enough_settings(written):
    folder, found = written
    methods = ("best_of_n", "dpo", "ppo")
    by_method = {method: [p for p in found["points"] if p["method"] == method] for method in methods}
    assert {method: len(points) for method, points in by_method.items()} == {"best_of_n": 8, "dpo": 4, "ppo": 8}
    assert {point["seed"] for point in found["points"]} == {1, 2}
    assert [p["episodes"] for p in by_method["ppo"]][:4] == [0, 16, 48, 64]
    assert set(found["laws"]) == {"best_of_n", "ppo"} and set(found["laws"]["ppo"]) == {"gold", "second", "proxy"}
    assert (
        found["judges"]["gold"] == "vader"
        and (found["prompts"], found["chosen_by_prompts"]) == (3, 3)
        and found["missing"] == []
    )
    assert len(found["advice"]) == 4 and "DPO: fewer than 3 settings, so no law is fitted" in found["advice"][1]
    assert (folder / "sft" / "manifest.json").is_file()  # what all share belongs to the run itself
    artifacts = [each.name.partition("-")[0] for each in (folder.parent / "artifacts").glob("*-*") if each.is_dir()]
    assert artifacts.count("reward") == 1 and artifacts.count("ppo") == 3  # that of the smoke run, and two seeds


@pytest.mark.slow
def test_the_report_shows_the_frontier_of_this_reward_model_alone(written, smoke):
    folder, found = written
    config = compose(["experiment=smoke", f"runs={folder.parent}"])
    shown = frontier_section(configured(config))
    points, laws, *figures = shown.parts
    assert (points.name, laws.name) == ("frontier_points", "frontier_laws") and len(laws.rows) == 1 + len(found["laws"])
    assert [part.name for part in figures] == [f"frontier_{s}" for s in ("gold", "proxy", "second")]
    assert len(figures[0].data) == len(found["points"]) and shown.points == tuple(found["advice"])
    assert figures[0].data[0]["gain"] == 0
    last = [p["gold"] for p in found["points"] if p["method"] == "ppo" and p["episodes"] == 64]  # of two seeds
    row = next(row for row in points.data if row["method"] == "ppo" and "episodes 64" in row["setting"])
    assert [row["gold"], row["gold_std"]] == pytest.approx([np.mean(last), np.std(last, ddof=1)])
    write_json(folder / "frontier.json", found | {"missing": ["ppo-seed2"]})
    assert "Runs that are missing: ppo-seed2." in frontier_section(configured(config)).lead
    write_json(folder / "frontier.json", found | {"made_from": {"sft": "other"}})
    assert frontier_section(configured(config)).parts == () and frontier.current(folder) is None


def law(trend, share=1.0, peak=None):
    fitted = {"form": "rl", "alpha": 1.0, "beta": 0.5, "farthest_kl": 9.0}
    return {"gold": fitted | {"trend": trend, "trend_share": share, "peak_kl": peak, "peak_kl_ci95": None}}


def test_the_advice_says_where_to_stop_and_how_sure_that_is():
    points = [
        {"method": "ppo", "kl_coef": 0.0, "seed": 1, "episodes": 512, "kl": 4.0, "gold": 0.5, "gold_chosen_by": 0.6}
    ]
    given = (law("peaks", peak=5.0), law("peaks", 0.4, 5.0), law("rises"), law("falls"))
    peaked, perhaps, rising, falling = (frontier.advice(points, {"ppo": each})[0] for each in given)
    assert "PPO: by the fitted law gold peaks at KL 5.0 (in 100% of resamples)" in peaked and "stop there" in peaked
    assert "in 40% of resamples), which is not certain" in perhaps and "stop" not in perhaps
    assert "still rises at the farthest point, KL 9.0" in rising and "falls from the start" in falling
    assert "the point at KL 4.0 (KL coefficient 0, seed 1, after 512 episodes) has 0.500 on the other half" in rising


def test_a_peak_without_an_interval_is_shown_without_one():
    assert studies.peak({"peak_kl": 5.0, "peak_kl_ci95": None, "trend": "peaks"}) == "peaks at 5.0 [–]"
    assert studies.peak({"peak_kl": 5.0, "peak_kl_ci95": [4.0, 6.5], "trend": "peaks"}) == "peaks at 5.0 [4.0, 6.5]"


def test_the_point_that_is_advised_is_chosen_by_other_prompts_than_it_is_reported_on():
    """Of two settings one is better on every second prompt, the other, by luck, on those between."""
    gold = {1: [0.9, 0.2] * 8, 2: [0.4, 0.8] * 8, 3: [0.3, 0.3] * 8}  # by seed; what is chosen by is the first of two
    points = []
    for seed, scores in gold.items():
        for kl, values in ((0.0, [0.0] * 16), (4.0, scores)):
            point = {"method": "dpo", "beta": 0.1, "seed": seed, "episodes": 8, "kl": kl}
            points.append(
                point | {name: values for name in frontier.SCORES} | {"gains": dict.fromkeys(frontier.SCORES, values)}
            )
    found = frontier.fitted(points, compose([]).frontier)
    assert (
        "at KL 4.0 (beta 0.1, seed 1) has 0.200 on the other half" in found["advice"][0]
    )  # 0.9 there, not seed 2's 0.8
    assert (found["prompts"], found["chosen_by_prompts"]) == (8, 8)
    best = next(point for point in found["points"] if point["seed"] == 1 and point["kl"] == 4.0)
    assert best["gold"] == pytest.approx(0.2) and best["gold_chosen_by"] == pytest.approx(0.9)


def test_gains_at_a_distance_that_all_reached_are_compared():
    points = [{"method": m, "seed": 1, "kl": 4.0, "gold": 0.5, "gold_chosen_by": 0.5} for m in ("ppo", "dpo")]
    near = {"gold": law("rises")["gold"] | {"farthest_kl": 4.0}}
    last = frontier.advice(points, {"ppo": law("rises"), "dpo": near})[-1]
    gain = best_of.Law("rl", 1.0, 0.5).gain(np.array([4.0]))[0]
    assert last.endswith(f"the laws give gold gains of: PPO {gain:+.3f}, DPO {gain:+.3f}.")


def test_runs_that_fail_leave_the_points_of_the_others_with_their_names(smoke, tmp_path, monkeypatch):
    config = compose(["experiment=smoke", f"runs={tmp_path}", *SETTINGS, "frontier.seeds=[1]", "frontier.betas=[]"])

    def make(given, overrides, wanted):
        made = tmp_path / "smoke" / wanted[0].name / "frontier"
        made.mkdir(parents=True)
        row = {"n": 1, "kl": 0.0, "gold": [0.1] * 2, "second": [0.1] * 2, "proxy": [0.1] * 2}
        write_lines(made / "points.jsonl", [row, row | {"n": 2, "kl": 0.2}])
        raise UserError("1 of 2 variants failed")

    monkeypatch.setattr(variants, "make", make)
    with pytest.raises(UserError, match="1 of 2 variants failed"):
        frontier.write(config, [])
    assert read_json(tmp_path / "smoke" / "frontier.json")["missing"] == ["frontier-ppo-kl_coef0-seed1"]


def test_the_command_refuses_keys_that_it_would_not_heed():
    with pytest.raises(UserError, match=r"frontier\.seeds has the seeds"):
        frontier.write(composed("seeds=3"), ["seeds=3"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("frontier.best_of=[128]", "frontier.samples=64"),
        ("frontier.betas=[0.1,0.1]", "twice"),
        ("frontier.seeds=[]", "at least one"),
        ("frontier.best_of=[1]", "at least one n above 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, said):
    with pytest.raises(UserError, match=said):
        compose([override])


def test_a_judge_that_gives_no_score_is_refused(smoke, tmp_path):
    job = make_job("frontier", tmp_path, *SETTINGS)
    judges = {"gold": lambda prompts, texts, **given: [None] * len(texts)}
    policy, tokenizer = (
        stage.loading.load_policy(smoke / "smoke" / "sft"),
        stage.chat.load_tokenizer(smoke / "smoke" / "sft"),
    )
    asked = [stage.Example([{"role": "user", "content": "hello"}], "hi")]
    with pytest.raises(UserError, match="judge gold gives no score"):
        stage.replies_scored(job, policy, judges, tokenizer, asked)


def test_composed_configurations_name_the_method_of_their_stage():
    assert parents("frontier", composed("frontier.method=ppo")) == ["sft", "comparisons", "reward", "ppo"]
