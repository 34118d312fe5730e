"""The fused training forward against the model's own, in double precision: its loss and every gradient."""

import copy

import pytest
import torch
from helpers import random_ids, tiny_policy

from threefold.execution.device import Device
from threefold.training import forward

CPU = Device("cpu", False, 1)
MODELS = {
    "qwen3, shared keys": ("qwen3", {}),
    "qwen3, a head of keys each, tied": ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def batch():
    """Three rows [3, 12], the last of them padded on the right, and their labels."""
    ids = torch.tensor(random_ids([12, 12, 12]))
    labels = ids.clone()
    labels[1], labels[2, 7:], labels[0, 3] = -100, -100, -100
    return ids, labels


@pytest.mark.parametrize("count", [None, 40])
@pytest.mark.parametrize(("model_type", "options"), MODELS.values(), ids=MODELS)
def test_loss_and_gradients_are_those_of_the_model(model_type, options, count, monkeypatch):
    monkeypatch.setattr(forward, "ROWS", 5)  # logits of some rows at a time, the last of them fewer
    monkeypatch.setattr(forward, "LOGITS", 0)
    model = tiny_policy(model_type, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # otherwise ones, which hide what is done with them
                p.copy_(torch.rand(p.shape) + 0.5)
    reference = copy.deepcopy(model).double()
    ids, labels = batch()
    expected = reference(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=count).loss
    expected.backward()
    assert forward.serves(model, CPU)
    with forward.installed(model):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=count).loss
    (loss * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        error = (p.grad - 3 * q.grad).norm() / q.grad.norm()
        assert error < 1e-5, f"{name}: {error}"


def test_without_gradients_the_loss_is_the_same_and_no_gradient_is_computed(monkeypatch):
    model, (ids, labels), sizes = tiny_policy(), batch(), []
    expected, product = forward.loss(model, ids, labels), forward._product
    monkeypatch.setattr(forward, "_product", lambda x, weight, *rest: sizes.append(1) or product(x, weight, *rest))
    forward.loss(model, ids, labels)
    trained = len(sizes)
    with torch.no_grad():
        assert torch.equal(forward.loss(model, ids, labels), expected)
    assert len(sizes) - trained == trained - 1  # all but that of the output layer's gradient


def test_where_onednn_is_missing_products_are_torchs(monkeypatch):
    model, (ids, labels) = tiny_policy(), batch()
    expected = forward.loss(model, ids, labels)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.testing.assert_close(forward.loss(model, ids, labels), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_logits_of_all_rows_never_exist_at_once(rows, monkeypatch):
    sizes = []
    product = forward._product
    monkeypatch.setattr(forward, "_product", lambda *given: sizes.append(product(*given).shape) or product(*given))
    monkeypatch.setattr(forward, "ROWS", rows)
    monkeypatch.setattr(forward, "LOGITS", 0)
    model, (ids, labels) = tiny_policy(), batch()
    forward.loss(model, ids, labels)
    of_output = [len_ for len_, width in sizes if width == model.config.vocab_size]
    assert max(of_output) == min(rows, ids.numel()) and sum(of_output) == ids.numel()


def test_the_model_is_its_own_again_afterwards():
    model, (ids, labels) = tiny_policy(), batch()
    with forward.installed(model):
        assert model(input_ids=ids, labels=labels).logits is None
    assert model(input_ids=ids).logits.shape == (3, 12, model.config.vocab_size)


def test_what_it_does_not_compute_is_left_to_the_model():
    assert not forward.serves(tiny_policy("gpt2"), CPU)
    assert not forward.serves(tiny_policy("qwen2"), CPU)  # has biases
    assert not forward.serves(tiny_policy("mistral", sliding_window=4), CPU)
    assert not forward.serves(tiny_policy("llama", attention_dropout=0.1), CPU)
    for device in (Device("cuda", False, 1), Device("cpu", True, 1), Device("cpu", False, 1, 2, "fsdp2")):
        assert not forward.serves(tiny_policy(), device)
