"""Losses against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pitlane.training.losses import (
    PICKED,
    Batch,
    DistillationLoss,
    LabelLoss,
    divergence,
    hidden_states,
    pick,
    shared_vocabulary,
)

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 300, (3, 12), generator=generator)
    weights = torch.tensor([0.0, 1.0, 4.0, 0.5])[torch.randint(0, 4, (3, 12), generator=generator)]
    return Batch(ids, weights)


def spread(model: PreTrainedModel, scale: float = 8.0) -> PreTrainedModel:
    """Give random weights larger embeddings, and so larger logits."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model


def double_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [B, L - 1, vocab] of the model, as float64; the model computes in float32."""
    with torch.no_grad():
        logits: Tensor = model(batch.ids).logits[:, :-1].double()
    return logits


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The weighted mean, computed token by token."""
    log = logits - logits.exp().sum(-1, keepdim=True).log()
    losses = -log.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    weights = batch.weights[:, 1:].double()
    return (losses * weights).sum() / weights.sum()


def test_labels_are_cross_entropy_by_weight(tiny: MakeModel, batch: Batch) -> None:
    model = spread(tiny())
    loss = LabelLoss()(model, batch, 0)
    assert loss.item() == pytest.approx(float(cross_entropy(double_logits(model, batch), batch)), rel=1e-5)
    everywhere = Batch(batch.ids, torch.ones_like(batch.weights))
    reference = F.cross_entropy(double_logits(model, batch).flatten(0, 1), batch.ids[:, 1:].flatten())
    assert LabelLoss()(model, everywhere, 0).item() == pytest.approx(float(reference), rel=1e-5)


def test_targets_are_filled_up_with_places_of_no_weight(batch: Batch) -> None:
    picked = pick(batch)
    number = int((batch.weights[:, 1:] > 0).sum())
    assert len(picked.places) == len(picked.targets) == len(picked.weights) == PICKED > number
    assert picked.weights[:number].tolist() == batch.weights[:, 1:][batch.weights[:, 1:] > 0].tolist()
    assert not picked.weights[number:].any() and picked.mean(torch.ones(PICKED)) == 1.0
    assert len(pick(Batch(batch.ids, torch.zeros_like(batch.weights))).places) == 0


def test_the_weight_of_the_first_token_means_nothing(tiny: MakeModel, batch: Batch) -> None:
    model = tiny()
    heavier = batch.weights.clone()
    heavier[:, 0] = 100.0
    assert LabelLoss()(model, batch, 0) == LabelLoss()(model, Batch(batch.ids, heavier), 0)


def test_exits_take_turns_and_read_their_layer(tiny: MakeModel, batch: Batch) -> None:
    model = spread(tiny(num_layers=4))
    for layer in model.model.layers:  # let the layers change the stream
        layer.mlp.down_proj.weight.data.mul_(20)
    whole = float(cross_entropy(double_logits(model, batch), batch))
    for step, exit_layer in enumerate((1, 3, 1)):
        layers = model.model.layers
        model.model.layers = layers[:exit_layer]
        early = float(cross_entropy(double_logits(model, batch), batch))
        model.model.layers = layers
        loss = LabelLoss(exit_layers=(1, 3), exit_weight=0.3)(model, batch, step)
        assert loss.item() == pytest.approx((whole + 0.3 * early) / 1.3, rel=1e-5)
        assert early != pytest.approx(whole, rel=1e-3)


# ---- Hinton, Vinyals and Dean 2015


@pytest.mark.parametrize(("temperature", "hard"), [(1.0, 0.0), (2.0, 0.1), (4.0, 0.5), (3.0, 1.0)])
def test_distillation_is_the_formula(tiny: MakeModel, batch: Batch, temperature: float, hard: float) -> None:
    student, teacher = spread(tiny(1)), spread(tiny(2, num_layers=3))
    loss = DistillationLoss(teacher, temperature, hard)(student, batch, 0)
    student_logits, teacher_logits = double_logits(student, batch), double_logits(teacher, batch)
    p = (teacher_logits / temperature).exp() / (teacher_logits / temperature).exp().sum(-1, keepdim=True)
    log_q = student_logits / temperature - (student_logits / temperature).exp().sum(-1, keepdim=True).log()
    weights = batch.weights[:, 1:].double()
    soft = (-(p * log_q).sum(-1) * weights).sum() / weights.sum()
    expected = (1 - hard) * temperature**2 * soft + hard * cross_entropy(student_logits, batch)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


