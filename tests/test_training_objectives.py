"""The training objectives, beside hand computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_problem import CLASSES, FEATURES, blobs, never, perturb, run, same

from mohs.attacks import FGSM, PGD
from mohs.data import Dataset
from mohs.defenses.training import Adam, Context, Mixture, Natural, Saddle
from mohs.errors import UsageError
from mohs.threat import Threat


def by_hand(net: nn.Linear, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(J(x), J(x'), x') of a linear net, from the formulas in numpy."""
    w, b = net.weight.detach().double().numpy(), net.bias.detach().double().numpy()
    labels = np.eye(len(b))[y.numpy()]

    def losses(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = inputs @ w.T + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return -np.log((p * labels).sum(1)), p

    clean = x.double().numpy()
    j, p = losses(clean)
    moved = np.clip(clean + eps * np.sign((p - labels) @ w), 0, 1)
    bent, _ = losses(moved)
    return torch.tensor(j.mean()), torch.tensor(bent.mean()), torch.tensor(moved)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_mixture_is_the_papers_formula(alpha: float) -> None:
    x, y = blobs(20)
    net, eps = nn.Linear(FEATURES, CLASSES), 0.07
    clean, bent, moved = by_hand(net, x, y, eps)

    def fgsm(attack: Any, x: Tensor, y: Tensor) -> Tensor:
        return perturb(attack, net, x, y, "linf:0.07", eps=torch.full((len(x),), eps), seed=0, batch=32)

    loss = Mixture(FGSM(), alpha).loss(net, x, y, Context(fgsm, eps, 0.0))
    assert torch.allclose(loss.double(), alpha * clean + (1 - alpha) * bent, atol=1e-6)
    # no gradient through the attack: the same as with x' as data
    loss.backward()
    expected = alpha * F.cross_entropy(net(x), y) + (1 - alpha) * F.cross_entropy(net(moved.float()), y)
    (gradient,) = torch.autograd.grad(expected, net.weight)
    assert torch.allclose(net.weight.grad, gradient, atol=1e-6)


def test_mixture_with_alpha_one_is_natural_training_bit_for_bit(tmp_path: Path) -> None:
    mixture = run(tmp_path, Mixture(FGSM(), alpha=1.0), how=never, threat="linf:0.1", out="a")
    natural = run(tmp_path, Natural(), how=never, threat="linf:0.1", out="b")
    half = run(tmp_path, Mixture(FGSM(), alpha=0.5), threat="linf:0.1", out="c")
    assert same(mixture.model, natural.model)
    assert not same(half.model, natural.model)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_mixture_refuses_other_weights(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        Mixture(FGSM(), alpha)


def test_saddle_is_the_loss_at_the_adversarial_points_only() -> None:
    x, y = blobs(12)
    net = nn.Linear(FEATURES, CLASSES)
    loss = Saddle(FGSM()).loss(net, x, y, Context(lambda attack, x, y: x + 5, 0.1, 0.0))
    assert torch.equal(loss, F.cross_entropy(net(x + 5), y))


def test_the_inner_maximisation_spends_its_whole_budget() -> None:
    from mohs.evaluation.training import perturb as used

    class Counting(nn.Module):
        rows = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.rows += len(x)
            return -10 * x[:, :CLASSES]  # wrong from the start: a stop at the first success would end at once

    x, y = blobs(16)
    out = used(PGD(steps=7), Counting(), x, y, Threat.parse("linf:0.05"), eps=torch.full((16,), 0.05), seed=0, batch=16)
    assert Counting.rows == 16 * (7 + 1)
    assert float((out - x).abs().max()) <= 0.05 + 1e-6


def test_natural_trains_single_logit_nets(tmp_path: Path) -> None:
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    data = Dataset(x, (x[:, 0] > 0.5).long())
    net = nn.Linear(4, 1)
    nn.init.zeros_(net.weight)
    trained = run(tmp_path, model=net, data=data, epochs=30, holdout=0, optimiser=Adam(lr=0.2))
    assert float(((trained.model(x).squeeze(1) > 0) == data.y.bool()).float().mean()) > 0.95
