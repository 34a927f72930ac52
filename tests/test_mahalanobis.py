"""The Mahalanobis detector: the distance against closed forms, the step, the fit, and how it falls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs.data import load
from mohs.defenses import LID, BitDepth, Mahalanobis, declared
from mohs.defenses.mahalanobis import Gaussians, MahalanobisState, averaged
from mohs.errors import DataError, ModelError, UsageError

Fashion = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]


def cloud(seed: int, n: int = 60, d: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    means = 3 * torch.randn(classes, d, dtype=torch.float64, generator=generator)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=generator)
    return means[y] + torch.randn(n, d, dtype=torch.float64, generator=generator) @ mixing, y


def by_definition(features: Tensor, y: Tensor, points: Tensor) -> Tensor:
    f, p = features.double().numpy(), points.double().numpy()
    means = {k: f[y.numpy() == k].mean(0) for k in set(y.tolist())}
    around = np.stack([row - means[int(k)] for row, k in zip(f, y)])
    inverse = np.linalg.pinv(around.T @ around / len(f), rcond=1e-9, hermitian=True)
    return torch.tensor([min((q - m) @ inverse @ (q - m) for m in means.values()) for q in p])


class TestDistance:
    def test_by_hand(self) -> None:
        # classes at 0 and 10, each one left and right of its mean: covariance 1
        near = Gaussians(torch.tensor([[-1.0], [1.0], [9.0], [11.0]]), torch.tensor([0, 0, 7, 7]))
        assert near(torch.tensor([[0.0], [3.0], [8.0], [12.0]])).tolist() == pytest.approx([0, 9, 4, 4], abs=1e-5)

    @given(st.integers(0, 10**6))
    @settings(max_examples=20, deadline=None)
    def test_by_definition(self, seed: int) -> None:
        features, y = cloud(seed)
        points = cloud(seed + 1)[0]
        assert torch.allclose(Gaussians(features, y)(points), by_definition(features, y, points), rtol=1e-6)

    @given(st.integers(0, 10**6))
    @settings(max_examples=20, deadline=None)
    def test_no_linear_map_changes_it(self, seed: int) -> None:
        features, y = cloud(seed)
        generator = torch.Generator().manual_seed(seed)
        turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
        move = turned * (0.2 + torch.rand(4, dtype=torch.float64, generator=generator))
        before = Gaussians(features, y)(features)
        assert torch.allclose(Gaussians(features @ move + 5, y)(features @ move + 5), before, rtol=1e-6)

    def test_what_does_not_vary_has_no_say(self) -> None:
        features, y = cloud(0)
        plain = Gaussians(features, y)
        wide = torch.cat([features, features[:, :1], torch.full((60, 1), 2.5, dtype=torch.float64)], 1)
        same = Gaussians(wide, y)
        assert int(same.axes.any(0).sum()) == 4, "neither the repeated value nor the constant one is an axis"
        assert torch.allclose(same(wide), plain(features), rtol=1e-6)
        away = wide.clone()
        away[:, 5] += 100
        assert torch.allclose(same(away), same(wide), rtol=1e-6)

    def test_maps_are_averaged_over_places(self) -> None:
        value = torch.arange(12.0).view(1, 2, 2, 3)
        assert averaged(value).tolist() == [[2.5, 8.5]]
        assert averaged(value.flatten(1)).shape == (1, 12)


def small() -> tuple[nn.Sequential, MahalanobisState, Tensor]:
    """A linear layer and what was learnt of it, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).double().eval()
    x, y = cloud(3)
    with torch.no_grad():
        return net, MahalanobisState(["0"], [net(x)], y), x


class TestStep:
    def test_by_hand(self) -> None:
        net, state, x = small()
        gaussians, layer = state.gaussians[0], net[0]
        with torch.no_grad():
            whitened = (net(x) - gaussians.origin) @ gaussians.axes
            nearest = torch.cdist(whitened, gaussians.centres).argmin(1)
            slope = 2 * (whitened - gaussians.centres[nearest]) @ gaussians.axes.T @ layer.weight
            moved = gaussians(net(x - 0.01 * slope.sign()))
            found = Mahalanobis(magnitude=0.01).measure(net, state, x)[1]
        assert torch.allclose(found.squeeze(1), moved)
        assert bool((moved < gaussians(net(x)).detach()).all()), "the step leads towards the nearest class"

    def test_the_logits_are_those_of_the_input_itself(self) -> None:
        net, state, x = small()
        assert torch.equal(Mahalanobis(magnitude=0.5).measure(net, state, x)[0], net(x))

    def test_the_gradient_takes_the_step_for_a_constant(self) -> None:
        net, state, x = small()
        one = x[:3].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: Mahalanobis(magnitude=0.01).measure(net, state, v)[1], one)

    def test_the_same_answer_whoever_asks(self) -> None:
        net, state, x = small()
        detector = Mahalanobis(magnitude=0.05)
        asked = detector.measure(net, state, x.clone().requires_grad_())[1].detach()
        with torch.no_grad():
            assert torch.equal(detector.measure(net, state, x)[1], asked)
        with torch.inference_mode():
            assert torch.equal(detector.measure(net, state, x)[1], asked)
        assert all(p.grad is None for p in net.parameters())

    def test_only_with_a_step_does_it_look_at_gradients(self) -> None:
        assert Mahalanobis().looks_at_gradients
        assert not Mahalanobis(magnitude=0.0).looks_at_gradients


