"""Several seeds: what is made once and what again, spread and paired differences, and variants that fail."""

import json
import os
import signal

import numpy as np
import pytest
from helpers import composed
from scipy import stats

from threefold import cli
from threefold.errors import UserError
from threefold.fileio import numbers, read_json, write_json
from threefold.report import studies
from threefold.report.run import Run
from threefold.runs import seeds, variants


def test_numbers_are_found_by_their_dotted_names():
    metrics = {"accuracy": 0.5, "seconds": 3.0, "ci": [0, 1], "models": {"ppo": {"kl": 2, "on": True}}, "name": "x"}
    assert numbers(metrics, seeds.COSTS) == {"accuracy": 0.5, "models.ppo.kl": 2.0}


def test_spread_is_the_mean_and_the_standard_deviation_of_a_sample():
    found = seeds.spread([{"a": 1.0, "b": 1.0, "same": 7.0}, {"a": 2.0, "same": 7.0}, {"a": 6.0, "same": 7.0}])
    assert set(found) == {"a"}  # b is not in all of them, and the seed does not reach what is the same
    assert found["a"]["mean"] == 3.0 and found["a"]["std"] == pytest.approx(np.sqrt((4 + 1 + 9) / 2))


def test_differences_of_the_same_seeds_are_paired():
    ours, others = [0.70, 0.72, 0.69, 0.75], [0.60, 0.64, 0.58, 0.66]
    found, difference = seeds.t_test(ours, others), np.subtract(ours, others)
    half = stats.t.ppf(0.975, 3) * difference.std(ddof=1) / 2
    assert found["difference"] == pytest.approx(difference.mean())
    assert found["ci95"] == pytest.approx([difference.mean() - half, difference.mean() + half])
    assert found["p"] == pytest.approx(2 * stats.t.sf(difference.mean() / (difference.std(ddof=1) / 2), 3))


def evaluated(folder, fingerprint, gold):
    (folder / "evaluate").mkdir(parents=True)
    models = {name: {"gold_mean": value} for name, value in gold.items()}
    write_json(
        folder / "evaluate" / "metrics.json",
        {"models": models, "ppo_gold_mean": gold["ppo"], "fingerprint": fingerprint},
    )
    return folder


def test_claims_say_what_the_seeds_can_tell(tmp_path):
    folders = [
        evaluated(tmp_path / str(i), f"f{i}", {"sft": 0.30, "dpo": 0.30 + 0.1 * (-1) ** i, "ppo": 0.69 + 0.01 * i})
        for i in range(4)
    ]
    found = {"seeds": [1, 2, 3, 4], **seeds.summary(folders)}
    said = seeds.claims(found)
    assert said[0].startswith("gold of dpo less sft: +0.000") and said[0].endswith("not distinguishable")
    assert said[1].startswith("gold of ppo less sft: +0.405") and said[1].endswith("higher")
    run = Run("run", tmp_path, {"evaluate": {"judge": "vader"}}, {})
    assert studies.seeds_of_models(run, found).rows == [
        ("model", "gold judge: vader"), ("dpo", "0.300 ± 0.115"), ("ppo", "0.705 ± 0.013"),
    ]  # fmt: skip
    assert studies.seeds_of_stages(found).rows[1][:3] == ("evaluate", "ppo_gold_mean", "0.705 ± 0.013")


def test_nothing_is_claimed_of_models_that_the_seed_does_not_reach(tmp_path):
    folders = [
        evaluated(tmp_path / str(i), f"f{i}", {"sft": 0.30, "dpo": 0.41, "ppo": 0.69 + 0.01 * i}) for i in range(3)
    ]
    found = seeds.summary(folders)
    assert [(row["model"], row["against"]) for row in found["differences"]] == [("ppo", "sft"), ("ppo", "dpo")]
    assert set(found["metrics"]["evaluate"]) == {"models.ppo.gold_mean", "ppo_gold_mean"}


