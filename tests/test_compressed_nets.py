"""Pruned and quantised nets beside the arithmetic by hand, and how they fall."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from defended_nets import fashion, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.defenses import Defended, Quantisation, WeightPruning, declared, parse
from mohs.errors import DataError, ModelError, UsageError
from mohs.evaluation.plans import Plan, PlanStep

EPS = "linf:0.1"


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 2), nn.Tanh(), nn.Flatten(),
            nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 3),
        )  # fmt: skip
    return made.double().eval()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.dim() > 1]


def robust(model: nn.Module, guide: nn.Module | None = None, n: int = 32) -> float:
    x, y = fashion()
    return float((~mohs.attack(PGD(steps=20), model, x[:n], y[:n], EPS, guide=guide).success).float().mean())


class TestWeightPruning:
    @settings(max_examples=20, deadline=None)
    @given(share=st.floats(0, 0.99), seed=st.integers(0, 9))
    def test_the_smallest_weights_of_all_layers_together_are_zero(self, share: float, seed: int) -> None:
        model = small(seed)
        before = torch.cat([w.flatten() for w in weights(model)])
        after = torch.cat([w.flatten() for w in weights(WeightPruning(share)(model))])
        gone = after == 0
        assert int(gone.sum()) == round(share * len(before))
        assert torch.equal(after[~gone], before[~gone])
        assert not gone.any() or before[gone].abs().max() <= before[~gone].abs().min()

    def test_nothing_else_is_touched(self) -> None:
        model = small()
        pruned = WeightPruning(0.9)(model)
        assert isinstance(pruned, Defended)
        state = pruned.model.state_dict()
        assert state.keys() == model.state_dict().keys()  # no masks are left
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if v.dim() < 2)
        assert all(p.requires_grad for p in pruned.parameters())

    def test_it_falls_like_any_net_and_declares_nothing(self) -> None:
        model = WeightPruning(0.8)(net())
        assert declared(model).guide is None
        assert robust(model) < 0.07


def levels(w: np.ndarray, bits: int) -> np.ndarray:
    """The rule for one channel."""
    top = np.abs(w).max()
    scale = top / (2 ** (bits - 1) - 1)
    return (
        w
        if scale == 0
        else np.array([min(np.arange(-(2**bits), 2**bits) * scale, key=lambda v: abs(v - one)) for one in w])
    )


class TestWeights:
    @pytest.mark.parametrize("bits", [2, 3, 5])
    def test_each_output_channel_has_its_own_levels(self, bits: int) -> None:
        model = small()
        model[6].weight.data[2] = 0  # a channel without a scale
        for k, (was, now) in enumerate(zip(weights(model), weights(Quantisation(bits)(model)), strict=True)):
            dim = 1 if k == 1 else 0  # a transposed convolution has its outputs second
            for a, b in zip(was.movedim(dim, 0), now.movedim(dim, 0), strict=True):
                flat = levels(a.flatten().numpy(), bits)
                assert np.allclose(b.flatten().numpy(), flat, atol=1e-12)
                assert len(np.unique(flat)) <= 2**bits - 1

    @pytest.mark.parametrize("bits", [2, 4, 8, 16])
    def test_no_weight_moves_by_more_than_half_a_step(self, bits: int) -> None:
        for was, now in zip(weights(net()), weights(Quantisation(bits)(net())), strict=True):
            top = was.flatten(1).abs().amax(1)
            step = top / (2 ** (bits - 1) - 1)
            assert bool(((was - now).flatten(1).abs().amax(1) <= step / 2 + 1e-6 * top).all())
            assert torch.allclose(now.flatten(1).abs().amax(1), top)

    def test_rounded_weights_hide_no_gradient(self) -> None:
        assert robust(Quantisation(4)(net())) < 0.07


class TestActivations:
    def test_they_are_rounded_over_the_range_of_clean_inputs(self) -> None:
        model = small()
        x = torch.randn(300, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        fitted = Quantisation(16, activations=3).fit(model, x)
        exact = Quantisation(16)(model)
        assert isinstance(exact, Defended)
        steps = exact.model
        assert isinstance(steps, nn.Sequential)
        other = 3 * x.flip(0)[:7]  # beyond the range, too
        seen, now = x, other
        for k, layer in enumerate(steps):
            if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
                low, high = float(seen.min()), float(seen.max())
                step = (high - low) / 7
                now = low + step * ((now.clamp(low, high) - low) / step).round()
                assert len(now.unique()) <= 8, k
            seen, now = layer(seen).detach(), layer(now).detach()
        assert torch.allclose(fitted(other), now, atol=1e-9)

    def test_many_bits_change_nothing_inside_the_range(self) -> None:
        x = fashion()[0]
        fine = Quantisation(16, activations=16).fit(net(), x)
        assert torch.allclose(fine(x), net()(x), atol=2e-2)

    def test_a_dead_layer_stays_what_it_is(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        model[0].weight.data.zero_()
        model[0].bias.data.fill_(0.25)
        x = torch.rand(5, 3)
        assert torch.allclose(Quantisation(16, activations=2).fit(model, x)(x), Quantisation(16)(model)(x))

    def test_one_layer_in_two_places_has_one_range(self) -> None:
        shared = nn.Linear(3, 3)
        model = nn.Sequential(nn.Linear(3, 3), shared, nn.ReLU(), shared).eval()
        x = torch.rand(50, 3)
        fitted = Quantisation(8, activations=8).fit(model, x)
        assert isinstance(fitted.model, nn.Sequential)
        assert fitted.model[1] is fitted.model[3]
        assert torch.allclose(fitted(x), model(x), atol=0.1)

    def test_the_gradient_is_shattered_and_passes_straight_where_it_is_declared(self) -> None:
        model = Quantisation(4, activations=4).fit(net(), fashion()[0])
        x, y = fashion()
        seen = x[:8].clone().requires_grad_()
        assert not torch.autograd.grad(model(seen).sum(), seen)[0].any()
        guide = declared(model).guide
        assert guide is not None
        assert robust(model) > 0.75
        assert robust(model, guide) < 0.07
        assert float((model(x).argmax(1) == y).float().mean()) > 0.8

    def test_points_of_the_net_as_it_was_break_it_too(self) -> None:
        model = Quantisation(4, activations=4).fit(net(), fashion()[0])
        assert robust(model, model.undefended) < 0.07

    def test_copies_and_precision(self) -> None:
        x = fashion()[0]
        model = copy.deepcopy(Quantisation(4, activations=4).fit(copy.deepcopy(net()), x)).double()
        assert model(x.double()).dtype == torch.float64
        assert not any(m.training for m in model.modules())
        assert "low" in "".join(model.state_dict())


@pytest.mark.slow
def test_the_net_as_it_was_is_attacked_as_well() -> None:
    x, y = fashion()
    model = Quantisation(4, activations=4).fit(net("pgd"), x)
    record = mohs.evaluate(
        model, (x[:6], y[:6]), "linf:0.05", plan=Plan("short", (PlanStep.make("APGD", {"steps": 5}),))
    )
    saw = {f.id: f.saw for f in record.header.checks}
    for check in ("ablation", "transfer"):
        assert "without Quantisation(bits=4, activations=4)" in saw[check]


def test_the_short_form() -> None:
    assert parse("weight-pruning:0.5") == WeightPruning(0.5)
    assert parse("quantisation:3") == Quantisation(3)
    assert parse("quantisation:3:4") == Quantisation(3, 4)


def test_what_cannot_be_is_refused_in_words() -> None:
    x, relu = fashion()[0], nn.Sequential(nn.ReLU()).eval()
    for make, said in (
        (lambda: WeightPruning(1.0), r"share of WeightPruning must be a number at least 0 and below 1; got 1\.0"),
        (lambda: Quantisation(1), "bits of Quantisation.* at least 2 and at most 16; got 1"),
        (lambda: Quantisation(4, 0), "activations of Quantisation.* at least 1"),
        (lambda: Quantisation(4, 4)(net()), r"Call Quantisation\(bits=4, activations=4\)\.fit\(model, x\)"),
        (lambda: Quantisation(4).fit(net(), x), "nothing to learn from data"),
        (lambda: Quantisation(4, 4).fit(nn.Sequential(small(), nn.Dropout()), x), "looks at a model in eval mode"),
    ):
        with pytest.raises(UsageError, match=said):
            make()
    for defense in (WeightPruning(), Quantisation()):
        with pytest.raises(ModelError, match=rf"{type(defense).__name__} changes the weights .* shows none"):
            defense(relu)
    with pytest.raises(DataError, match="got none"):
        Quantisation(4, 4).fit(net(), x[:0])
    with pytest.raises(DataError, match="not finite"):
        Quantisation(4, 4).fit(net(), x * float("inf"))
