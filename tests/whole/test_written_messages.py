"""Messages that an export wrote as text, to CSV or within JSON, are read as messages or refused, never trained on."""

import csv
import json
from collections import Counter

import pytest
from data_helpers import everything, said, source

from threefold.columns import UnusableRowError
from threefold.data.formats import FORMATS

Q, A, B = said("user", "it's a\n{x}?"), said("assistant", 'a "b"\n{c}'), said("assistant", "b")


def by_pandas(messages):
    """As `DataFrame.to_csv` writes a column of arrays of objects: Python's forms, a line end between elements."""
    return "[" + "\n ".join(map(repr, messages)) + "]"


WAYS = {"json": json.dumps, "indented": lambda m: json.dumps(m, indent=1), "python": str, "pandas": by_pandas}
WAYS |= {"dumped twice": lambda m: json.dumps(json.dumps(m)), "tuple": lambda m: str(tuple(m))}
WAYS |= {"numpy": lambda m: f"array({m}, dtype=object)", "lines": lambda m: f"array({by_pandas(m)})"}
ROWS = {
    "messages": {"messages": [Q, A]},
    "prompt_completion": {"prompt": [Q], "completion": [A]},
    "preference": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "whole dialogues": {"chosen": [Q, A], "rejected": [Q, B]},
    "prompt within": {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
    "unpaired": {"prompt": [Q], "completion": [A], "label": True},
    "arena": {"conversation_a": [Q, A], "conversation_b": [Q, B], "winner": "model_a"},
    "responses": {"prompt": [Q], "response_a": [A], "response_b": [B], "winner": "model_b"},
    "binarized": {"chosen": [Q, A], "rejected": [Q, B], "score_chosen": 2, "score_rejected": 1},
}
FORMAT = {
    "whole dialogues": "preference", "prompt within": "preference", "responses": "arena", "binarized": "ultrafeedback",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ROWS)
def test_messages_written_as_text_give_the_row_that_messages_give(case, way, tmp_path):
    kind = FORMAT.get(case, case)
    wanted = FORMATS[kind](ROWS[case], Counter())
    written = {name: WAYS[way](value) if isinstance(value, list) else value for name, value in ROWS[case].items()}
    assert FORMATS[kind](written, Counter()) == wanted
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, written)
        writer.writeheader()
        writer.writerow(written)
    assert everything(source(tmp_path / "rows.csv", kind)) == wanted


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{'role': 'user', 'content': 'q'} {'role': 'assistant', 'content': 'a'}]", "written as text, which cannot"),
        ("[{'role': 'assistant', 'content': 'it's'}]", "written as text, which cannot be read"),
        ('[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]', "is not a list of messages with role and"),
        ('[{"role": "bot", "content": "a"}]', "has a role other than system, user, assistant"),
        (json.dumps([Q, {"role": "assistant", "tool_calls": []}, A]), "is not a list of messages with role and"),
        (json.dumps({"messages": [Q, A]}), "written as text, which cannot be read"),
        (json.dumps([[Q, A]]), "written as text, which cannot be read"),
        (str({"messages": [Q, A]}), "written as text, which cannot be read"),
        (f"{[Q, A]}"[:-1] + ", ...]", "written as text, which cannot be read"),
        ("\n".join(map(json.dumps, [Q, A | {"name": None}])), "written as text, which cannot be read"),
        (json.dumps(json.dumps([Q, A], indent=1))[:-9], "written as text, which cannot be read"),
        (json.dumps([Q, A])[:-9], "written as text, which cannot be read"),
        ('[{"role": "user", "content": "q"}]', "does not end with an assistant's reply"),
    ],
)
def test_messages_as_text_that_cannot_be_read_are_refused(text, reason):
    with pytest.raises(UnusableRowError, match=f"chosen .*{reason}"):
        FORMATS["preference"]({"prompt": "q", "chosen": text, "rejected": "b"}, Counter())


@pytest.mark.parametrize(
    ("kind", "column"),
    [("pandalm", "instruction"), ("pandalm", "response1"), ("finegrained_rlhf", "prediction 2"), ("ultrafeedback", "")],
)
def test_columns_that_take_no_messages_refuse_those_written_as_text(kind, column):
    completions = [{"response": text, "overall_score": score} for score, text in enumerate(["a", json.dumps([A])])]
    raw = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "question": "q", "preference": [1]}
    raw |= {"prediction 1": "a", "prediction 2": "b"}
    FORMATS[kind](raw | {"completions": completions[:1] * 2}, Counter())
    with pytest.raises(UnusableRowError, match=f"{column or 'response'} is not text"):
        FORMATS[kind](raw | {"completions": completions} | ({column: json.dumps([Q, A])} if column else {}), Counter())


@pytest.mark.parametrize(
    "text",
    ["[1] see below", '[{"name": "x"}]', '{"role": "admin", "content": "x"}', '[{"role": "admin"}]', "{x}", "[{} {}]",
     'Mend this: [{"role": "user", "content": "q"}]', '{"from": "a", "to": "b"}',
     '[{"role": "user", "content": "q"}] is what?', '[INST] {"role": "user", "content": "q"}',
     '{"role": 1, "x": [{"content": 2}]}'],
)  # fmt: skip
def test_text_with_brackets_or_json_stays_text(text):
    (row,) = FORMATS["prompt_completion"]({"prompt": text, "completion": text}, Counter())
    assert [m["content"] for m in row["messages"]] == [text, text]
