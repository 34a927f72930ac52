"""Models that are flat, torn, lopsided, or that search for their answer: each check sees its own, and passes what is sound."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from checked_models import SIDE, Wrapped, conv, found, images, linear, norm
from planted_models import Hidden
from torch import Tensor, nn

import mohs


def scaled(first: float, second: float) -> nn.Module:
    """Answers 0 before 1 before the rest everywhere, the first two with slopes of these lengths."""
    layer = nn.Linear(SIDE * SIDE, 5)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0], layer.weight[1, 1] = first, second
        layer.bias.copy_(torch.tensor([50.0, 25.0, 0, 0, 0]))
    return nn.Sequential(nn.Flatten(), layer).eval()


class TestSparseGradient:
    def test_one_pixel_of_sixty_four(self) -> None:
        finding = found(Wrapped(before=lambda x: nn.functional.pad(x[:, :, :2, :2], (0, 6, 0, 6))))["sparse-gradient"]
        assert (finding.severity, finding.saw[:4]) == ("info", "94% ")

    @pytest.mark.parametrize("make", [linear, conv, norm])
    def test_healthy(self, make: Callable[[], nn.Module]) -> None:
        assert found(make())["sparse-gradient"].saw.startswith("0% ")


class TestSteadiness:
    def test_ripples(self) -> None:
        finding = found(Wrapped(after=lambda z: (400 * z).sin() * 10))["steadiness"]
        assert finding.severity == "warn"
        assert "Smooth" in finding.remedy

    @pytest.mark.parametrize("make", [linear, conv, norm])
    def test_healthy(self, make: Callable[[], nn.Module]) -> None:
        assert found(make())["steadiness"].severity == "ok"

    def test_the_noise_is_that_of_the_randomness_check(self) -> None:
        assert "not tested" in found(Wrapped(after=lambda z: z + torch.rand_like(z)))["steadiness"].saw

    def test_by_hand(self) -> None:
        """A lead of 1 + x over logits that stay: noise of at most 0.025 moves it by less than that."""

        def lead(z: Tensor) -> Tensor:
            return torch.cat([z[:, :1] * 0 + 1 + z[:, :1], torch.zeros(len(z), 4)], 1)

        layer = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 5, bias=False))
        with torch.no_grad():
            layer[1].weight.zero_()
            layer[1].weight[0, 0] = 1.0
        model = Wrapped(after=lead, net=layer)
        saw = found(model)["steadiness"].saw
        middle = float(saw.split(" by ")[1].split("%")[0])
        assert 0 < middle < 2.5


class TestImbalance:
    @pytest.mark.parametrize(("first", "second", "word"), [(11.0, 1.0, "highest"), (0.01, 1.0, "second")])
    def test_one_logit_alone_moves(self, first: float, second: float, word: str) -> None:
        finding = found(scaled(first, second))["imbalance"]
        assert finding.severity == "info"
        assert f"the {word} is {max(first / second, second / first):.3g} times" in finding.saw

    def test_a_flat_logit(self) -> None:
        assert "inf times" in found(scaled(0.0, 1.0))["imbalance"].saw

    @pytest.mark.parametrize("make", [linear, conv, norm, lambda: scaled(9.0, 1.0)])
    def test_healthy(self, make: Callable[[], nn.Module]) -> None:
        assert found(make())["imbalance"].severity == "ok"


class TestSaturation:
    @pytest.mark.parametrize(("scale", "severity"), [(1.0, "ok"), (100.0, "info"), (1e5, "warn")])
    def test_the_gradient_of_the_cross_entropy_fades_before_it_is_zero(self, scale: float, severity: str) -> None:
        finding = found(Wrapped(after=lambda z: scale * z))["saturated-logits"]
        assert finding.severity == severity
        assert ("times as long as the margin's" in finding.saw) == (severity == "info")


class Seeker(nn.Module):
    """Answers at the end of a descent from its input."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = linear(), way
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().clone().requires_grad_(True)
            if self.way == "grad":
                (g,) = torch.autograd.grad(self.net(z).logsumexp(1).sum(), z, create_graph=True)
            elif self.way == "func":
                g = torch.func.grad(lambda v: self.net(v).logsumexp(1).sum())(z)
            else:
                z = x.detach().clone().requires_grad_(True)
                self.net(z).logsumexp(1).sum().backward()
                g = z.grad
        return self.net(x - 0.1 * g)


class TestInnerSearch:
    @pytest.mark.parametrize("way", ["grad", "backward", "func"])
    def test_gradients_in_a_forward_pass(self, way: str) -> None:
        model = Seeker(way)
        kept = copy.deepcopy(model.state_dict())
        finding = found(model)["inner-search"]
        assert finding.severity == "warn"
        assert "takes gradients 1 times" in finding.saw
        assert "layer net.1 is passed 2 times" in finding.saw
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())

    def test_a_hidden_model_is_watched_as_well(self) -> None:
        finding = found(Hidden(Seeker("grad")).eval())["inner-search"]
        assert (finding.severity, "passed" in finding.saw) == ("warn", False)

    def test_one_layer_in_two_places(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix, self.act, self.last = nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), linear()

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.act(self.mix(self.act(self.mix(x)))))

        finding = found(Twice().eval())["inner-search"]
        assert (finding.severity, finding.saw) == ("info", "in one forward pass, layer mix is passed 2 times")

    @pytest.mark.parametrize("make", [linear, conv, norm, lambda: mohs.models.load("bundled:fashion-pgd")])
    def test_healthy(self, make: Callable[[], nn.Module]) -> None:
        model = make()
        bundled = any(isinstance(m, nn.Linear) and m.in_features > 300 for m in model.modules())
        x = mohs.data.load("bundled:fashion-mnist", n=64).x if bundled else images()
        assert found(model, x=x)["inner-search"].severity == "ok"
        assert all(not m._forward_hooks for m in model.modules())
