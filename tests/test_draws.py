"""How many draws of a random model are averaged: from the signal and the noise of its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mohs.evaluation._draws import LEAST, MOST, USUAL, draws_needed, signal_to_noise
from mohs.evaluation.checks import Probe
from mohs.threat import Threat

D = 40


class Noisy(nn.Module):
    """A linear model whose weights are drawn anew at each look: the gradient is w + noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(2, D, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.unsqueeze(0) + self.noise * torch.randn(len(x), 2, D)
        return (w @ x.unsqueeze(2)).squeeze(2)


def probe(model: nn.Module) -> Probe:
    x = torch.rand(64, D, generator=torch.Generator().manual_seed(1))
    return Probe(model.eval(), x, torch.zeros(64, dtype=torch.int64), Threat.parse("linf:0.1"))


@pytest.mark.parametrize("ratio", [0.05, 0.3, 2.0, 50.0])
def test_the_ratio_of_known_signal_and_noise(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, size, draws = 200, 100, 8
    g = torch.randn(rows, size, generator=generator)
    noise = torch.randn(draws, rows, size, generator=generator) / math.sqrt(ratio)
    assert signal_to_noise(g + noise) == pytest.approx(ratio, rel=0.15, abs=0.02)
    assert signal_to_noise(1e-30 * (g + noise)) == pytest.approx(signal_to_noise(g + noise), rel=1e-3)


@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
def test_an_average_of_so_many_has_the_cosine(noise: float) -> None:
    torch.manual_seed(0)
    model = Noisy(noise)
    m, ratio = draws_needed(probe(model))
    g = (model.weight[0] - model.weight[1]).detach()
    # of the difference of two rows, each with its noise: variance 2 noise^2 in each of D places
    assert ratio == pytest.approx(float(g.square().sum()) / (2 * noise**2 * D), rel=0.35)
    means = (g + math.sqrt(2) * noise * torch.randn(400, m, D)).mean(1)
    cosine = float(torch.nn.functional.cosine_similarity(means, g.unsqueeze(0)).mean())
    assert 0.72 < cosine < 0.9 or m == LEAST


def test_the_ends() -> None:
    torch.manual_seed(0)
    assert draws_needed(probe(Noisy(1e-4)))[0] == LEAST
    assert draws_needed(probe(Noisy(100.0)))[0] == MOST

    class Cut(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    m, ratio = draws_needed(probe(Cut(1.0)))
    assert m == USUAL
    assert math.isnan(ratio)