def test_distillation_does_not_train_the_teacher(tiny: MakeModel, batch: Batch) -> None:
    student, teacher = tiny(1), tiny(2)
    DistillationLoss(teacher)(student, batch, 0).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_the_factor_t_squared_keeps_the_size_of_gradients(tiny: MakeModel, batch: Batch) -> None:
    """At any high T, the gradient by a logit is (z - v) / N (equation 4 of the paper, for logits of mean zero)."""
    student, teacher = tiny(1), tiny(2)

    def gradient(temperature: float) -> Tensor:
        loss = DistillationLoss(teacher, temperature, hard=0.0)(student, batch, 0)
        return torch.autograd.grad(loss, student.get_input_embeddings().weight)[0]

    at_20, at_80 = gradient(20.0), gradient(80.0)
    assert float(at_20.norm()) == pytest.approx(float(at_80.norm()), rel=0.02)
    assert F.cosine_similarity(at_20.flatten(), at_80.flatten(), dim=0) > 0.999


def test_a_padded_vocabulary_is_cut(tiny: MakeModel, batch: Batch) -> None:
    wide, narrow = torch.randn(5, 12), torch.randn(5, 10)
    assert [logits.shape[-1] for logits in shared_vocabulary(wide, narrow)] == [10, 10]
    teacher, student = tiny(2), tiny(1)
    reference = DistillationLoss(teacher, hard=0.0)(student, batch, 0)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 64)
    assert DistillationLoss(teacher, hard=0.0)(student, batch, 0) == reference


# ---- generalised Jensen-Shannon divergence (Agarwal et al. 2024)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(3 * torch.randn(6, 40, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_of_equals_is_zero(pair: tuple[Tensor, Tensor], beta: float) -> None:
    assert divergence(pair[0], pair[0] + 2.0, beta).abs().max() < 1e-6
    assert (divergence(*pair, beta) > 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_divergence_is_the_formula(pair: tuple[Tensor, Tensor], beta: float) -> None:
    p, q = pair[0].softmax(-1), pair[1].softmax(-1)
    mixed = beta * p + (1 - beta) * q
    between = beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, between)
    assert torch.allclose(divergence(*pair, beta), expected, rtol=1e-6)
    assert torch.allclose(divergence(pair[0].float(), pair[1].float(), beta).double(), expected, rtol=1e-4)


def test_divergence_nears_both_directions_of_kl(pair: tuple[Tensor, Tensor]) -> None:
    """JSD / beta tends to KL(P || Q) as beta goes to 0; JSD / (1 - beta) tends to KL(Q || P) as beta goes to 1."""
    assert torch.allclose(divergence(*pair, 1e-6) / 1e-6, divergence(*pair, 0.0), rtol=1e-2)
    assert torch.allclose(divergence(*pair, 1 - 1e-6) / 1e-6, divergence(*pair, 1.0), rtol=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_gradients_of_the_divergence_are_those_of_finite_differences(pair: tuple[Tensor, Tensor], beta: float) -> None:
    student = pair[1][:2, :8].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda logits: divergence(pair[0][:2, :8], logits, beta), student)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_divergence_of_sharp_distributions_is_finite(beta: float) -> None:
    sharp = torch.tensor([[200.0, 0.0, -200.0]])
    other = torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    loss = divergence(sharp, other, beta).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, other)[0].isfinite().all()


def test_hidden_states_without_an_exit_are_the_last(tiny: MakeModel, batch: Batch) -> None:
    model = tiny()
    (last,) = hidden_states(model, batch.ids)
    both = hidden_states(model, batch.ids, 1)
    assert len(both) == 2 and torch.equal(both[0], last)
