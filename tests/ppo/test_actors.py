"""PPO's models: what they share, where they start, what is trained of them, and what is saved."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    PROMPTS,
    flat,
    plain_logprobs,
    plain_score,
    tiny_tokenizer,
)
from peft import PeftModel
from ppo_kinds import KINDS, LORA, SHARED, loaded, trained

from threefold.models import chat, loading
from threefold.ppo import actors, safety
from threefold.ppo.advantages import estimate
from threefold.rewards.repetition import repeated_share
from threefold.stages import ppo
from threefold.training import packing


def logprobs(model, temperature=1.0) -> torch.Tensor:
    """Log-probabilities of one reply under an actor, from its trunk and output layer."""
    prompt, reply = PROMPTS[1].ids, PROMPTS[4].ids
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([prompt + reply])).last_hidden_state[0, len(prompt) - 1 : -1]
        return torch.log_softmax(model.get_output_embeddings()(states) / temperature, -1)[range(len(reply)), reply]


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_start_as_the_sft_model_and_the_reference_stays_it(tmp_path, kind, model_type):
    made = loaded(tmp_path, *KINDS[kind], model_type=model_type)
    sft = plain_logprobs(loading.load_policy(tmp_path / "sft"), PROMPTS[1].ids, PROMPTS[4].ids)
    assert torch.equal(logprobs(made.actors.policy), sft) and torch.equal(logprobs(made.actors.reference), sft)
    trained(made)
    assert torch.equal(logprobs(made.actors.reference), sft)
    assert (logprobs(made.actors.policy) - sft).abs().max() > 1e-3


@pytest.mark.parametrize("reward", ["full", "lora"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_critic_starts_from_the_reward_model_which_stays(tmp_path, kind, reward):
    made = loaded(tmp_path, *KINDS[kind], reward=reward)
    model = loading.load_reward_model(tmp_path / "reward")
    scores = [(plain_score(model, p.ids) - model.config.score_mean) / model.config.score_std for p in PROMPTS]

    def rewarded() -> list[float]:
        return made.reward(
            [p.messages for p in PROMPTS], [""] * 12, prompt_ids=[p.ids for p in PROMPTS], completion_ids=[[]] * 12
        )

    assert rewarded() == pytest.approx(scores, abs=1e-4)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    assert rollout.values[:, 0].tolist() == pytest.approx(scores, abs=1e-4)
    trained(made)
    assert rewarded() == pytest.approx(scores, abs=1e-4)
    after = ppo.roll_out(made, PROMPTS, 0).values[:, 0]
    assert (after - rollout.values[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("reward", ["full", "lora"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_composed_reward_with_a_learned_part_pays_ppo(tmp_path, kind, reward):
    options = ["reward@ppo.reward=learned_brief", "ppo.reward.parts.quality.clip=[-0.5,0.5]"]
    made = loaded(tmp_path, *KINDS[kind], *options, "ppo.missing_end_penalty=null", reward=reward)
    rollout, model = ppo.roll_out(made, PROMPTS, 0), loading.load_reward_model(tmp_path / "reward")
    replies = [row[mask.bool()].tolist() for row, mask in zip(rollout.reply, rollout.mask, strict=True)]
    texts = [chat.reply_text(tiny_tokenizer(), ids) for ids in replies]
    raw = np.array([plain_score(model, p.ids + ids) for p, ids in zip(PROMPTS, replies, strict=True)])
    quality = ((raw - model.config.score_mean) / model.config.score_std).clip(-0.5, 0.5)
    brief = np.array([max(0, 1 - abs(len(text) - 60) / 60) for text in texts])
    expected = quality + 0.5 * (brief - brief.mean()) / brief.std() - [repeated_share(text, 3) for text in texts]
    assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-4)
    before = logprobs(made.actors.policy)
    trained(made)
    assert (logprobs(made.actors.policy) - before).abs().max() > 1e-3


def test_one_base_serves_all_four_where_the_reward_model_is_an_adapter(tmp_path):
    used = loaded(tmp_path, *LORA, reward="lora").actors
    all_four = (used.policy, used.reference, used.critic, *used.reward_model.members)
    assert len({id(actor.base) for actor in all_four}) == 1
    names = {actor.adapter for actor in all_four}
    assert names == {"policy", None, "critic", "reward"}


def test_lora_trains_nothing_but_its_adapters(tmp_path):
    made = loaded(tmp_path, *LORA, reward="lora")
    base, before = made.actors.policy.base, {}
    for name, parameter in base.named_parameters():
        before[name] = parameter.detach().clone()
    trained(made)
    changed = {name for name, parameter in base.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".policy." in name or ".critic." in name}


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
@pytest.mark.parametrize("reward", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_trained(tmp_path, kind, reward, model_type):
    made = trained(loaded(tmp_path, *KINDS[kind], reward=reward, model_type=model_type))
    ours, out = logprobs(made.actors.policy), tmp_path / "saved"
    values = ppo.roll_out(made, PROMPTS, 7).values[:, 0].tolist()
    actors.save(made.actors, made.job.inputs, tiny_tokenizer(), out)
    saved = plain_logprobs(loading.load_policy(out), PROMPTS[1].ids, PROMPTS[4].ids)
    torch.testing.assert_close(saved, ours, atol=1e-4, rtol=1e-4)
    critic = loading.load_reward_model(out / "critic")
    scores = [(plain_score(critic, p.ids) - critic.config.score_mean) / critic.config.score_std for p in PROMPTS]
    assert scores == pytest.approx(values, abs=1e-3)
    if kind.startswith("lora"):
        adapted = PeftModel.from_pretrained(loading.load_policy(tmp_path / "sft"), out / "adapter")
        theirs = plain_logprobs(adapted, PROMPTS[1].ids, PROMPTS[4].ids)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_the_micro_batch(tmp_path, kind):
    found = []
    for micro in (12, 5):
        made = loaded(tmp_path / str(micro), *KINDS[kind], f"runtime.micro_batch_size={micro}", "ppo.adam_eps=1.0")
        rollout = ppo.roll_out(made, PROMPTS, 0)
        advantages, returns, _ = estimate(rollout, 0.05, made.config)
        ppo.set_learning_rates(made, 100.0)
        before = {name: flat(getattr(made.actors, name)) for name in ("policy", "critic")}
        metrics = ppo.minibatch_step(made, rollout, advantages, returns, torch.arange(12), 0)
        found.append((metrics, {name: flat(getattr(made.actors, name)) - before[name] for name in before}))
    (metrics, moved), (other, other_moved) = found
    assert other == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    for name in moved:
        assert moved[name].norm() > 0 and (moved[name] - other_moved[name]).norm() < 1e-3 * moved[name].norm()


def test_values_of_a_shared_trunk_are_those_of_the_head_on_the_policys_states(tmp_path):
    made = loaded(tmp_path, *SHARED)
    made.actors.critic.score.weight.data.normal_(std=0.3)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    for row, prompt in enumerate(PROMPTS):
        reply = rollout.reply[row][rollout.mask[row].bool()].tolist()
        with torch.no_grad():
            states = made.actors.policy.base_model(input_ids=torch.tensor([prompt.ids + reply])).last_hidden_state[0]
            values = made.actors.critic.score(states[len(prompt.ids) - 1 : -1])[:, 0]
        torch.testing.assert_close(rollout.values[row, : len(reply)], values, atol=1e-4, rtol=1e-4)


def test_the_value_loss_moves_a_shared_trunk(tmp_path):
    made = loaded(tmp_path, *SHARED)
    made.actors.critic.score.weight.data.normal_(std=0.3)
    rollout = ppo.roll_out(made, PROMPTS, 0)
    returns = torch.full_like(rollout.values, 2.0)
    [(loss, sums)] = ppo.losses(made, rollout, torch.zeros_like(returns), returns)
    chosen = rollout.mask.bool()
    error = (rollout.values[chosen] - 2.0) ** 2 / 2
    assert sums["value_loss"] == pytest.approx(error.sum().item(), rel=1e-3)
    loss.backward()
    assert made.actors.policy.base_model.layers[0].mlp.up_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_follows_the_policy_where_asked_for(tmp_path, kind):
    options = [*KINDS[kind], "ppo.reference_sync_every=2", "ppo.episodes=24", "runtime.checkpoints=1"]
    made = loaded(tmp_path, *options)
    start = logprobs(made.actors.reference)
    ppo.train(made, PROMPTS)
    policy = logprobs(made.actors.policy)
    assert torch.equal(logprobs(made.actors.reference), policy) and not torch.equal(policy, start)
    trained(made)
    assert torch.equal(logprobs(made.actors.reference), policy)


@pytest.mark.parametrize("options", [*KINDS.values(), ["ppo.reference_sync_every=1"], ["ppo.advantage=reinforce++"]])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, options, monkeypatch):
    options = [*options, "ppo.episodes=48", "runtime.checkpoints=3", "ppo.kl_controller=adaptive"]
    options += ["ppo.min_score_std=null", "ppo.min_entropy=null"]
    whole, cut = loaded(tmp_path / "whole", *options), loaded(tmp_path / "cut", *options)
    ppo.train(whole, PROMPTS)
    original = ppo.update
    monkeypatch.setattr(ppo, "update", lambda *given: original(*given) if given[-1] < 2 else interrupt())
    with pytest.raises(KeyboardInterrupt):
        ppo.train(cut, PROMPTS)
    monkeypatch.setattr(ppo, "update", original)
    again = ppo.load(cut.job)
    ppo.train(again, PROMPTS)
    for name, part in ppo.parts(whole).items():
        same(part.state_dict(), ppo.parts(again)[name].state_dict())


def interrupt() -> None:
    raise KeyboardInterrupt


def same(ours, theirs) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


# PPO-ptx


def test_ptx_adds_the_language_model_loss_on_the_next_rows_of_text(tmp_path):
    made = loaded(tmp_path, "ppo.ptx_coef=0.7", "ppo.ptx_batch_size=5", "ppo.ptx_context=8", "ppo.adam_eps=1.0")
    rollout = ppo.roll_out(made, PROMPTS, 0)
    nothing = torch.zeros_like(rollout.values)
    rows = torch.stack([made.text[(3 * 5 + i) % len(made.text)]["input_ids"] for i in range(5)])
    model = loading.load_policy(tmp_path / "sft")
    (0.7 * model(input_ids=rows, labels=rows).loss).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    metrics = ppo.minibatch_step(made, rollout, nothing, nothing, torch.arange(12), 3)
    assert metrics["ptx_loss"] == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_rows_of_text_are_those_of_the_packed_stream(tmp_path):
    made = loaded(tmp_path, "ppo.ptx_coef=0.7", "ppo.ptx_context=16")
    assert isinstance(made.text, packing.PackedRows) and len(made.text) > 1000
    assert made.text[0]["input_ids"][0] == tiny_tokenizer().bos_token_id


# Memory


@pytest.mark.parametrize("reward", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_statement_counts_every_weight_once(tmp_path, kind, reward):
    made = loaded(tmp_path, *KINDS[kind], reward=reward)
    used = made.actors
    found = safety.memory_needed(used, 100, 8, 4)
    whole = []
    for actor in (used.policy, used.reference, used.critic, *used.reward_model.members):
        model = getattr(actor, "base", actor)
        whole += [*model.parameters(), *actor.parameters()]
    distinct = {p.data_ptr(): p.numel() for p in whole}
    outline = actors.load(made.config, made.job.inputs, "meta")
    assert safety.memory_needed(outline, 100, 8, 4) == found  # as it is said before the models are loaded
    assert sum(size for name, size in found.items() if name.endswith("weights")) == 4 * sum(distinct.values())
    trainable = sum(p.numel() for actor in (used.policy, used.critic) for p in actor.parameters())
    assert sum(size for name, size in found.items() if name.endswith("Adam")) == 12 * trainable
    assert (
        found["cache"] == 2 * 4 * 2 * 8 * 100 * 1 * 8
    )  # keys and values of 4 bytes, layers, replies, tokens, heads, width
    assert all(name in safety.memory_line(found, 10**9) for name in found)


def test_lora_on_one_base_takes_less_than_four_models(tmp_path):
    full = safety.memory_needed(loaded(tmp_path / "full").actors, 100, 8, 4)
    one = safety.memory_needed(loaded(tmp_path / "one", *LORA, reward="lora").actors, 100, 8, 4)
    assert sum(one.values()) < sum(full.values())


def test_a_shortage_of_memory_is_said_beforehand():
    needed = {"policy weights": 1000, "cache": 100}
    assert safety.memory_shortage(needed, 1100) is None
    assert "will not fit" in safety.memory_shortage(needed, 1099)
    assert safety.memory_available("cpu") > 10**8
