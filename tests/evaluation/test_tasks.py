"""Tasks of the evaluation: problems read and refused, verdicts, shares, fingerprints, and what the smoke run wrote."""

import json

import pytest
from data_helpers import DATA, lines
from helpers import composed, make_job, tiny_policy, tiny_tokenizer
from omegaconf import OmegaConf

from threefold import chain
from threefold.config.compose import compose
from threefold.data import reading
from threefold.data import tasks as generated
from threefold.errors import UserError
from threefold.evaluation import measuring, tasks
from threefold.evaluation.players import Player
from threefold.evaluation.statistics import share_interval
from threefold.fileio import read_json, read_lines
from threefold.models import chat
from threefold.report.evaluation import task_rows

ROWS = [{"question": "2+2?", "answer": "Add.\n#### 4"}, {"question": "2+3?", "answer": "#### 5"}]


def task(path, check="numeric", **options):
    """The configuration with one task called mine."""
    given = {"path": str(path), "format": "prompt_completion", "check": check, **options}
    text = json.dumps(given | {"columns": {"prompt": "question", "completion": "answer"}}).replace('"', "")
    return compose(["experiment=smoke", "~evaluate.tasks.letters", f"evaluate.tasks={{mine:{text}}}"])


def read(config):
    return tasks.load("evaluate.tasks.mine", config.evaluate.tasks.mine)[0]


def test_a_file_of_problems_is_read_whole_and_its_replies_are_checked(tmp_path):
    problems = read(task(lines(tmp_path / "rows.jsonl", ROWS)))
    assert [(p.prompt[0]["content"], p.answer) for p in problems] == [(r["question"], r["answer"]) for r in ROWS]
    replies = ["First 2 and 2, hence\n#### 4.0", "It is 6"]
    assert tasks.verdicts("numeric", problems, replies) == [{"right": True}, {"right": False}]
    assert tasks.verdicts("exact", problems, ["Add.  #### 4", "5"]) == [{"right": True}, {"right": False}]


def test_shares_have_wilsons_interval():
    found = measuring.shares([{"right": right} for right in (True, False, True, True)])
    assert found == {"accuracy": 0.75, "accuracy_ci95": share_interval([1.0, 0.0, 1.0, 1.0])}


@pytest.mark.parametrize(
    ("name", "generator"), [("letters", generated.letters), ("arithmetic", generated.arithmetic)]
)  # fmt: skip
def test_a_generated_task_asks_what_training_does_not_see(name, generator):
    config = compose([f"tasks={name}", f"data={name}"])
    asked = {p.prompt[0]["content"] for p in tasks.load("", config.evaluate.tasks[name])[0]}
    trained = {row["key"] for row in reading.load(config.data.replies, "train").rows}
    assert asked and asked.isdisjoint(trained) and asked | trained <= {row["prompt"] for row in generator()}


BROKEN = [
    ([*ROWS, {"question": "Why?", "answer": "Because."}], {}, "cannot check 1 of the 3 answers, the first 'Because.'"),
    ([{"question": "Why?"}] * 3, {}, "3 of 3 rows cannot be used as format=prompt_completion"),
    (ROWS, {"split": "test"}, "evaluate.tasks.mine.split=test: .* has no problem there"),
]


@pytest.mark.parametrize(("rows", "options", "message"), BROKEN)
def test_a_bad_file_is_refused_before_any_stage_runs(rows, options, message, tmp_path):
    config = task(lines(tmp_path / "rows.jsonl", rows), **options)
    with pytest.raises(UserError, match=message):
        chain.check_sources(config, chain.plan(config))


