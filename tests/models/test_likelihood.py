"""Log-probabilities, scores and bits per byte against one unpadded row at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import plain_logprobs, plain_score, random_ids, tiny_policy, tiny_reward_model, tiny_tokenizer

from threefold.models import likelihood
from threefold.ppo import rollouts

PAD = 0
PROMPTS, REPLIES = random_ids([3, 11, 1, 6, 20], seed=1), random_ids([5, 1, 9, 2, 4], seed=2)


# GPT-2 has learnt absolute positions: padding that shifts them shows there, and not with Qwen3's rotary ones
@pytest.fixture(params=["qwen3", "gpt2"], scope="module")
def model_type(request) -> str:
    return request.param


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_reply_logprobs_do_not_depend_on_the_batch(model_type, batch_size):
    policy = tiny_policy(model_type)
    pairs = list(zip(PROMPTS, REPLIES, strict=True))
    expected = [plain_logprobs(policy, prompt, reply).sum().item() for prompt, reply in pairs]
    assert likelihood.replies_logprobs(policy, pairs, PAD, batch_size).tolist() == pytest.approx(expected, abs=1e-3)
    backwards = likelihood.replies_logprobs(policy, pairs[::-1], PAD, batch_size).tolist()
    assert backwards == pytest.approx(expected[::-1], abs=1e-3)


def test_padding_on_either_side_changes_no_reply_logit(model_type):
    policy = tiny_policy(model_type)
    pad = tiny_tokenizer().pad_token_id
    prompt, prompt_mask = likelihood.left_padded([*PROMPTS, list(range(7, 37))], pad, "cpu")
    reply, mask = likelihood.right_padded([*REPLIES, [8]], pad, "cpu", length=15)
    with torch.no_grad():
        logits = likelihood.reply_logits(policy, prompt, prompt_mask, reply, mask)
        for row, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
            alone = policy(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
            torch.testing.assert_close(logits[row, : len(r)], alone, atol=1e-4, rtol=1e-4)
    assert logits.shape == (6, 15, len(tiny_tokenizer()))


def test_log_probabilities_are_taken_at_the_temperature():
    logits, ids = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = likelihood.log_probabilities(logits, ids, 0.7)
    for row in range(2):
        for t in range(3):
            weights = [math.exp(x / 0.7) for x in logits[row, t].tolist()]
            assert found[row, t].item() == pytest.approx(math.log(weights[ids[row, t]] / sum(weights)), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_scores_pool_at_the_last_token_whatever_the_batch(model_type, batch_size):
    reward_model = tiny_reward_model(model_type)
    sequences = [p + r for p, r in zip(PROMPTS, REPLIES, strict=True)]
    expected = [plain_score(reward_model, sequence) for sequence in sequences]
    assert likelihood.scores(reward_model, sequences, PAD, batch_size) == pytest.approx(expected, abs=1e-4)
    assert likelihood.scores(reward_model, sequences[::-1], PAD, batch_size) == pytest.approx(expected[::-1], abs=1e-4)


def test_score_does_not_depend_on_more_padding(model_type):
    reward_model = tiny_reward_model(model_type)
    expected = [plain_score(reward_model, sequence) for sequence in PROMPTS]
    ids, mask = likelihood.right_padded(PROMPTS, tiny_tokenizer().pad_token_id, "cpu", length=40)
    with torch.no_grad():
        found = reward_model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_critics_values_of_a_reply_are_scores_of_its_beginnings(model_type):
    critic = tiny_reward_model(model_type)
    prompt, prompt_mask = likelihood.left_padded(PROMPTS, PAD, "cpu")
    reply, mask = likelihood.right_padded(REPLIES, PAD, "cpu")
    padded = SimpleNamespace(prompt=prompt, prompt_mask=prompt_mask, reply=reply, mask=mask)
    with torch.no_grad():
        values = rollouts.reply_values(critic, rollouts.token_states(critic, padded)).tolist()
    beginnings = [p + r[:t] for p, r in zip(PROMPTS, REPLIES, strict=True) for t in range(len(r))]
    assert values == pytest.approx([(plain_score(critic, ids) - 0.3) / 1.7 for ids in beginnings], abs=1e-4)


@torch.no_grad()
def one_token_at_a_time(model: torch.nn.Module, ids: list[int], context: int) -> float:
    """Each token predicted from the window that starts on a multiple of half a context, one forward pass each."""
    half, total = context // 2, 0.0
    for i in range(1, len(ids)):
        start = 0 if i < context else (i // half - 1) * half
        logits = model(input_ids=torch.tensor([ids[start:i]])).logits[0, -1]
        total -= torch.log_softmax(logits, -1)[ids[i]].item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_texts_are_measured_in_overlapping_windows(model_type, batch_size):
    policy = tiny_policy(model_type)
    texts = random_ids([1, 2, 7, 8, 9, 12, 13, 16, 17, 37], seed=3)
    expected = sum(one_token_at_a_time(policy, ids, 8) for ids in texts)
    assert likelihood.texts_nats(policy, texts, 8, batch_size) == pytest.approx(expected, abs=1e-2, rel=1e-6)


def test_a_text_that_fits_is_measured_in_one_pass():
    policy = tiny_policy()
    for length in (2, 15, 16):
        ids = random_ids([length], seed=4)[0]
        expected = -plain_logprobs(policy, ids[:1], ids[1:]).sum().item()
        assert likelihood.texts_nats(policy, [ids], 16) == pytest.approx(expected, abs=1e-3)


class Uniform(torch.nn.Module):
    """Gives each of 4 tokens probability 1/4."""

    device = "cpu"

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))


@pytest.mark.parametrize("context", [2, 8, 10, 9])
def test_every_token_after_the_first_counts_once(context):
    for length in range(1, 60):
        nats = likelihood.texts_nats(Uniform(), [[1] * length, [2] * 3], context)
        assert nats == pytest.approx((length - 1 + 2) * math.log(4), rel=1e-5), length


def test_bits_per_byte_counts_bytes_not_characters():
    assert likelihood.bits_per_byte(10 * math.log(2), ["abc", "é雨"]) == pytest.approx(10 / (3 + 2 + 3))
