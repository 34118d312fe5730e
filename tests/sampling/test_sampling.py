"""The sampler: what it records is what it drew from, and what it draws is the softmax at the temperature."""

import copy
from collections import Counter

import pytest
import torch
from helpers import favour, perturb, plain_logprobs, random_ids, tiny_policy, tiny_tokenizer
from omegaconf import OmegaConf
from scipy import stats

from threefold.errors import UserError
from threefold.models import chat, likelihood
from threefold.sampling import decoding, sampler
from threefold.sampling.sampler import StaticDecoder

PROMPTS = random_ids([3, 11, 1, 6, 20, 5, 5, 2, 9, 14, 4, 7], seed=1)
EMPTY: dict = {}
END, PAD = tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id


@pytest.fixture(params=["qwen3", "qwen2", "llama", "mistral", "gpt2"], scope="module")
def policy(request) -> torch.nn.Module:
    model = tiny_policy(request.param)
    perturb(model, 0.05)  # norms and biases of new models are all the same
    return favour(model, END, 1.5)


def settings(**changes):
    usual = {"temperature": 0.7, "max_new_tokens": 12, "batch_size": 5, "static_cache": False}
    return OmegaConf.create(usual | changes)


def drawn(policy, prompts=PROMPTS, seed=0, options=EMPTY, **changes) -> list[sampler.Reply]:
    limits = settings(**changes)
    return sampler.sample(policy, prompts, limits, tiny_tokenizer(), numbers(len(prompts), limits, seed), **options)


def numbers(replies: int, limits, seed: int = 0) -> torch.Tensor:
    return sampler.random_numbers(seed, replies, limits)


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


def test_a_reply_stops_at_any_of_several_end_tokens():
    tokenizer, other = copy.deepcopy(tiny_tokenizer()), tiny_tokenizer().convert_tokens_to_ids("<|system|>")
    tokenizer.init_kwargs[chat.ENDS] = ["<|system|>"]
    model, limits = favour(tiny_policy(), END, 3.0), settings()
    with torch.no_grad():
        model.get_output_embeddings().bias[other] = 3.0
    prompts = PROMPTS * 3
    replies = sampler.sample(model, prompts, limits, tokenizer, numbers(len(prompts), limits))
    assert {END, other} <= {reply.ids[-1] for reply in replies}
    for prompt, reply in zip(prompts, replies, strict=True):
        assert not {END, other} & set(reply.ids[:-1]) and reply.ended == (reply.ids[-1] in (END, other))
        assert reply.logprobs == pytest.approx(plain_logprobs(model, prompt, reply.ids, 0.7).tolist(), abs=1e-4)


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


def test_pairs_of_tokens_are_distributed_as_those_of_generate(policy):
    count, prompt, temperature = 6000, PROMPTS[1], 0.4
    replies = drawn(policy, [prompt] * count, max_new_tokens=2, batch_size=2000, temperature=temperature)
    torch.manual_seed(0)
    rows = torch.tensor([prompt]).expand(count, -1)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature, "max_new_tokens": 2}
    generated = policy.generate(rows, attention_mask=torch.ones_like(rows), pad_token_id=PAD, **options)
    ours = Counter(tuple(reply.ids) for reply in replies)
    theirs = Counter(
        tuple(row[: row.index(END) + 1] if END in row else row) for row in generated[:, len(prompt) :].tolist()
    )
    often = [pair for pair in ours | theirs if ours[pair] + theirs[pair] >= 20]
    assert len(often) > 10
    table = [
        [counts[pair] for pair in often] + [count - sum(counts[pair] for pair in often)] for counts in (ours, theirs)
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_reply_does_not_depend_on_the_batch_that_it_is_sampled_in(policy):
    together, apart = drawn(policy, batch_size=12), drawn(policy, batch_size=1)
    assert [reply.ids for reply in together] == [reply.ids for reply in apart]


def test_a_value_head_gives_the_value_of_the_text_before_each_token(policy):
    torch.manual_seed(3)
    head = torch.nn.Linear(16, 1)
    replies = drawn(policy, options={"value_head": head})
    assert [reply.ids for reply in replies] == [reply.ids for reply in drawn(policy)]
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        with torch.no_grad():
            states = policy.base_model(input_ids=torch.tensor([prompt + reply.ids])).last_hidden_state[0]
            values = head(states[len(prompt) - 1 : -1])[:, 0].tolist()
        assert reply.values == pytest.approx(values, abs=1e-4)


def test_known_architectures_have_the_fused_decoder():
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        options = {"sliding_window": None} if model_type == "mistral" else {}
        assert decoding.fusible(tiny_policy(model_type, **options))
    for other in (tiny_policy("gpt2"), tiny_policy("mistral", sliding_window=8), tiny_policy(hidden_act="gelu")):
        assert not decoding.fusible(other)
        assert not isinstance(sampler.decoder_for(other, settings()), decoding.FusedDecoder)
        with pytest.raises(UserError, match=f"sampling.static_cache=true: not for {other.config.model_type}"):
            sampler.decoder_for(other, settings(static_cache=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_a_static_cache_draws_the_same_replies(model_type, device):
    """On a GPU this is the test of the CUDA graphs."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    policy = tiny_policy(model_type)
    perturb(policy, 0.05)
    policy = favour(policy, END, 3.0).to(device)
    prompts = [*PROMPTS, *random_ids([90, 30, 70], seed=2)]  # rooms of 64 and 128 tokens
    plain, static = (drawn(policy, prompts, batch_size=4, max_new_tokens=20, static_cache=s) for s in (False, True))
    assert len({len(reply.ids) for reply in plain}) > 3
    for one, other in zip(plain, static, strict=True):
        assert one.ids == other.ids and one.ended == other.ended
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_static_batches_shrink_by_halves_and_later_ones_use_their_tensors_again(policy, monkeypatch):
    if not decoding.fusible(policy):
        pytest.skip("has no fused decoder")
    seen, made = [], []
    step, create = StaticDecoder.step, StaticDecoder.__init__
    monkeypatch.setattr(StaticDecoder, "step", lambda self, tokens: seen.append(len(tokens)) or step(self, tokens))
    monkeypatch.setattr(StaticDecoder, "__init__", lambda self, model: made.append(self) or create(self, model))
    drawn(policy, PROMPTS * 2, batch_size=8, static_cache=True, max_new_tokens=40)
    assert {8, 4, 2, 1} >= set(seen) > {8}
    assert set(made[0].frames) == {(rows, 64) for rows in set(seen)}
    assert [made[0].staying(8, alive) for alive in (8, 5, 4, 3, 2, 1)] == [8, 8, 4, 4, 2, 1]
    assert [made[0].staying(5, alive) for alive in (4, 3, 2)] == [5, 3, 2]


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
    def likeliest(logits, temperature, uniforms):
        rows.append(len(logits))
        logprobs, tokens = (logits / temperature).log_softmax(-1).max(-1)
        return tokens, logprobs

    rows = []
    monkeypatch.setattr(sampler, "draw", likeliest)
    alone = [drawn(policy, [prompt])[0] for prompt in PROMPTS]
    rows.clear()
    together = drawn(policy, batch_size=len(PROMPTS))
    assert rows[0] == len(PROMPTS) > rows[-1]
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids and one.ended == other.ended
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
