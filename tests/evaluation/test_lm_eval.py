"""The extra `lm-eval`: the harness reads a run's model folder, offline, and says to the model what we say."""

import json

import pytest
import torch
from helpers import tiny_policy, tiny_tokenizer, write_model

from threefold.models import chat

lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")

MESSAGES = [{"role": "user", "content": "what do you like to do when it rains?"}]
TASK = """
task: threefold
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {file}.cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|end|>"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The harness's view of a model folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(write_model(tiny_policy(), tmp_path_factory.mktemp("model"))), device="cpu")


def test_a_chat_has_the_same_tokens_with_one_start_token(model):
    ids = model.tok_encode(model.apply_chat_template(MESSAGES))
    assert ids == chat.prompt_ids(tiny_tokenizer(), MESSAGES) and ids.count(tiny_tokenizer().bos_token_id) == 1


def test_a_task_of_the_harness_finds_the_most_likely_reply(model, tmp_path):
    from lm_eval.tasks import TaskManager

    prompt = torch.tensor([chat.prompt_ids(tiny_tokenizer(), MESSAGES)])
    greedy = tiny_policy().generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.size(1) :]
    said = tiny_tokenizer().decode(greedy, skip_special_tokens=True)
    rows = [{"question": MESSAGES[0]["content"], "answer": answer} for answer in (said, "something else")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(file=file))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["threefold"], task_manager=tasks, apply_chat_template=True, bootstrap_iters=0
    )
    assert found["results"]["threefold"]["exact_match,none"] == 0.5
