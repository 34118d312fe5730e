"""People's own reward functions: whatever is wrong with one is a line that names it, and the row where there is one."""

import copy
import logging
import re
import sys

import pytest
from omegaconf import OmegaConf

from threefold import rewards
from threefold.artifacts import digests
from threefold.errors import UserError
from threefold.schema.stages import RewardFunctionConfig

REPLIES = ["a", "b\nb", "c" * 50]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write the module mine_X beside the user, once a test; returns the path of its function f."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> str:
        name = f"mine_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(code)
        return f"{name}:f"

    return write


def config(function, **options):
    return OmegaConf.merge(OmegaConf.structured(RewardFunctionConfig), {"function": function, **options})


def function_giving(value):
    return f"import numpy as np, torch, fractions, decimal\ndef f(prompts, completions, **_):\n    return {value}\n"


def scored(function, replies=REPLIES, **options):
    return rewards.load(config(function, **options))(["q"] * len(replies), replies, answer=["x"] * len(replies))


def refusal(function, replies=REPLIES, **options):
    """What `function` is refused with, one line that begins with its name."""
    with pytest.raises(UserError) as caught:
        scored(function, replies, **options)
    message = str(caught.value)
    assert message.startswith(f"{function}: ") and "\n" not in message and len(message) < 300
    return message.removeprefix(f"{function}: ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("None", "gives None; it must give a list of 3 scores, is a return missing?"),
        ("{'rewards': [1, 2, 3]}", "gives a dict; it must give a list of 3 scores"),
        ("{1: 0, 2: 0, 3: 0}", "gives a dict; it must give a list of 3 scores"),
        ("'123'", "gives a str; it must give a list of 3 scores"),
        ("{1.0, 2.0, 3.0}", "gives a set; it must give a list of 3 scores"),
        ("(1.0 for _ in completions)", "gives a generator; it must give a list of 3 scores"),
        ("1.0", "gives a float; it must give a list of 3 scores"),
        ("torch.zeros(3, 1)", "gives a Tensor of shape (3, 1); it must give a list of 3 scores"),
        ("np.float32(1)", "gives a float32 of shape (); it must give a list of 3 scores"),
        ("[1.0, 2.0]", "gives 2 scores to 3 completions"),
        ("[{'score': 1.0}] * 3", "gives a dict to row 1, 'a'; a score is a number, or None where none applies"),
        ("[1.0, '1.0', 1.0]", r"gives a str to row 2, 'b\nb'; a score is a number, or None where none applies"),
        ("[[1.0], [1.0], [1.0]]", "gives a list to row 1, 'a'; a score is a number, or None where none applies"),
        ("[1, float('nan'), 1]", r"gives nan to row 2, 'b\nb'; a score is finite, or None where none applies"),
        ("[1, 1, -float('inf')]", f"gives -inf to row 3, '{'c' * 39}…'; a score is finite, or None where none applies"),
        ("np.array([1, np.inf, 1])", r"gives inf to row 2, 'b\nb'; a score is finite, or None where none applies"),
        ("[1e39, 1, 1]", "gives 1e+39 to row 1, 'a'; a score is finite, or None where none applies"),
        ("[10**400, 1, 1]", "gives a number too large for fp32 to row 1, 'a'; a score is finite, or None"),
        ("[1j, 1, 1]", "gives a complex to row 1, 'a'; a score is a number"),
        ("[decimal.Decimal('nan'), 1, 1]", "gives nan to row 1, 'a'; a score is finite, or None where none applies"),
        ("[decimal.Decimal('sNaN'), 1, 1]", "gives nan to row 1, 'a'; a score is finite, or None where none applies"),
        ("[decimal.Decimal('-1e9999'), 1, 1]", "gives -inf to row 1, 'a'; a score is finite, or None"),
    ],
)
def test_what_is_no_list_of_scores_is_refused_with_the_row(mine, value, expected):
    assert refusal(mine(function_giving(value))).startswith(expected)


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        ("(1, 2.5, None)", [1.0, 2.5, None]),
        ("[True, False, True]", [1.0, 0.0, 1.0]),
        ("[np.float32(0.5), np.int64(2), np.bool_(True)]", [0.5, 2.0, 1.0]),
        ("[torch.tensor(0.5), torch.tensor(2), None]", [0.5, 2.0, None]),
        ("[fractions.Fraction(1, 2), decimal.Decimal('0.25'), 10**30]", [0.5, 0.25, 1e30]),
        ("np.array([0.5, 1.0, 2.0], dtype=np.float32)", [0.5, 1.0, 2.0]),
        ("torch.tensor([0.5, 1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)", [0.5, 1.0, 2.0]),
    ],
)
def test_every_kind_of_number_is_taken(mine, value, scores):
    given = scored(mine(function_giving(value)))
    assert given == scores and all(score is None or type(score) is float for score in given)


