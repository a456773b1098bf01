"""Losses: cross-entropy of labels, distillation from a teacher, and the divergence of two models' logits.

A loss takes the model, a batch and the step, and returns a scalar: the weighted mean over target tokens. Logits are computed only
for targets of a weight above 0. Sources: Hinton, Vinyals and Dean 2015 (knowledge distillation), Agarwal et al. 2024 (on-policy
distillation, generalised Jensen-Shannon divergence), Elhoushi et al. 2024 (early exit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel as Model

PICKED = 512  # the number of picked places is a multiple of this


class Batch(NamedTuple):
    """Token ids [B, L] int64 and their weights as targets [B, L] float32."""

    ids: Tensor
    weights: Tensor


class Loss(Protocol):
    """Returns the scalar to minimise."""

    def __call__(self, model: Model, batch: Batch, step: int) -> Tensor: ...


class Picked(NamedTuple):
    """The places of a batch whose target has a weight: flat indices [N], target ids [N], weights [N]."""

    places: Tensor
    targets: Tensor
    weights: Tensor

    def mean(self, losses: Tensor) -> Tensor:
        """Average losses [N] by weight."""
        return (losses * self.weights).sum() / self.weights.sum()


def pick(batch: Batch) -> Picked:
    """Find the weighted targets of a batch. A place is the position before its target.

    The places are padded to a multiple of `PICKED` with places of weight 0: with a new shape in every step, kernel caches and
    the allocator would grow by 20 MB per step.
    """
    weights = batch.weights[:, 1:].reshape(-1)
    places = weights.nonzero().squeeze(1)
    number = len(places)
    places = F.pad(places, (0, -number % PICKED))
    picked = weights[places]
    picked[number:] = 0.0
    return Picked(places, batch.ids[:, 1:].reshape(-1)[places], picked)


def hidden_states(model: Model, ids: Tensor, exit_layer: int | None = None) -> list[Tensor]:
    """Return normed states [B, L, hidden] after the last layer and, if given, after the first `exit_layer` layers."""
    out = model.model(input_ids=ids, use_cache=False, output_hidden_states=exit_layer is not None)
    if exit_layer is None:
        return [out.last_hidden_state]
    return [out.last_hidden_state, model.model.norm(out.hidden_states[exit_layer])]


def logits_at(model: Model, states: Tensor, places: Tensor) -> Tensor:
    """Return float32 logits [N, vocab] of states [B, L, hidden] at flat places, counted without the last position of a row."""
    rows = states[:, :-1].reshape(-1, states.shape[-1])[places]
    return F.linear(rows, model.get_output_embeddings().weight.to(rows.dtype)).float()


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy of the next token, plus that of one early exit: at step i the exit after exit_layers[i mod n] layers."""

    exit_layers: Sequence[int] = ()
    exit_weight: float = 0.3

    def __call__(self, model: Model, batch: Batch, step: int) -> Tensor:
        picked = pick(batch)
        exit_layer = self.exit_layers[step % len(self.exit_layers)] if self.exit_layers else None
        states = hidden_states(model, batch.ids, exit_layer)
        losses = [
            picked.mean(_cross_entropy(logits_at(model, layer_states, picked.places), picked.targets))
            for layer_states in states
        ]
        return losses[0] if len(losses) == 1 else (losses[0] + self.exit_weight * losses[1]) / (1 + self.exit_weight)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(frozen=True)
class DistillationLoss:
    """(1 - hard) T^2 CE(softmax(teacher / T), softmax(student / T)) + hard CE(labels) (Hinton et al. 2015)."""

    teacher: Model
    temperature: float = 2.0
    hard: float = 0.1

    def __call__(self, model: Model, batch: Batch, step: int) -> Tensor:
        picked = pick(batch)
        student = logits_at(model, hidden_states(model, batch.ids)[0], picked.places)
        with torch.no_grad():
            teacher = logits_at(self.teacher, hidden_states(self.teacher, batch.ids)[0], picked.places)
        labels = _cross_entropy(student, picked.targets)
        teacher, student = shared_vocabulary(teacher, student)
        soft = -((teacher / self.temperature).softmax(-1) * (student / self.temperature).log_softmax(-1)).sum(-1)
        return picked.mean((1 - self.hard) * self.temperature**2 * soft + self.hard * labels)


def shared_vocabulary(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Cut logits [N, vocab] to the narrower vocabulary: models with one tokenizer may pad it to different widths."""
    width = min(teacher.shape[-1], student.shape[-1])
    return teacher[:, :width], student[:, :width]


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence [N] of logits [N, vocab], in nats.

    P is the teacher, Q the student. beta = 0: the forward KL(P || Q). beta = 1: the reverse KL(Q || P). Between:
    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q.
    """
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    if beta in (0.0, 1.0):
        first, second = (p, q) if beta == 0.0 else (q, p)
        return (first.exp() * (first - second)).sum(-1)
    log_beta = torch.tensor(beta, device=p.device).log()
    log_rest = torch.tensor(1 - beta, device=p.device).log()
    mixed = torch.logaddexp(p + log_beta, q + log_rest)
    return beta * (p.exp() * (p - mixed)).sum(-1) + (1 - beta) * (q.exp() * (q - mixed)).sum(-1)