def test_seeds_of_an_older_result_are_not_shown(tmp_path):
    run = evaluated(tmp_path / "run", "f0", {"sft": 0.3, "ppo": 0.6})
    assert seeds.current(run) is None
    write_json(run / "seeds.json", {"fingerprints": {"evaluate": ["f0", "f1"]}})
    assert seeds.current(run) is not None
    write_json(run / "seeds.json", {"fingerprints": {"evaluate": ["f1", "f2"]}})
    assert seeds.current(run) is None
    write_json(run / "seeds.json", {"fingerprints": {"ppo": ["f0"]}})  # the run's own was removed since
    assert seeds.current(run) is None


def test_a_stage_without_a_seed_is_refused():
    with pytest.raises(UserError, match="stage tokenizer has no seed"):
        seeds.seeded_key(composed("target=tokenizer", "seeds=2"))
    assert seeds.seeded_key(composed("target=dpo")) == "dpo.seed" and seeds.seeded_key(composed()) == "seed"


def test_a_target_takes_along_what_depends_on_it_in_the_run(tmp_path):
    config = composed("target=dpo", f"runs={tmp_path}")
    assert seeds.last_made(config, tmp_path) == "dpo"
    (tmp_path / "evaluate").mkdir()
    assert seeds.last_made(config, tmp_path) == "evaluate"


@pytest.mark.slow
def test_the_command_makes_each_seed_once_in_processes_of_their_own(borrowed, capsys):
    command = ["run", "experiment=smoke", "tracker=none", f"runs={borrowed}"]
    command += ["target=dpo", "seeds=2", "launcher.jobs=2"]
    cli.main(command)
    said = capsys.readouterr().out
    assert "1 variants, 1 at a time" in said and "dpo.seed-2: done" in said and " ± " in said  # seed 1 is there
    found = json.loads((borrowed / "smoke" / "seeds.json").read_text())
    assert found["key"] == "dpo.seed" and found["seeds"] == [1, 2] and set(found["metrics"]) == {"dpo"}
    assert (
        found["metrics"]["dpo"]["accuracy"]["values"][0] == read_json(borrowed / "smoke/dpo/metrics.json")["accuracy"]
    )
    made = sorted(each.name for each in (borrowed / "artifacts").glob("dpo-*") if each.is_dir())
    assert len(made) == 2
    assert (borrowed / "smoke/variants/dpo.seed-2/log.txt").is_file()
    cli.main(command)
    assert "variants" not in capsys.readouterr().out.partition("report:")[0]  # nothing is left to make


def test_a_variant_that_fails_leaves_the_others_and_its_first_line(borrowed, monkeypatch, capsys):
    def run_here(work, jobs):
        return {name: reason for name, task in work.items() if (reason := variants._make_one(*task))}

    def bring_up_to_date(config):
        if config.dpo.seed == 2:
            raise RuntimeError("weights lost\nin the sea")

    monkeypatch.setattr(variants, "_run", run_here)
    monkeypatch.setattr(variants.chain, "bring_up_to_date", bring_up_to_date)
    config = composed("target=dpo", f"runs={borrowed}", "seeds=3")
    members = [variants.Variant(f"variants/{s}", (f"dpo.seed={s}",), "dpo") for s in (2, 3)]
    with pytest.raises(UserError, match=r"1 of 2 variants failed; variants/2: weights lost \(see .*log.txt\)"):
        variants.make(config, ["experiment=smoke", "tracker=none", f"runs={borrowed}"], members)
    assert "in the sea" in (borrowed / "smoke/variants/2/log.txt").read_text()


def ended_from_outside(overrides, log):
    if overrides == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed_takes_only_its_own_variant_along(monkeypatch, capsys):
    monkeypatch.setattr(variants, "_make_one", ended_from_outside)
    work = {name: ([name], None) for name in ("one", "die", "two")}
    assert variants._run(work, 2) == {"die": variants.OUTSIDE}
    assert "3 of 3" in capsys.readouterr().out
