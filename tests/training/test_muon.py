"""Muon and AdamW against written-out references and torch's own AdamW."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import tiny_policy

from threefold.training import muon
from threefold.training.muon import MuonAdamW, orthogonalise, split_parameters


def gradients(model: torch.nn.Module, step: int) -> None:
    """Set every gradient to noise that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (100, 30), (8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = 100 * torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    if shape[0] == shape[1]:  # a random square matrix may be nearly singular
        matrices += 300 * torch.eye(shape[0])
    before, after = torch.linalg.svd(matrices), torch.linalg.svd(orthogonalise(matrices))
    assert before.S.max() > 100
    assert after.S.min() > 0.6 and after.S.max() < 1.3


def test_orthogonalising_keeps_the_singular_vectors():
    matrix = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(1))
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = u.T @ orthogonalise(matrix)[0] @ vt.T
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-4, rtol=0)
    assert inner.diagonal().min() > 0.6


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_matrices_orthogonalised_together_equal_each_by_itself(shape):
    sizes = torch.tensor([1e-3, 1, 10, 1e3])[:, None, None]
    matrices = sizes * torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))
    together = orthogonalise(matrices)
    for i in range(4):
        torch.testing.assert_close(together[i], orthogonalise(matrices[i : i + 1])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 12])
def test_steps_on_gram_matrices_are_those_on_the_matrices(rank):
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(3, 12, rank, generator=generator) @ torch.randn(3, rank, 40, generator=generator)
    matrices = low + 1e-4 * torch.randn(low.shape, generator=generator)
    matrices = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    expected = muon._directly(matrices.double())
    torch.testing.assert_close(muon._by_gram_matrix(matrices.double()), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(muon._by_gram_matrix(matrices).double(), expected, atol=1e-4, rtol=0)


def test_adamw_part_is_torchs_adamw():
    model = tiny_policy()
    optimizer = MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False)
    copies = [p.detach().clone().requires_grad_() for p in split_parameters(model)[1]]
    reference = torch.optim.AdamW(copies, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    for step in range(5):
        gradients(model, step)
        others = split_parameters(model)[1]
        for ours, theirs in zip(others, copies, strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        for ours, theirs in zip(others, copies, strict=True):
            torch.testing.assert_close(ours.data, theirs.data, atol=1e-6, rtol=1e-5)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Keller Jordan's iteration on one matrix: X ← aX + b(XXᵀ)X + c(XXᵀ)²X, on the wide side."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_part_is_the_written_out_algorithm():
    model = tiny_policy()
    optimizer = MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False)
    matrices = split_parameters(model)[0]
    assert {rows > columns for rows, columns in (p.shape for p in matrices)} == {True, False}
    expected = [p.detach().double().numpy().copy() for p in matrices]
    momenta = [np.zeros(p.shape) for p in matrices]
    for step in range(4):
        gradients(model, step)
        for i, p in enumerate(matrices):
            gradient = p.grad.double().numpy()
            momenta[i] = 0.95 * momenta[i] + 0.05 * gradient
            update = newton_schulz(0.05 * gradient + 0.95 * momenta[i])
            expected[i] = expected[i] - 0.02 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        optimizer.step()
    for p, wanted in zip(matrices, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), wanted, atol=1e-4)


def test_a_parameter_without_gradient_stays():
    model = tiny_policy()
    optimizer = MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False)
    gradients(model, 0)
    frozen = [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]
    before = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))


def test_learning_rates_scale_their_own_part():
    for group, changed in ((0, "model.layers.0.self_attn.q_proj.weight"), (1, "lm_head.weight")):
        model = tiny_policy()
        before = copy.deepcopy(model.state_dict())
        optimizer = MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False)
        optimizer.param_groups[1 - group]["lr"] = 0.0
        gradients(model, 0)
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed in moved
        assert moved.isdisjoint({"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"} - {changed})


@pytest.mark.parametrize(("model_type", "tied"), [("qwen3", False), ("qwen3", True), ("gpt2", True)])
def test_every_parameter_has_one_optimiser(model_type, tied):
    model = tiny_policy(model_type, tie_word_embeddings=tied)
    matrices, others = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in [*matrices, *others]) == sorted(names.values())
    for p in matrices:
        assert any(part in names[id(p)] for part in ("attn", "mlp")) and p.ndim == 2
    kinds = ("embed", "lm_head", "norm", "ln_", "wte", "wpe", "bias")
    outer = [name for name in names.values() if any(kind in name for kind in kinds)]
    assert sorted(names[id(p)] for p in others) == sorted(outer)


def test_a_saved_optimiser_continues_to_the_same_bits():
    undisturbed, models = tiny_policy(), [tiny_policy()]
    optimizers = [MuonAdamW(m, matrix_lr=0.02, lr=0.01, bf16=False) for m in (undisturbed, models[0])]
    for step in range(3):
        for model, optimizer in zip((undisturbed, models[0]), optimizers, strict=True):
            gradients(model, step)
            optimizer.step()
    saved = io.BytesIO()
    torch.save({"model": models[0].state_dict(), "optimizer": optimizers[1].state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = tiny_policy(seed=9)
    resumed.load_state_dict(state["model"])
    continued = MuonAdamW(resumed, matrix_lr=0.5, lr=0.5, bf16=False)  # rates come from the saved state
    continued.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        for model, optimizer in ((undisturbed, optimizers[0]), (resumed, continued)):
            gradients(model, step)
            optimizer.step()
    for ours, theirs in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# the Trainer loads the optimiser on the CPU and leaves it to load_state_dict to move it; fused AdamW needs its step
# counter beside the parameter (pytorch/pytorch#104767). The device `meta` stands for a GPU here.
def test_loaded_state_lies_beside_its_parameter():
    model = tiny_policy()
    optimizer = MuonAdamW(model, matrix_lr=0.02, lr=0.01, bf16=False)
    gradients(model, 0)
    optimizer.step()
    elsewhere = MuonAdamW(copy.deepcopy(model).to("meta"), matrix_lr=0.02, lr=0.01, bf16=False)
    elsewhere.load_state_dict(optimizer.state_dict())
    devices = {key: value.device.type for state in elsewhere.state.values() for key, value in state.items()}
    assert devices == {"momentum": "meta", "exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta"}
