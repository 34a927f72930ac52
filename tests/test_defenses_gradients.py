"""Where a defense hides the gradient, and that what it declares brings it back: attacks on a real net, without and with the guide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from defended_nets import CONTROLS, TRANSFORMS, fashion, net
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.defenses import Defense, declared
from mohs.errors import ModelError
from mohs.objectives import plain_cross_entropy

SHATTERED = ["bit-depth", "detach", "logit-rounding"]
NO_GRAPH = ["jpeg", "non-local-means"]
DETERMINISTIC = ["bit-depth", "jpeg", "gaussian-blur", "mean-blur", "median-blur"]


def pick(name: str) -> Defense:
    return (TRANSFORMS | CONTROLS)[name]


def robust(model: nn.Module, guide: nn.Module | None = None, n: int = 32, **how: Any) -> float:
    x, y = fashion()
    attack = PGD(steps=20, **how)
    return float((~mohs.attack(attack, model, x[:n], y[:n], "linf:0.1", guide=guide).success).float().mean())


def clean(model: nn.Module) -> float:
    x, y = fashion()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    z = model(x)
    return torch.autograd.grad((z * torch.linspace(-1, 1, z.shape[1])).sum(), x)[0]


@pytest.mark.parametrize("name", SHATTERED)
def test_shattered_gradients_are_zero(name: str) -> None:
    assert not gradient(pick(name)(net()), fashion()[0][:8]).any()


@pytest.mark.parametrize("name", NO_GRAPH)
def test_what_leaves_torch_has_no_gradient(name: str) -> None:
    x = fashion()[0][:2].clone().requires_grad_()
    assert not pick(name).transform(x).requires_grad
    assert pick(name).prepare(x, guiding=True).requires_grad
    with pytest.raises(ModelError, match="gives no input gradient"):
        robust(pick(name)(net()), n=2)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_transformations_break_with_what_they_declare(name: str) -> None:
    model = pick(name)(net())
    assert clean(model) > 0.8
    assert robust(model, declared(model).guide, 64) < 0.07


@pytest.mark.parametrize("name", ["bit-depth", "detach", "logit-rounding", "gradient-truncation", "gradient-noise"])
def test_a_naive_attack_is_fooled_and_the_honest_one_is_not(name: str) -> None:
    model = pick(name)(net())
    naive = robust(model)
    assert naive > (0.3 if name == "gradient-noise" else 0.75)
    assert robust(model, declared(model).guide) < 0.07


@pytest.mark.parametrize("name", ["gradient-noise", "gradient-truncation", "detach"])
def test_controls_of_the_gradient_change_no_answer_and_add_nothing(name: str) -> None:
    model, x = pick(name)(net()), fashion()[0]
    with torch.no_grad():
        assert torch.equal(model(x), net()(x))
    assert torch.equal(gradient(declared(model).guide or model, x), gradient(net(), x))
    assert not torch.allclose(gradient(model, x), gradient(net(), x), rtol=0.1)
    assert robust(model, declared(model).guide) == robust(net())


class TestControls:
    def test_noise_has_the_size_it_says_and_is_repeated(self) -> None:
        x = fashion()[0][:16]
        model = defenses.GradientNoise(3.0)(net())
        true, seen = gradient(net(), x), gradient(model, x)
        size = (seen - true).flatten(1).square().mean(1).sqrt() / true.flatten(1).square().mean(1).sqrt()
        assert bool(((size - 3).abs() < 0.4).all())
        assert torch.equal(gradient(model, x), seen)
        assert not torch.allclose(gradient(model, x + 1e-3) - seen, torch.zeros_like(seen), atol=0.1)

    def test_truncation_leaves_multiples_of_the_step(self) -> None:
        x = fashion()[0][:8]
        true, seen = gradient(net(), x), gradient(defenses.GradientTruncation(0.5)(net()), x)
        assert torch.equal(seen, torch.sign(true) * torch.floor(true.abs() / 0.5) * 0.5)
        assert bool(seen.any())

    def test_scale_hides_from_a_loss_on_probabilities_only(self) -> None:
        model = defenses.LogitScale(1e4)(net())
        assert declared(model).guide is None
        assert robust(model, objective=plain_cross_entropy) > 0.6
        assert robust(model) < 0.07

    def test_two_softmaxes(self) -> None:
        saturated = nn.Sequential(net(), nn.Flatten())
        model = defenses.DoubleSoftmax()(defenses.LogitScale(1e4)(saturated))
        x = fashion()[0]
        with torch.no_grad():
            assert torch.allclose(model(x).sum(1), torch.ones(len(x)), atol=1e-5)
        assert robust(model) > 0.6
        assert robust(model, declared(model).guide) < 0.07

    def test_rounded_logits_are_those_of_the_model_rounded(self) -> None:
        x = fashion()[0]
        with torch.no_grad():
            assert torch.allclose(defenses.LogitRounding(1)(net())(x), (net()(x) * 10).round() / 10, atol=1e-5)
            assert (defenses.LogitRounding(0)(net())(x) == net()(x).round()).all()


class TestKWinners:
    def test_the_k_largest_of_each_row_are_kept(self) -> None:
        a = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        kept = defenses.KWinners(0.25)(nn.Sequential(nn.ReLU()))(a)
        for row, out in zip(a, kept):
            order = row.flatten().argsort(descending=True)
            assert set(out.flatten().nonzero().flatten().tolist()) == set(order[:12].tolist())
            assert torch.equal(out[out != 0], row[out != 0])

    def test_the_original_keeps_its_relus(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 2))).eval()
        before = str(model)
        defended = defenses.KWinners(0.5)(model)
        assert str(model) == before
        assert "ReLU" not in str(defended)
        assert not any(m.training for m in defended.modules())
        with pytest.raises(ModelError, match=r"replaces nn\.ReLU layers, and this model has none"):
            defenses.KWinners(0.5)(nn.Linear(2, 2))

    def test_going_back_twice_as_many_win(self) -> None:
        a = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
        model = defenses.KWinners(0.1)(nn.ReLU())

        def reached(m: nn.Module) -> list[int]:
            x = a.clone().requires_grad_()
            return (torch.autograd.grad(m(x).sum(), x)[0] != 0).sum(1).tolist()

        assert reached(model) == [4] * 4
        assert reached(declared(model).guide or model) == [8] * 4

    def test_it_adds_little(self) -> None:
        model = defenses.KWinners(0.3)(net())
        assert robust(model, declared(model).guide) < 0.2
