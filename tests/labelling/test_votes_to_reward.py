"""From samples to a reward model by way of people: the pairs of a run, votes on them, and training on the votes."""

from pools import opened, vote_on

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.fileio import read_json, read_lines

ASKED = ["run=asked", "target=comparisons", "comparisons.label_by=people", "comparisons.pairing=random"]


def test_votes_on_the_pairs_of_a_run_train_a_reward_model(smoke, tmp_path, capsys):
    base = ["experiment=smoke", f"runs={smoke}", "tracker=none", "dependents=false"]
    cli.main(["run", *base, *ASKED, "comparisons.prompts=24", "comparisons.eval_prompts=12"])
    assert "pairs for people to label" in capsys.readouterr().out
    pool, votes = smoke / "asked" / "comparisons" / "pool.jsonl", tmp_path / "votes.jsonl"
    labelling, ties = opened(pool, votes), 0
    while shown := labelling.next("anna"):
        one, two = len(shown.first), len(shown.second)
        ties += one == two
        vote_on(labelling, "anna", "tie" if one == two else "first" if one > two else "second")
    given = read_lines(votes)
    assert len(given) == len(read_lines(pool)) > 15
    preferences = [f"data.preferences.path={votes}", "data.preferences.format=arena"]
    chain.bring_up_to_date(compose([*base, *preferences, "run=voted", "target=reward", "reward.batch_size=4"]))
    folder = smoke / "voted" / "comparisons"
    for split in ("train", "test"):
        pairs = read_lines(folder / f"{split}.jsonl")
        assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
        assert len(pairs) == sum(vote["split"] == split and vote["winner"] != "tie" for vote in given) > 3
    metrics = read_json(smoke / "voted" / "reward" / "metrics.json")
    used = metrics["pairs"] + metrics["left_out_per_epoch"] + metrics["test_pairs"]
    assert used == len(given) - ties
    assert metrics["accuracy_length_only"] == 1.0  # these votes were about length
