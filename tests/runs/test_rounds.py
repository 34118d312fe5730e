"""Rounds of iterated DPO: each samples from the policy of the round before, and trains that policy."""

import re

import pytest

import threefold
from threefold import cli
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import read_json, read_lines
from threefold.runs import rounds

BASE = ["experiment=smoke", "run=it's", "target=dpo"]


def test_each_round_after_the_first_samples_from_the_last_policy_and_starts_from_it(tmp_path):
    given = [*BASE, f"runs={tmp_path}", "rounds=3"]
    first, second, last = (compose(overrides) for overrides in rounds.overrides_of(compose(given), given))
    assert [config.run for config in (first, second, last)] == ["it's/round-1", "it's/round-2", "it's"]
    assert first.comparisons == compose(BASE).comparisons and first.dpo == compose(BASE).dpo
    for number, config in ((1, second), (2, last)):
        policy = str(tmp_path / "it's" / f"round-{number}" / "dpo")
        assert list(config.comparisons.policies) == [policy] and config.dpo.start == policy
        assert not config.comparisons.sft and config.comparisons.seed == first.comparisons.seed + number
        assert config.dpo.seed == first.dpo.seed
    assert list(last.evaluate.earlier) == [str(tmp_path / "it's" / f"round-{n}" / "dpo") for n in (1, 2)]
    assert {config.rounds for config in (first, second, last)} == {None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["comparisons.policies=[a/b/dpo]"], "comparisons.policies: rounds=2 sets it"),
        (["dpo.start=a/b/dpo"], "dpo.start: rounds=2 sets it"),
        (["target=sft"], "rounds=2: are rounds of dpo, which target=sft does not need"),
        (["seeds=2"], "rounds=2: seeds=2 is another way"),
        (["data.preferences.path=pairs.jsonl"], "rounds=2: each samples its own pairs"),
        (["comparisons.label_by=people", "comparisons.pairing=random"], "rounds=2: needs comparisons.label_by=judge"),
    ],
)
def test_what_rounds_cannot_be_made_with_is_refused(given, message):
    overrides = [*BASE, "rounds=2", *given]
    with pytest.raises(UserError, match=message):
        rounds.overrides_of(compose(overrides), overrides)


def test_other_commands_refuse_rounds(tmp_path):
    from threefold import chain

    with pytest.raises(UserError, match="rounds=2: is for threefold run"):
        chain.bring_up_to_date(compose([*BASE, f"runs={tmp_path}", "rounds=2"]))


@pytest.mark.slow
def test_two_rounds_are_made_and_kept(smoke, capsys):
    given = ["experiment=smoke", f"runs={smoke}", "tracker=none", "run=iterated", "target=dpo", "dependents=false"]
    given += ["rounds=2", "comparisons.prompts=16", "comparisons.eval_prompts=16"]
    run = threefold.make(*given)
    first = read_json(smoke / "iterated" / "round-1" / "dpo" / "metrics.json")["fingerprint"]
    assert read_json(run.folder / "dpo" / "manifest.json")["parts"]["dpo.start"] == [first]
    pool = read_lines(run.folder / "comparisons" / "pool.jsonl")
    assert {row[side] for row in pool for side in ("model_a", "model_b")} == {"round-1/dpo"}
    made = {folder.name for folder in (smoke / "artifacts").iterdir()}
    cli.main(["status", *given])
    assert re.search(r"^dpo +fresh", capsys.readouterr().out, re.MULTILINE)
    threefold.make(*given)
    assert {folder.name for folder in (smoke / "artifacts").iterdir()} == made
