"""Random defenses: what they draw, and that averaged draws break them."""

from __future__ import annotations

import pytest
import torch
from defended_nets import TRANSFORMS, fashion, net
from torch import nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.defenses import declared


def robust(model: nn.Module, n: int, draws: int, steps: int = 20) -> float:
    x, y = fashion(n)
    threat = mohs.Threat(mohs.Linf(0.1), draws=draws)
    return float(
        (~mohs.attack(PGD(steps=steps), model, x, y, threat, guide=declared(model).guide).success).float().mean()
    )


class TestRandomOnes:
    @pytest.mark.parametrize("name", ["noise-input", "random-resize-pad"])
    def test_averaged_draws_break_them(self, name: str) -> None:
        model = TRANSFORMS[name](net())
        assert declared(model).guide is None
        assert robust(model, 16, 10, steps=10) < 0.2

    def test_averaged_draws_and_the_identity_break_total_variation(self) -> None:
        model = defenses.TotalVariation(0.7, rounds=1)(net())
        assert robust(model, 16, 3, steps=10) < 0.2

    def test_pruning_keeps_the_expected_activation(self) -> None:
        hidden = torch.tensor([[4.0, 2.0, 1.0, 0.5, 0.0]])
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).eval()
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(torch.eye(5))
                layer.bias.zero_()
            torch.manual_seed(0)
            draws = defenses.ActivationPruning(0.6)(model)(hidden.expand(20_000, -1))
        p = hidden[0] / hidden.sum()
        survival = 1 - (1 - p) ** 3  # three draws of one of five
        kept = draws[:, :4] != 0
        assert torch.allclose(kept.float().mean(0), survival[:4], atol=0.02)
        for i in range(4):
            assert torch.allclose(draws[kept[:, i], i], hidden[0, i] / survival[i], rtol=1e-4)
        assert torch.allclose(draws.mean(0), hidden[0], atol=0.1)
        assert not draws[:, 4].any()

    def test_pruning_goes_back_as_the_identity(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).eval()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        defended = defenses.ActivationPruning()(model)
        (plain,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
        (guided,) = torch.autograd.grad((declared(defended).guide or defended)(x)[:, 0].sum(), x)
        assert torch.allclose(plain, guided)
        (own,) = torch.autograd.grad(defended(x)[:, 0].sum(), x)
        assert not torch.allclose(plain, own)

    def test_pruning_breaks(self) -> None:
        model = defenses.ActivationPruning()(net())
        x, y = fashion()
        with torch.no_grad():
            assert (model(x).argmax(1) == y).float().mean() > 0.75
        assert robust(model, 16, 3, steps=10) < 0.2
