"""Fitted stand-ins: against least squares in closed form, and on planted layers that the identity does not resemble."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted_models import Layer
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.errors import ModelError, UsageError
from mohs.evaluation import _fits, _layers, tactics
from mohs.evaluation.checks import Probe, examine
from mohs.gradients import Past, Through, fit
from mohs.gradients.fitted import kinds
from mohs.threat import Threat


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slope(function: Callable[[Tensor], Tensor], x: Tensor, c: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad((function(x) * c).sum(), x)
    return g


def alike(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).mean())


# ---- the fit ---------------------------------------------------------------------------------------------


def test_a_linear_layer_that_rounds_has_the_slope_of_the_linear_layer() -> None:
    x, w = random(512, 12), torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    found = fit(x, (x @ w * 4).round() / 4, "linear")
    c = torch.randn(512, 7, generator=torch.Generator().manual_seed(2))
    assert alike(slope(found, x, c), c @ w.T) > 0.995
    assert found.error < 0.02
    # and it is the least-squares solution but for the penalty
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(512, 1)], 1), x @ w).solution
    clean = fit(x, x @ w, "linear")
    assert torch.allclose(clean(x), torch.cat([x, torch.ones(512, 1)], 1) @ exact, atol=0.05)


def test_a_pointwise_fit_mixes_channels_and_resizes() -> None:
    x = random(96, 3, 8, 8)
    mix = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]])
    went = nn.functional.avg_pool2d(torch.einsum("oc,bchw->bohw", mix, x), 2)
    found = fit(x, (went * 6).round() / 6, "pointwise")
    assert found(x).shape == went.shape
    c = torch.randn(96, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    wanted = nn.functional.interpolate(torch.einsum("oc,bohw->bchw", mix, c), scale_factor=2) / 4
    assert alike(slope(found, x, c), wanted) > 0.97


def test_each_kind_learns_what_the_simpler_one_cannot() -> None:
    x = random(128, 1, 10, 10)
    shifted = torch.roll(x, (1, 1), (2, 3))  # a neighbour: out of reach for a 1x1 convolution
    errors = {kind: fit(x, shifted, kind).error for kind in ("pointwise", "local")}
    assert errors["pointwise"] > 0.9
    assert errors["local"] < 0.4
    many, order = random(1024, 1, 10, 10), torch.randperm(100, generator=torch.Generator().manual_seed(0))
    moved = many.flatten(1)[:, order].view_as(many)  # anywhere
    assert fit(many, moved, "linear").error < 0.02
    rows = random(512, 2)
    product = rows[:, :1] * rows[:, 1:]
    assert fit(rows, product, "hidden").error < 0.5 * fit(rows, product, "linear").error


def test_it_repeats_itself_and_leaves_the_generators_alone() -> None:
    x = random(64, 1, 6, 6)
    state = torch.random.get_rng_state()
    one, two, other = (fit(x, x.round(), "local", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))
    with torch.inference_mode():
        assert torch.equal(fit(x, x.round(), "local")(x), one(x))


def test_what_cannot_be_fitted_is_refused() -> None:
    x = random(8, 1, 4, 4)
    with pytest.raises(UsageError, match="kind must be one of"):
        fit(x, x, "deep")
    with pytest.raises(ModelError, match=r"cannot map \(8, 5\) to \(8, 3\). Allowed there: linear, hidden"):
        fit(random(8, 5), random(8, 3), "local")
    with pytest.raises(ModelError, match="do not vary"):
        fit(x, torch.ones(8, 2), "linear")
    assert kinds(x, random(4, 3)) == ()
    assert kinds(x[:0], x[:0]) == ()


# ---- planted models --------------------------------------------------------------------------------------

THERMOMETER = defenses.Thermometer(16)
SWAPPED = torch.randperm(784, generator=torch.Generator().manual_seed(0))


def negative_code(x: Tensor) -> Tensor:
    """28 x 28 to 16 channels, each the less the brighter: repeating the channel points the wrong way."""
    return THERMOMETER.transform(1 - x)


class Decoder(nn.Module):
    """What a net learns in front of such a code: the mean of the channels, turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(16, 1, 1)
        nn.init.constant_(self.mix.weight, -1 / 16)
        nn.init.constant_(self.mix.bias, 1 + 1 / 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Sorted(nn.Module):
    """A net that wants its pixels elsewhere, with a weight so that it is no layer to be left out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.one = net, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.one * x.flatten(1)[:, SWAPPED.argsort()].view_as(x))


def swapped(x: Tensor) -> Tensor:
    """Pixels anywhere else, in steps of a fifteenth, and outside of torch."""
    moved = (x.detach().flatten(1)[:, SWAPPED] * 15).round() / 15
    return torch.from_numpy(moved.view_as(x).numpy().copy())


@pytest.fixture(scope="module")
def data() -> mohs.data.Dataset:
    return mohs.data.load("bundled:fashion-mnist", n=72)


def net() -> nn.Module:
    return mohs.models.load("bundled:fashion-natural")


def chosen(model: nn.Module, data: mohs.data.Dataset) -> tactics.Choice:
    threat = Threat.parse("linf:0.1")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = Probe(model, data.x, data.y, threat, batch=64)
        return tactics.choose(probe, examine(probe), threat, 0, 64)


class Refuses(nn.Module):
    """In the place of a tactic that would need no fit."""

    def __init__(self, model: nn.Module, **settings: object) -> None:
        raise ModelError("not here")


def test_a_code_with_other_channels_falls_to_a_fitted_convolution(
    data: mohs.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tactics, "Straight", Refuses)
    model = nn.Sequential(Layer(negative_code), Decoder(), net()).eval()
    choice = chosen(model, data)
    assert choice.tactic.name == "through 0 by a fitted 1x1 convolution"
    broken = {t.tactic.name: t.broken for t in choice.trials}
    assert broken["through 0"] <= 0.2 * 32 < 0.9 * 32 <= broken[choice.tactic.name]
    guide = choice.tactic.guide(model)
    assert guide is not None
    assert torch.equal(guide(data.x), model(data.x))


def test_a_code_that_is_no_layer_is_fitted_up_to_the_next_one(
    data: mohs.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tactics, "Straight", Refuses)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.net = Decoder(), net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.decoder(negative_code(x)))

    choice = chosen(Whole().eval(), data)
    assert choice.tactic.name == "past what comes before decoder by a fitted 1x1 convolution"
    assert max(t.broken for t in choice.trials) >= 0.9 * 32


def test_pixels_that_were_moved_fall_to_a_linear_fit_alone(data: mohs.data.Dataset) -> None:
    model = nn.Sequential(Layer(swapped), Sorted(net())).eval()
    choice = chosen(model, data)
    broken = {t.tactic.name: t.broken for t in choice.trials}
    assert choice.tactic.name == "through 0 by a fitted linear map"
    assert broken[choice.tactic.name] >= broken["through 0"] + 10
    assert broken[choice.tactic.name] >= broken["through 0 by a fitted 1x1 convolution"] + 10


def test_where_the_identity_is_good_nothing_is_fitted(data: mohs.data.Dataset) -> None:
    model = nn.Sequential(Layer(lambda x: (x * 15).round() / 15), net()).eval()
    assert list(_fits.fitted(model, data.x, Threat.parse("linf:0.1"))) == []
    assert not any("fitted" in t.tactic.name for t in chosen(model, data).trials)


def test_a_layer_of_any_shape_is_named(data: mohs.data.Dataset) -> None:
    model = nn.Sequential(Layer(lambda x: x.round().flatten(1)[:, :100]), nn.Linear(100, 3)).eval()
    assert _layers.losing(model, data.x) == []
    assert _layers.losing(model, data.x, any_shape=True) == ["0"]
    stand_in = fit(data.x, data.x.flatten(1)[:, :100], "linear")
    g = slope(Through(model, {"0": stand_in}), data.x[:4], torch.ones(4, 3))
    assert bool((g != 0).any())
    past = Past(model, "1", stand_in)
    assert torch.allclose(slope(past, data.x[:4], torch.ones(4, 3)), g)
    assert "Fitted(linear" in repr(past)
