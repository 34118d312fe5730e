"""Before the first stage each reward function scores two rows of the data, and PPO's answers are held to its check."""

import importlib
import json
import subprocess
import sys

import pytest
from data_helpers import lines
from helpers import composed
from omegaconf import OmegaConf

from threefold import chain
from threefold.chain import checks
from threefold.errors import UserError

RECORDING = """
seen = []
def f(prompts, completions, **columns):
    seen.append((prompts, completions, columns))
    return {value}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a module beside the user; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(value: str = "[0.0] * len(completions)") -> str:
        name = f"recorded_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(RECORDING.format(value=value))
        return name

    return write


NUMBERS = [{"prompt": f"{n} quarters?", "completion": f"{n}/4"} for n in range(1, 60)]


def config(tmp_path, *overrides, rows=NUMBERS, **rewards):
    """The smoke configuration on `rows` with reward functions by key, dots written as __, and no argument of theirs."""
    source = {"path": lines(tmp_path / "rows.jsonl", rows), "format": "prompt_completion"}
    options = [*(f"data.replies.{name}={value}" for name, value in source.items()), "data.dialogue.reply_min_chars=1"]
    changed = composed(f"runs={tmp_path / 'runs'}", "tracker=none", *options, *overrides)
    for key, function in rewards.items():
        for name, value in {"function": function, "args": {}, "parts": {}}.items():
            OmegaConf.update(changed, f"{key.replace('__', '.')}.{name}", value, merge=False)
    return changed


def test_a_judge_scores_two_rows_of_its_split_once_for_all_seeds(tmp_path, mine):
    name = mine()
    for seed in (1, 2):
        made = config(tmp_path, f"seed={seed}", evaluate__judge=f"{name}:f")
        checks.check_reward_function(made, "evaluate", "evaluate.judge")
    [(prompts, completions, columns)] = importlib.import_module(name).seen
    [first, second, *_] = checks.reading.prompts(made.data.replies, "test", made.data.dialogue)
    assert prompts == [first.prompt[-1]["content"], second.prompt[-1]["content"]]
    assert completions == [first.reply, second.reply] and columns == {"answer": completions}


def test_ppos_reward_gets_its_columns_and_must_apply(tmp_path, mine):
    name = mine("[None for _ in completions]")
    with pytest.raises(UserError, match=rf"^{name}:f: gives no score \(None\) to row 1, '"):
        checks.check_reward_function(config(tmp_path, ppo__reward=f"{name}:f"), "ppo", "ppo.reward")
    [(_, completions, columns)] = importlib.import_module(name).seen
    assert set(columns) == {"answer", "prompt_ids", "completion_ids"}
    assert columns["completion_ids"] == [list(text.encode()) for text in completions]


@pytest.mark.parametrize("option", ["comparisons.label_by=people", "data.preferences.path=given.jsonl"])
def test_a_judge_that_the_comparisons_do_not_ask_is_not_called(tmp_path, mine, option):
    name = mine()
    checks.check_reward_function(
        config(tmp_path, option, comparisons__judge=f"{name}:f"), "comparisons", "comparisons.judge"
    )
    assert importlib.import_module(name).seen == [] if name in sys.modules else True


@pytest.mark.parametrize("key", ["comparisons.judge", "ppo.reward", "evaluate.judge", "evaluate.second_judge"])
def test_a_function_that_fails_is_refused_before_any_stage(tmp_path, mine, key):
    name = mine("__import__('sys').exit(0)")
    made = config(tmp_path, **{key.replace(".", "__"): f"{name}:f"})
    with pytest.raises(UserError, match=rf"^{name}:f: called sys\.exit\(0\); .*; at row 1, '"):
        chain.check(made, {stage: planned for stage, planned in chain.plan(made).items() if stage == key.split(".")[0]})


@pytest.mark.parametrize("wrong", ["2024-01-02", "3 or 4", "no number"])
def test_ppo_is_not_paid_for_numbers_where_an_answer_is_none(tmp_path, wrong):
    numeric = {"ppo__reward": "rewards.numeric:numeric_match"}
    checks.check_reward_function(config(tmp_path, **numeric), "ppo", "ppo.reward")
    rows = [*NUMBERS, *({"prompt": f"{n}?", "completion": wrong} for n in range(60))]
    with pytest.raises(
        UserError, match=rf"^ppo\.reward: cannot check \d+ of the \d+ answers, the first '{wrong}' \(row"
    ):
        checks.check_reward_function(config(tmp_path / "bad", rows=rows, **numeric), "ppo", "ppo.reward")


def test_the_check_imports_no_torch(tmp_path):
    made = config(tmp_path)
    code = (
        "import json, sys; from omegaconf import OmegaConf; from threefold.chain import checks;"
        "config = OmegaConf.create(json.loads(sys.stdin.read()));"
        "keys = ('comparisons.judge', 'evaluate.judge');"
        "[checks.check_reward_function(config, key.partition('.')[0], key) for key in keys];"
        "assert 'torch' not in sys.modules"
    )
    given = json.dumps(OmegaConf.to_container(made, resolve=True))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
