"""People's votes on the evaluation's replies: the pool and its order, the join to models, the arena, and the report."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from helpers import composed
from pools import opened, row, vote_on, write_pool

from threefold.errors import UserError
from threefold.evaluation import arena
from threefold.labelling import page, votes_arena
from threefold.labelling.queue import Labelling
from threefold.labelling.votes import Vote, read_votes
from threefold.report import evaluation as arena_section
from threefold.report.run import Run, add_votes

MODELS = ["human", "sft", "dpo", "ppo"]
STRENGTH = {"human": 0.5, "sft": 0.0, "dpo": 0.4, "ppo": 1.2}


def replied(prompts: int) -> list[dict]:
    """Rows of samples.jsonl: a judge `gold` that likes ppo, and `second` that has no score for people."""
    return [
        {"prompt": [{"role": "user", "content": f"question {i}"}]}
        | {
            name: {"reply": f"{name} says {i}", "gold": STRENGTH[name]}
            | ({} if name == "human" else {"second": -STRENGTH[name]})
            for name in MODELS
        }
        for i in range(prompts)
    ]


def votes_on(rows: list[dict], seed: int, share: float = 1.0, labellers: int = 1) -> list[Vote]:
    """Votes of people who follow the Bradley-Terry model with STRENGTH."""
    rng, found = np.random.default_rng(seed), []
    for comparison in votes_arena.pool(rows):
        for labeller in range(labellers if rng.random() < share else 0):
            a, b = STRENGTH[comparison.model_a], STRENGTH[comparison.model_b]
            winner = "model_a" if rng.random() < 1 / (1 + np.exp(b - a)) else "model_b"
            said = {"winner": winner, "labeller": f"person {labeller}", "reason": "", "time": "2026-11-21T10:00:00Z"}
            found.append(Vote(**asdict(comparison), **said))
    return found


def test_the_pool_has_each_two_models_replies_that_differ():
    rows = replied(3)
    rows[1]["dpo"]["reply"] = rows[1]["sft"]["reply"]
    pool = votes_arena.pool(rows)
    assert len(pool) == 3 * 6 - 1 and len({c.pair for c in pool}) == len(pool)
    assert {c.split for c in pool} == {"test"}  # which no stage trains on
    for comparison in pool:
        found = next(row for row in rows if row["prompt"] == comparison.prompt)
        assert found[comparison.model_a]["reply"] == comparison.response_a
        assert found[comparison.model_b]["reply"] == comparison.response_b
    # equal replies of two models to one prompt are still two pairs, each of its own models
    assert len({c.pair for c in pool if c.prompt == rows[1]["prompt"] and "ppo" in (c.model_a, c.model_b)}) == 3


def test_pairs_keep_their_names_when_another_model_changes():
    before, rows = votes_arena.pool(replied(4)), replied(4)
    for changed in rows:
        changed["ppo"]["reply"] += "!"
    after = {c.pair for c in votes_arena.pool(rows)}
    assert {c.pair for c in before} & after == {c.pair for c in before if "ppo" not in (c.model_a, c.model_b)}


def test_pairs_of_models_take_turns(tmp_path):
    labelling = Labelling(votes_arena.pool(replied(20)), tmp_path / "votes.jsonl", 1)
    order = [(c.model_a, c.model_b) for c in labelling.pool.values()]
    assert len(order) == 120
    for seen in range(0, 120, 6):
        assert set(Counter(order[: seen + 6]).values()) == {seen // 6 + 1}
    again = Labelling(votes_arena.pool(replied(20)), tmp_path / "other.jsonl", 2)
    assert list(again.pool) != list(labelling.pool) and set(again.pool) == set(labelling.pool)
    uneven = write_pool(tmp_path / "uneven.jsonl", [row(i, model_b="dpo" if i == 9 else "ppo") for i in range(10)])
    assert "pair-9" in list(opened(uneven, tmp_path / "uneven_votes.jsonl").pool)[:2]


def test_each_vote_counts_once_and_a_tie_as_half_a_win_for_both():
    rows = replied(2)
    pair = next(c for c in votes_arena.pool(rows) if {c.model_a, c.model_b} == {"sft", "ppo"})
    assert (pair.model_a, pair.model_b) == ("ppo", "sft")
    votes = [
        Vote(**asdict(pair), winner=winner, labeller=str(i), reason="", time="2026-11-21T10:00:00Z")
        for i, winner in enumerate(["model_a", "model_a", "tie", "model_b"])
    ]
    wins = votes_arena.counted(rows, votes)
    assert wins.sum() == 4 and wins[0, 3, 1] == 2.5 and wins[0, 1, 3] == 1.5
    assert votes_arena.anchor(wins, MODELS) == "sft" and votes_arena.anchor(wins[:, 2:, 2:], ["dpo", "ppo"]) == "dpo"


def test_strengths_behind_the_votes_lie_inside_their_intervals():
    inside = dict.fromkeys(MODELS, 0)
    for seed in range(30):
        rows = replied(60)
        wins = votes_arena.counted(rows, votes_on(rows, seed, share=0.5, labellers=2))
        found = arena.summary(wins, MODELS, {name: [1] * 60 for name in MODELS}, "sft")
        for standing in found["standings"]:
            low, high = standing["ci95"]
            inside[standing["model"]] += low <= 1000 + arena.POINTS * STRENGTH[standing["model"]] <= high
    assert min(inside.values()) >= 25, inside


def test_few_votes_leave_out_models_that_nothing_links():
    rows = replied(5)
    votes = [v for v in votes_on(rows, 1) if {v.model_a, v.model_b} in ({"sft", "ppo"}, {"human", "dpo"})]
    found = arena.summary(votes_arena.counted(rows, votes), MODELS, {name: [3] * 5 for name in MODELS}, "sft")
    assert found["not_linked"] == ["human", "dpo"] and {s["model"] for s in found["standings"]} == {"sft", "ppo"}
    one = arena.summary(votes_arena.counted(rows, votes[:1]), MODELS, {n: [3] * 5 for n in MODELS}, "ppo")
    assert [(s["model"], s["ci95"]) for s in one["standings"]] == [("ppo", (1000.0, 1000.0))]


def test_judges_are_compared_with_people_where_both_prefer_a_reply():
    rows = replied(10)
    votes = [v for v in votes_on(rows, 2) if {v.model_a, v.model_b} == {"sft", "ppo"}]  # ppo is model_a, gold likes it
    found, better = votes_arena.judges(rows, votes), np.mean([v.winner == "model_a" for v in votes])
    assert set(found) == {"gold", "second"} and found["gold"]["votes"] == 10
    assert found["gold"]["agree"] == pytest.approx(better) == 1 - found["second"]["agree"]
    with_people = [v for v in votes_on(rows, 2) if {v.model_a, v.model_b} == {"human", "ppo"}]
    assert set(votes_arena.judges(rows, with_people)) == {"gold"}


@pytest.fixture
def run(tmp_path):
    """The configuration of a run of which the evaluation's replies are there."""
    rows, config = replied(6), composed(f"runs={tmp_path}", "label.pairs=evaluate")
    samples = votes_arena.samples_file(config)
    samples.parent.mkdir(parents=True)
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config, rows