RAISING = "def f(prompts, completions, **_):\n    return [{} for text in completions]\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("1 / (len(text) - 3)", r"ZeroDivisionError: .* line 2\); at row 2, 'b\\nb'$"),
        (
            "{'a': 0}[text[0]]",
            r"KeyError: 'b' .* line 2\); at row 2, 'b\\nb'; it is given texts, with ",
        ),
        (
            "text[0]['content']",
            r"TypeError: string indices .*; at row 1, 'a'; it is given texts, with ",
        ),
        ("__import__('sys').exit(0)", r"called sys\.exit\(0\); it must raise an error instead; at row 1, 'a'$"),
    ],
)
def test_what_a_function_raises_is_told_with_the_row(mine, body, expected):
    assert re.match(expected, refusal(mine(RAISING.format(body))))


def test_a_function_that_wants_texts_is_told_that_it_is_given_messages(mine):
    message = refusal(mine(RAISING.format("len(text.strip())")), messages=True)
    assert message.endswith("; it is given lists of chat messages, with messages=false texts")


def test_a_function_that_fails_at_no_row_alone_says_how_many_there_were(mine):
    path = mine("def f(prompts, completions, **_):\n    assert len(completions) < 2, 'one only'\n    return [0.0]\n")
    assert "AssertionError: one only" in refusal(path) and "at 2 rows from row 2" not in refusal(path, ["a", "b"])
    assert refusal(path, ["a", "b"]).endswith("; at 2 rows from row 1, 'a' on")


@pytest.mark.parametrize("messages", [False, True])
def test_a_function_that_changes_its_lists_changes_no_ones_but_its_own(mine, messages):
    spoiling = "[given.__setitem__(slice(None), ['x']) for given in (prompts, completions, answer, prompt_ids[0])]"
    if messages:
        spoiling += "\n    [turn.clear() for turns in kept for turn in turns]"
    body = f"    kept = [*prompts, *completions]\n    count = len(prompts)\n    {spoiling}\n    return [0.0] * count\n"
    path = mine("def f(prompts, completions, answer, prompt_ids, **_):\n" + body)
    told = [[{"role": "user", "content": "q"}] for _ in REPLIES] if messages else ["q"] * 3
    rows = {"prompts": told, "completions": list(REPLIES), "answer": ["x", "y", "z"], "prompt_ids": [[1], [2], [3]]}
    before = copy.deepcopy(rows)
    reward = rewards.load(config(path, messages=messages), ("answer", "prompt_ids"))
    assert reward(**rows) == [0.0, 0.0, 0.0] and rows == before


def test_a_function_that_loses_rows_is_held_to_the_rows_it_was_given(mine):
    path = mine("def f(prompts, completions, **_):\n    completions.pop()\n    return [0.0] * len(completions)\n")
    assert refusal(path) == "gives 2 scores to 3 completions"


@pytest.mark.parametrize("error", ["asyncio.CancelledError", "type('Stop', (BaseException,), {})", "GeneratorExit"])
def test_what_is_raised_beside_the_usual_errors_is_told_as_well(mine, error):
    path = mine(f"import asyncio\nasync def f(prompts, completions, **_):\n    raise {error}('enough')\n")
    assert re.match(r"(CancelledError|Stop|GeneratorExit): .*\(mine_.*, line 3\); at row 1, 'a'$", refusal(path))


def test_an_interrupt_passes(mine):
    with pytest.raises(KeyboardInterrupt):
        scored(mine(RAISING.format("(_ for _ in ()).throw(KeyboardInterrupt)")))


@pytest.mark.parametrize("tracked", [False, True])
def test_the_signal_by_which_slurm_queues_a_job_again_passes(mine, monkeypatch, tracked):
    """W&B puts a function of its own in the place of sys.exit, which is then the last to be called."""
    from submitit.core.job_environment import SignalHandler

    original = sys.exit
    if tracked:
        monkeypatch.setattr(sys, "exit", lambda code=0: original(code))
    handler = SignalHandler.__new__(SignalHandler)
    handler._logger = logging.getLogger("test")
    sys.modules["handler_of_the_test"] = handler
    body = "__import__('sys').modules['handler_of_the_test']._exit()"
    with pytest.raises(SystemExit):
        scored(mine(RAISING.format(body)))
    del sys.modules["handler_of_the_test"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys\nsys.exit(0)\ndef f(prompts, completions, **_): pass\n", "called sys.exit(0)"),
        (
            "import nowhere\ndef f(prompts, completions, **_): pass\n",
            "no such reward function (No module named '",
        ),
        ("x = 1 / 0\ndef f(prompts, completions, **_): pass\n", "ZeroDivisionError: division by zero (mine_"),
        ("def f(strength): raise OSError('disk')\n", "OSError: disk (mine_"),
        ("import sys\ndef f(strength): sys.exit(3)\n", "called sys.exit(3)"),
    ],
)
def test_a_module_or_maker_that_fails_is_told(mine, code, expected):
    path = mine(code)
    with pytest.raises(UserError) as caught:
        rewards.load(config(path, args={"strength": 1} if "strength" in code else {}))
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_a_module_that_is_no_python_is_refused_with_its_line(mine):
    with pytest.raises(UserError, match=r"mine_.*\.py: line 2 is no Python \(invalid syntax\); mend it$"):
        digests.function_parts(mine("x = 1\ndef f(:\n"))