def test_a_task_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        chain.plan(task(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=letter"], r"no such choice \(nearest: letters\); there are arithmetic, gsm8k, gsm8k_hub"),
        (["tasks=letters", "evaluate.tasks.letters.chek=exact"], r"not a configuration key \(nearest: .*letters.check"),
        (["tasks=letters", "evaluate.tasks.letters.check=right"], "check=right: must be one of exact, numeric"),
        (["tasks=letters", "evaluate.tasks.letters.check=instructions"], "check=instructions reads ifeval"),
        (["tasks=ifeval_hub", "evaluate.tasks.ifeval.check=exact"], "reads prompt_completion or messages"),
        (["tasks=letters", "evaluate.tasks.letters.path=null"], "evaluate.tasks.letters.path has no value"),
        (["tasks=letters", "evaluate.tasks.letters.max_new_tokens=512"], "leaves no room in 512 positions"),
        (["tasks=gsm8k_hub", "evaluate.tasks.gsm8k.split=all"], "split=all: its splits are kept apart"),
        (["+evaluate.tasks={a@b:{path:x,format:messages,check:exact}}"], "'a@b' is no name of letters"),
    ],
)
def test_a_wrong_key_of_a_task_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        compose(overrides)


def test_the_fingerprint_covers_the_content_and_not_the_place(tmp_path):
    def planned(path, **options):
        return chain.plan(task(path, **options))["evaluate"]

    first = planned(lines(tmp_path / "rows.jsonl", ROWS))
    assert first.fingerprint == planned(lines(tmp_path / "elsewhere" / "copy.jsonl", ROWS)).fingerprint
    assert first.fingerprint != planned(lines(tmp_path / "rows2.jsonl", ROWS[:1])).fingerprint
    assert first.fingerprint != planned(tmp_path / "rows.jsonl", problems=1).fingerprint
    assert first.fingerprint != planned(tmp_path / "rows.jsonl", check="exact").fingerprint
    assert "evaluate.tasks.mine.path" not in first.parts and "evaluate.tasks.mine.source" in first.parts


def test_too_long_problems_are_left_out_and_counted(tmp_path):
    rows = [{"question": "what is it? " * count, "answer": "1"} for count in (1, 2, 60)]
    config = task(lines(tmp_path / "rows.jsonl", rows), problems=2, max_new_tokens=40)
    job = make_job("evaluate", tmp_path / "job")
    job.config = config
    how = {"": config.sampling}
    (suite,) = measuring.prepared_tasks(job, tiny_tokenizer(), tiny_policy(), how).values()
    assert suite.left_out["dropped_too_long"] == 1 and len(suite.problems) == 2
    assert suite.sampling_settings[""].max_new_tokens == 40 and how[""].max_new_tokens == 32
    [(metrics, answers)] = measuring.answers_to_task(
        suite, tiny_policy(), {"sft": Player("sft")}, None, tiny_tokenizer(), None
    ).values()  # fmt: skip
    assert metrics["accuracy"] == sum(answer["right"] for answer in answers) / 2
    job.config = composed("evaluate.tasks.letters.max_new_tokens=127")
    with pytest.raises(UserError, match=r"tasks\.letters\.max_new_tokens: leaves no room for any problem"):
        measuring.prepared_tasks(job, tiny_tokenizer(), tiny_policy(), how)


def test_ways_to_decode_choose_among_the_same_samples_of_a_problem(tmp_path):
    policy, tokenizer, count = tiny_policy(), tiny_tokenizer(), 6
    job = make_job("evaluate", tmp_path / "job")
    job.config = config = task(lines(tmp_path / "rows.jsonl", ROWS), max_new_tokens=2)
    greedily = OmegaConf.merge(config.sampling, {"temperature": 1e-4})
    ways = {"": config.sampling, "greedy_": greedily}
    (suite,) = measuring.prepared_tasks(job, tokenizer, policy, ways).values()
    players = {"sft": Player("sft"), "long": Player("sft", "best_of", 4), "vote": Player("sft", "majority", count)}

    def lengths(_, replies, **__):
        return [float(len(reply)) for reply in replies]

    found = measuring.answers_to_task(suite, policy, players, lengths, tokenizer, None)
    prompts = [chat.prompt_ids(tokenizer, problem.prompt) for problem in suite.problems]
    sampled = measuring.samples(policy, prompts, count, suite.sampling_settings[""], tokenizer, suite.seed)
    for i, texts in enumerate(measuring.texts_of(tokenizer, sampled)):
        replies = {name: answers[i]["reply"] for name, (_, answers) in found.items()}
        assert replies["sft"] == texts[0] and len(replies["long"]) == max(map(len, texts[:4]))
        assert texts.count(replies["vote"]) == max(map(texts.count, texts))
    assert {name: "greedy_accuracy" in metrics for name, (metrics, _) in found.items()} == {
        "sft": True, "long": False, "vote": False
    }  # fmt: skip