def test_votes_of_the_page_reach_the_arena(run):
    config, rows = run
    file = votes_arena.votes_file(config)
    assert votes_arena.of_run(config) is None and file.name == "evaluate_votes.jsonl"
    labelling = Labelling(votes_arena.pool(rows), file, config.label.seed)
    while shown := labelling.next("anna"):
        by_people = [text.startswith("human") for text in (shown.first, shown.second)]
        vote_on(labelling, "anna", {(True, False): "first", (False, True): "second"}.get(tuple(by_people), "tie"))
    found = votes_arena.of_run(config)
    assert found["votes"] == 36 and found["ties"] == 18 and found["labellers"] == 1 and found["left_out"] == 0
    assert found["arena"]["win_rates"]["human"] == {"sft": 1.0, "dpo": 1.0, "ppo": 1.0}
    assert found["arena"]["win_rates"]["ppo"] == {"human": 0.0, "sft": 0.5, "dpo": 0.5}


def test_votes_on_replies_of_an_earlier_evaluation_are_left_out_and_counted(run, capsys):
    config, rows = run
    earlier = [row | {"ppo": row["ppo"] | {"reply": "an older reply"}} for row in rows]
    file = votes_arena.votes_file(config)
    file.write_text("".join(json.dumps(asdict(v)) + "\n" for v in votes_on(earlier, 1)) + '{"pair": "cut off')
    assert len(read_votes(file)) == 36  # the last line is still being written
    found = votes_arena.of_run(config)
    assert found["votes"] == 18 and found["left_out"] == 18 and found["arena"]["not_linked"] == ["ppo"]
    stages = {"evaluate": {"arena": {}, "judge": "vader", "second_judge": "textblob"}}
    add_votes(stages, config)
    assert "18 on pairs that this evaluation does not have are left out" in capsys.readouterr().out
    standings = arena_section.arena_section(Run("smoke", file.parent, stages, {})).folded[0]
    assert standings.title == "Standings, people's votes" and standings.note.startswith("18 votes of 1 person")
    assert {cells[0] for cells in standings.rows[1:]} == {"human", "sft", "dpo"}
    file.write_text("".join(json.dumps(asdict(v) | {"pair": "x"}) + "\n" for v in votes_on(rows, 1)))
    assert votes_arena.of_run(config) == {"votes": 0, "left_out": 36}
    file.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"evaluate_votes.jsonl, line 1: is not JSON"):
        votes_arena.of_run(config)


def test_the_page_serves_the_evaluation_and_says_what_comes_next(run, tmp_path):
    config, rows = run
    assert page.pairs_and_votes(config) == (
        votes_arena.samples_file(config), tmp_path / "smoke" / "evaluate_votes.jsonl",
    )  # fmt: skip
    chosen = ["run=mine", "label.pairs=evaluate", "label.votes=my votes.jsonl"]
    command = page.report_command(chosen)
    assert command == "make report ARGS=\"run=mine label.pairs=evaluate 'label.votes=my votes.jsonl'\""
    votes_arena.samples_file(config).unlink()
    with pytest.raises(UserError, match="make it with threefold run target=evaluate"):
        page.serve(config, [])
    assert len(rows) == 6
