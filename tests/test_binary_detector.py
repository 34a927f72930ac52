"""The detector subnetwork: its shape, its training on given and on dynamic adversaries, and how it falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.data import load
from mohs.defenses import BinaryDetector, DynamicAdversary, Stack, declared
from mohs.defenses.binary_detector import as_map, subnetwork
from mohs.errors import DataError, ThreatError, UsageError

Fashion = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]
SMALL = BinaryDetector(width=8, epochs=6, lr=3e-3)


class TestSubnetwork:
    @pytest.mark.parametrize(("side", "poolings"), [(32, 2), (16, 1), (9, 1), (8, 0), (1, 0)])
    def test_maps_are_pooled_down_to_eight(self, side: int, poolings: int) -> None:
        net = subnetwork(3, (side, side), 4).eval()
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in net) == poolings
        assert [layer.out_channels for layer in net if isinstance(layer, nn.Conv2d)] == [4, 8, 8, 1]
        assert net(torch.zeros(2, 3, side, side)).shape[:2] == (2, 1)

    def test_vectors_and_sequences_as_maps(self) -> None:
        assert as_map(torch.zeros(2, 7)).shape == (2, 7, 1, 1)
        assert as_map(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 4, 5)
        sequence = torch.arange(24.0).view(2, 3, 4)
        assert torch.equal(as_map(sequence)[:, :, 1, 0], sequence[:, 1]), "features become channels"
        assert as_map(torch.zeros(2, 3, 4, 5, 6)).shape == (2, 360, 1, 1)


def linear(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two linear models, the classes' [3, 6] and the detector's [6], with inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    classes, detector, x = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 6), (6,), (20, 6))
    )
    return classes, detector, x.sigmoid(), torch.arange(20) % 3


class TestDynamicAdversary:
    def test_one_step_by_hand(self) -> None:
        classes, detector, x, y = linear(0)
        sigma = torch.linspace(0, 1, 20, dtype=torch.float64)
        p = (x @ classes.T).softmax(1)
        loss = (p - nn.functional.one_hot(y, 3)) @ classes  # the gradient of the cross-entropy
        way = (1 - sigma).unsqueeze(1) * loss.sign() - sigma.unsqueeze(1) * detector.sign()
        found = DynamicAdversary("linf:0.1", steps=1, step_size=0.08).points(
            lambda v: (v @ classes.T, v @ detector), x, y, sigma
        )
        assert torch.allclose(found, (x + 0.08 * way).clamp(0, 1))

    @given(st.integers(0, 10**6), st.sampled_from(["linf:0.2", "l2:0.4", "l1:0.5", "l3:0.3"]))
    @settings(max_examples=25, deadline=None)
    def test_it_stays_inside(self, seed: int, short: str) -> None:
        classes, detector, x, y = linear(seed)
        sigma = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        threat = Threat.parse(short)
        found = DynamicAdversary(threat, steps=5).points(lambda v: (v @ classes.T, v @ detector), x, y, sigma)
        assert bool((found.amin() >= 0) & (found.amax() <= 1))
        assert bool(threat.region.contains(found, x, torch.full((20,), threat.region.eps).double()).all())

    def test_sigma_chooses_whom_to_fool(self) -> None:
        classes, detector, x, y = linear(1)

        def look(v: Tensor) -> tuple[Tensor, Tensor]:
            return v @ classes.T, v @ detector

        adversary = DynamicAdversary("linf:0.3", steps=10)
        ends = [adversary.points(look, x, y, torch.full((20,), s).double()) for s in (0.0, 1.0)]
        wrong, unseen = ([float((look(e)[0].argmax(1) != y).double().mean()), float(look(e)[1].mean())] for e in ends)
        assert wrong[0] > unseen[0]
        assert wrong[1] > unseen[1]

    @pytest.mark.parametrize("bad", ["linf:inf", "l0:3", "patch:5"])
    def test_threats(self, bad: str) -> None:
        with pytest.raises(ThreatError, match="finite radius"):
            DynamicAdversary(bad)

    def test_settings(self) -> None:
        for bad in ({"steps": 0}, {"steps": 1.5}, {"step_size": 0.0}):
            settings: dict[str, Any] = bad
            with pytest.raises(UsageError):
                DynamicAdversary("linf:0.1", **settings)
        assert repr(DynamicAdversary("linf:0.1")).startswith("DynamicAdversary(threat=Threat(")
        assert DynamicAdversary("linf:0.1") == DynamicAdversary(Threat.parse("linf:0.1"))


@pytest.fixture(scope="module")
def fashion() -> Fashion:
    net, data = mohs.models.load("bundled:fashion-natural"), load("bundled:fashion-mnist", n=700)
    far = mohs.attack(mohs.attacks.PGD(steps=20, step_size=0.02), net, data.x, data.y, "linf:0.15")
    return net, data.x, data.y, far.x, far.success


def auc(usual: Tensor, unusual: Tensor) -> float:
    return float((unusual.unsqueeze(1) > usual).double().mean())


class TestDetector:
    def test_it_tells_what_it_was_fitted_on_and_keeps_its_rate(self, fashion: Fashion) -> None:
        net, x, _, changed, broken = fashion
        guarded = SMALL.fit(net, x[:500], changed[:500], broken[:500])
        clean, other = SMALL.scores(guarded, x[500:]), SMALL.scores(guarded, changed[500:][broken[500:]])
        assert auc(clean, other) > 0.95
        logits, threshold = guarded(x[500:]), guarded.model["detector"].threshold
        assert torch.equal(logits.argmax(1) == 10, clean > threshold)
        assert torch.equal(logits[:, :10], net(x[500:]))
        assert float((clean > threshold).double().mean()) < 0.15
        assert declared(guarded).rejects

    def test_it_falls_to_an_attack_on_both(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        guarded = SMALL.fit(net, x[:500], changed[:500], broken[:500]).eval()
        assert float((guarded(changed[500:][broken[500:]]).argmax(1) == 10).double().mean()) > 0.8
        attack = mohs.attacks.APGD(steps=20, objective=mohs.objectives.margin)
        out = mohs.attack(attack, guarded, x[500:560], y[500:560], "linf:0.15", reject=10)
        assert float(out.success.double().mean()) > 0.9

    def test_trained_against_the_dynamic_adversary_it_withstands_it_better(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        adversary = DynamicAdversary("linf:0.15", steps=4)
        static = SMALL.fit(net, x[:500], changed[:500], broken[:500])
        dynamic = SMALL.fit_dynamic(net, x[:500], y[:500], adversary)
        found = []
        for guarded in (static, dynamic):
            classifier, state = guarded.model["classifier"], guarded.model["detector"]
            moved = adversary.points(
                lambda v, c=classifier, s=state: SMALL.score(c, s, v), x[500:], y[500:], torch.full((200,), 0.5)
            )
            found.append(auc(SMALL.scores(guarded, x[500:]), SMALL.scores(guarded, moved)))
        assert found[1] > found[0] + 0.1, found

    def test_the_classifier_and_all_generators_stay_as_they_are(self, fashion: Fashion) -> None:
        net, x, y, changed, _ = fashion
        before = {k: v.clone() for k, v in net.state_dict().items()}
        generator = torch.get_rng_state()
        quick = BinaryDetector(width=4, epochs=1)
        for guarded in (
            quick.fit(net, x[:60], changed[:60]),
            quick.fit_dynamic(net, x[:60], y[:60], DynamicAdversary("linf:0.1", steps=2)),
        ):
            assert guarded.model["classifier"] is net
            assert not any(p.requires_grad for p in guarded.model["detector"].parameters())
            assert not any(m.training for m in guarded.modules())
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
        assert torch.equal(torch.get_rng_state(), generator)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_the_same_seed_the_same_detector_and_it_can_be_stored(self, fashion: Fashion, dynamic: bool) -> None:
        net, x, y, changed, _ = fashion
        quick, adversary = BinaryDetector(width=4, epochs=1), DynamicAdversary("linf:0.1", steps=2)
        one, two, other = (
            quick.fit_dynamic(net, x[:60], y[:60], adversary, seed=s)
            if dynamic
            else quick.fit(net, x[:60], changed[:60], seed=s)
            for s in (0, 0, 1)
        )
        assert torch.equal(one(x[:8]), two(x[:8]))
        assert not torch.equal(one(x[:8]), other(x[:8]))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one(x[:8]), other(x[:8]))

    def test_any_layer_any_shape(self, fashion: Fashion) -> None:
        net, x, _, changed, _ = fashion
        quick = BinaryDetector(width=4, epochs=1)
        assert quick.fit(net, x[:60], changed[:60]).model["detector"].name == "2", "the second of four"
        for layer in ("0", "5", "7"):
            guarded = BinaryDetector(layer=layer, width=4, epochs=1).fit(net, x[:60], changed[:60])
            assert Stack()(guarded)(x[:3]).shape == (3, 11)


class TestRefusals:
    def test_data(self, fashion: Fashion) -> None:
        net, x, y, changed, broken = fashion
        adversary = DynamicAdversary("linf:0.1", steps=1)
        with pytest.raises(DataError, match="one changed input"):
            SMALL.fit(net, x, changed[:3])
        with pytest.raises(DataError, match="at least 38 further examples"):
            SMALL.fit(net, x[:30], changed[:30])
        with pytest.raises(DataError, match="None of the"):
            SMALL.fit(net, x[:60], changed[:60], torch.zeros_like(broken[:60]))
        with pytest.raises(DataError, match="at least 38 examples"):
            SMALL.fit_dynamic(net, x[:37], y[:37], adversary)
        with pytest.raises(DataError, match="one label, int64"):
            SMALL.fit_dynamic(net, x[:60], y[:50], adversary)
        with pytest.raises(UsageError, match="no layer 'nowhere'"):
            BinaryDetector(layer="nowhere").fit(net, x, changed)

    @pytest.mark.parametrize(
        "bad", [{"width": 0}, {"epochs": 0}, {"lr": 0.0}, {"fpr": 0.0}, {"fpr": 1.0}, {"layer": ("a", "b")}]
    )
    def test_settings(self, bad: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="BinaryDetector"):
            BinaryDetector(**bad)
