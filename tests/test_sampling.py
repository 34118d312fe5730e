"""The sampler: what it records is what it drew from, and what it draws is the softmax at the temperature."""

import pytest
import torch
from helpers import favour, plain_logprobs, random_ids, tiny_policy, tiny_tokenizer
from omegaconf import OmegaConf
from scipy import stats

from pipeline import likelihood, sampling

PROMPTS = random_ids([3, 11, 1, 6, 20, 5, 5, 2, 9, 14, 4, 7], seed=1)
END, PAD = tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id


@pytest.fixture(params=["qwen3", "gpt2"], scope="module")
def policy(request) -> torch.nn.Module:
    return favour(tiny_policy(request.param), END, 1.5)


def settings(**changes):
    return OmegaConf.create({"temperature": 0.7, "max_new_tokens": 12, "batch_size": 5} | changes)


def drawn(policy, prompts=PROMPTS, seed=0, **changes) -> list[sampling.Reply]:
    return sampling.sample(policy, prompts, settings(**changes), tiny_tokenizer(), sampling.seeded(seed, "cpu"))


def test_recorded_logprobs_are_those_of_one_unpadded_row(policy):
    prompts = PROMPTS * 3
    replies = drawn(policy, prompts)
    assert len({len(reply.ids) for reply in replies}) > 3  # rows left the batch at different times
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.logprobs == pytest.approx(plain_logprobs(policy, prompt, reply.ids, 0.7).tolist(), abs=1e-4)


def test_recorded_logprobs_are_those_that_ppo_computes(policy):
    replies = drawn(policy, temperature=0.8)
    prompt, prompt_mask = likelihood.left_padded(PROMPTS, PAD, "cpu")
    reply, mask = likelihood.right_padded([r.ids for r in replies], PAD, "cpu")
    with torch.no_grad():
        logits = likelihood.reply_logits(policy, prompt, prompt_mask, reply, mask)
    logprobs = (logits / 0.8).log_softmax(-1).gather(-1, reply[..., None])[..., 0]
    for row, found in enumerate(replies):
        assert found.logprobs == pytest.approx(logprobs[row, : len(found.ids)].tolist(), abs=1e-4)


def test_replies_stop_at_the_end_token_or_the_limit(policy):
    replies = drawn(policy, PROMPTS * 3)
    assert {reply.ended for reply in replies} == {True, False}
    for reply in replies:
        assert len(reply.ids) == len(reply.logprobs) <= 12
        assert END not in reply.ids[:-1]
        assert reply.ended == (reply.ids[-1] == END)
        assert reply.ended or len(reply.ids) == 12


def test_an_end_token_on_the_last_place_counts_as_ended():
    replies = drawn(favour(tiny_policy(), END, 1e4), max_new_tokens=1)
    assert all(reply.ids == [END] and reply.ended for reply in replies)


def test_first_tokens_follow_the_softmax_at_the_temperature(policy):
    count, prompt = 8000, PROMPTS[0]
    replies = drawn(policy, [prompt] * count, max_new_tokens=1, batch_size=2000)
    seen = torch.bincount(torch.tensor([reply.ids[0] for reply in replies]), minlength=len(tiny_tokenizer()))
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert p_value(seen, torch.softmax(logits / 0.7, -1), count) > 1e-3
    assert p_value(seen, torch.softmax(logits, -1), count) < 1e-6  # the test tells temperatures apart


def p_value(seen: torch.Tensor, probabilities: torch.Tensor, count: int) -> float:
    """Chi-square test, cells of fewer than five expected tokens together as one."""
    expected = probabilities.double() * count
    rare = expected < 5
    cells = [(seen[~rare], expected[~rare]), (seen[rare].sum()[None], expected[rare].sum()[None])]
    observed, wanted = (torch.cat(side).double().numpy() for side in zip(*cells, strict=True))
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


def test_seed_decides_the_replies(policy):
    first, again, other = (drawn(policy, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert [reply.ids for reply in first] != [reply.ids for reply in other]


def test_cold_sampling_is_greedy_search(policy):
    replies = drawn(policy, temperature=1e-4)
    assert {reply.ended for reply in replies} == {True, False}
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        row = torch.tensor([prompt])
        greedy = policy.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12)
        assert reply.ids == greedy[0, len(prompt) :].tolist()


def test_rows_that_leave_the_batch_change_no_other_row(policy, monkeypatch):
    def likeliest(logits, temperature, generator):
        rows.append(len(logits))
        logprobs, tokens = (logits / temperature).log_softmax(-1).max(-1)
        return tokens, logprobs

    rows = []
    monkeypatch.setattr(sampling, "draw", likeliest)
    alone = [drawn(policy, [prompt])[0] for prompt in PROMPTS]
    rows.clear()
    together = drawn(policy, batch_size=len(PROMPTS))
    assert rows[0] == len(PROMPTS) > rows[-1]
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids and one.ended == other.ended
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