def test_a_question_is_looked_for_alone_and_a_short_one_with_its_answer():
    long = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two three four five six 7 8"}]
    assert measuring.sought(tasks.Problem(long, "9")) == "one two three four five six 7 8"
    assert measuring.sought(tasks.Problem([{"role": "user", "content": "1+1"}], "2")) == "1+1\n2"
    assert measuring.sought(tasks.Problem([{"role": "user", "content": "Write."}], None)) == "Write."


def test_the_smoke_run_has_every_reply_with_its_verdict(smoke):
    metrics, rows = read_json(smoke / "smoke/evaluate/metrics.json"), read_lines(smoke / "smoke/evaluate/tasks.jsonl")
    assert metrics["tasks"]["letters"]["problems"] == len(rows) == 8
    held_out = {row["key"] for row in reading.load(compose(["data=letters"]).data.replies, "test").rows}
    assert {row["prompt"][0]["content"] for row in rows} <= held_out
    for name in ("base", "sft", "dpo", "ppo"):
        for way in ("", "greedy_"):
            right = [row[name][f"{way}reply"].split() == row["answer"].split() for row in rows]
            assert right == [row[name][f"{way}right"] for row in rows]
            assert metrics["models"][name]["tasks"]["letters"][f"{way}accuracy"] == sum(right) / 8
    assert all("accuracy" in metrics["models"][name]["tasks"]["letters"] for name in ("best_of_4", "ppo_majority_4"))
    assert all(sum(counts.values()) == 8 for counts in metrics["contamination"]["tasks.letters"].values())


def test_the_report_has_a_row_for_each_model_and_a_column_for_each_way(smoke):
    evaluate = read_json(smoke / "smoke/evaluate/metrics.json")
    heading, *rows = task_rows(evaluate, ["human", "base", "sft", "dpo", "ppo"])
    assert heading == ("model", "letters (n = 8)", "letters, greedy (n = 8)")
    assert [row[0] for row in rows] == ["base", "sft", "dpo", "ppo"] and all(row[1].endswith("%]") for row in rows)
    heading, majority, ppo = task_rows(evaluate, ["ppo_majority_4", "ppo"])
    assert heading[2] == "letters, greedy (n = 8)" and majority[2] == "–" != ppo[2]
    assert task_rows({"models": {"sft": {"tasks": {}}}, "tasks": {}}, ["sft"]) == []
    assert "letters, greedy (n = 8)" in (smoke / "smoke/report.html").read_text()


GSM8K = DATA / "gsm8k/test.jsonl.gz"


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not here")
def test_gsm8k_has_an_answer_to_every_problem(monkeypatch):
    monkeypatch.setenv("THREEFOLD_DATA", str(DATA))
    config = compose(["tasks=gsm8k"])
    problems, unusable = tasks.load("evaluate.tasks.gsm8k", config.evaluate.tasks.gsm8k)
    assert len(problems) >= 400 and not unusable
    replies = [problem.answer.rpartition("####")[2] for problem in problems]
    assert all(verdict["right"] for verdict in tasks.verdicts("numeric", problems, replies))
    wrong = [f"#### {reply}1" for reply in replies]
    assert not any(verdict["right"] for verdict in tasks.verdicts("numeric", problems, wrong))