@pytest.fixture(scope="module")
def fashion() -> Fashion:
    net, data = mohs.models.load("bundled:fashion-natural"), load("bundled:fashion-mnist", n=700)
    far = mohs.attack(mohs.attacks.PGD(steps=20, step_size=0.02), net, data.x, data.y, "linf:0.15")
    return net, data.x, data.y, far.x, far.success


class TestDetector:
    def test_it_tells_what_it_was_fitted_on_and_keeps_its_rate(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        detector = Mahalanobis()
        guarded = detector.fit(net, x[:500], y[:500], changed[:500], broken[:500])
        clean = detector.scores(guarded, x[500:])
        other = detector.scores(guarded, changed[500:][broken[500:]])
        auc = float((other.unsqueeze(1) > clean).double().mean())
        assert auc > 0.8, auc
        logits = guarded(x[500:])
        threshold = guarded.model["detector"].threshold
        assert torch.equal(logits.argmax(1) == 10, clean > threshold), "rejected exactly above the threshold"
        assert torch.equal(logits[:, :10], net(x[500:])), "the classifier's logits are its own"
        assert float((clean > threshold).double().mean()) < 0.15
        assert declared(guarded).rejects

    def test_it_falls_to_an_attack_on_both(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        guarded = Mahalanobis().fit(net, x[:500], y[:500], changed[:500], broken[:500]).eval()
        attack = mohs.attacks.APGD(steps=20, objective=mohs.objectives.margin)
        out = mohs.attack(attack, guarded, x[500:540], y[500:540], "linf:0.15", reject=10)
        answer = guarded(out.x[out.success]).argmax(1)
        assert float(out.success.double().mean()) > 0.9
        assert not bool(((answer == 10) | (answer == y[500:540][out.success])).any())

    def test_the_same_seed_the_same_detector_and_it_can_be_stored(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        one, two, other = (
            Mahalanobis().fit(net, x[:120], y[:120], changed[:120], broken[:120], seed=s) for s in (0, 0, 1)
        )
        assert torch.equal(one(x[:8]), two(x[:8]))
        assert not torch.equal(one(x[:8]), other(x[:8]))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(x[:8]), other(x[:8]))

    def test_in_stacks(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        inner = LID(k=5, references=40).fit(net, x[:100], changed[:100], broken[:100])
        middle = Mahalanobis().fit(inner, x[:100], y[:100], changed[:100], broken[:100])
        both = BitDepth(4)(middle).eval()
        assert declared(both).rejects
        assert both(x[:3]).shape == (3, 11), "one rejection for both detectors"
        refused = middle(x).argmax(1) == 10
        alone = middle.defense.scores(middle, x) > middle.model["detector"].threshold
        assert torch.equal(refused, (inner(x).argmax(1) == 10) | alone)


class Blind(nn.Module):
    """Has layers, and no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.detach()).detach()


class TestRefusals:
    def test_before_it_is_fitted(self) -> None:
        with pytest.raises(UsageError, match=r"Mahalanobis\(\.\.\.\)\.fit\(model, x, y, changed\)"):
            Mahalanobis()(nn.Linear(2, 2))

    def test_data(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        with pytest.raises(DataError, match="one label, int64"):
            Mahalanobis().fit(net, x[:100], y[:99], changed[:100])
        with pytest.raises(DataError, match=r"got torch\.float32"):
            Mahalanobis().fit(net, x[:100], y[:100].float(), changed[:100])
        with pytest.raises(DataError, match="at least 38 further examples"):
            Mahalanobis().fit(net, x[:70], y[:70], changed[:70])
        with pytest.raises(DataError, match="None of the"):
            Mahalanobis().fit(net, x[:80], y[:80], changed[:80], torch.zeros_like(broken[:80]))
        with pytest.raises(DataError, match="layers 7 are the same for all 40"):
            Mahalanobis(layers=("0", "7")).fit(constant(net), x[:80], y[:80], changed[:80])

    def test_a_step_needs_gradients(self) -> None:
        x, y = cloud(0, n=120)
        x = x.float()
        with pytest.raises(ModelError, match="magnitude=0"):
            Mahalanobis().fit(Blind().eval(), x, y, x + 1)
        Mahalanobis(magnitude=0.0).fit(Blind().eval(), x, y, x + 1)

    @pytest.mark.parametrize("bad", [{"magnitude": -0.1}, {"fpr": 0.0}, {"fpr": 1.0}, {"layers": "net"}])
    def test_settings(self, bad: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            Mahalanobis(**bad)


def constant(net: nn.Module) -> nn.Module:
    """A net whose last layer answers the same to all inputs."""
    import copy

    dead = copy.deepcopy(net)
    with torch.no_grad():
        dead.get_submodule("7").weight.zero_()
    return dead
