"""Feature squeezing, MagNet and PCA whitening: the scores by hand, the thresholds, the gradients, and how they fall."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from defended_nets import detectors, fashion, net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, PGD
from mohs.defenses import (
    DETECTORS,
    LID,
    BitDepth,
    Detector,
    FeatureSqueezing,
    GaussianBlur,
    Honest,
    MagNet,
    MeanLogits,
    MedianBlur,
    NoiseInput,
    NonLocalMeans,
    PCAWhitening,
    Thermometer,
    declared,
)
from mohs.defenses._agreement import SURE, jensen_shannon, total_variation, unsaturated
from mohs.defenses._detector import calibrated, held_out, least, threshold_at
from mohs.errors import DataError, ModelError, UsageError
from mohs.evaluation.plans import Plan, PlanStep
from mohs.objectives import margin

NEW = sorted(DETECTORS)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(inputs: int, classes: int, scale: float = 1.0, seed: int = 1) -> nn.Sequential:
    made = nn.Linear(inputs, classes, bias=False, dtype=torch.float64)
    weight = torch.randn(classes, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made.weight = nn.Parameter(scale * weight, requires_grad=False)
    return nn.Sequential(nn.Flatten(), made).eval()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


LOGITS = st.lists(st.floats(-60, 60), min_size=4, max_size=4)


class TestAgreement:
    @given(LOGITS, LOGITS)
    @settings(max_examples=60, deadline=None)
    def test_distances_are_those_of_their_definition(self, z: list[float], other: list[float]) -> None:
        a, b = (torch.tensor([v], dtype=torch.float64) for v in (z, other))
        p, q = softmax(np.array(z)), softmax(np.array(other))
        assert float(total_variation(a, b)) == pytest.approx(np.abs(p - q).sum(), abs=1e-12)
        m = (p + q) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            js = 0.5 * (np.where(p > 0, p * np.log(p / m), 0).sum() + np.where(q > 0, q * np.log(q / m), 0).sum())
        assert float(jensen_shannon(a, b)) == pytest.approx(js, abs=1e-9)
        assert float(jensen_shannon(b, a)) == pytest.approx(js, abs=1e-9)
        assert -1e-12 < float(jensen_shannon(a, b)) < math.log(2) + 1e-12

    @given(LOGITS, LOGITS)
    @settings(max_examples=60, deadline=None)
    def test_only_sure_disagreement_is_cooled(self, z: list[float], other: list[float]) -> None:
        a, b = (torch.tensor([v], dtype=torch.float64) for v in (z, other))
        one, two = unsaturated(a, b)
        i, j = int(a.argmax()), int(b.argmax())
        if max(z[i] - z[j], other[j] - other[i]) <= SURE:
            assert torch.equal(one, a)
            assert torch.equal(two, b)
        else:
            assert max(float(one[0, i] - one[0, j]), float(two[0, j] - two[0, i])) == pytest.approx(SURE)
            assert torch.allclose(one / a.where(a != 0, 1), two / b.where(b != 0, 1)) or 0 in (*z, *other)


class TestThreshold:
    @given(st.floats(0.001, 0.9))
    @settings(max_examples=50, deadline=None)
    def test_the_fewest_examples(self, fpr: float) -> None:
        n = least(fpr)
        assert math.isfinite(threshold_at(torch.arange(float(n)), fpr))
        assert n == 1 or threshold_at(torch.arange(float(n - 1)), fpr) == math.inf

    def test_too_few_or_broken_scores_are_refused(self) -> None:
        assert float(calibrated(torch.arange(19.0), 0.05, "It")) == 18
        with pytest.raises(DataError, match=r"It needs at least 19 clean examples .* 0\.05; 18 were left"):
            calibrated(torch.arange(18.0), 0.05, "It")
        with pytest.raises(DataError, match="2 of 30 are not finite, the first is number 4"):
            calibrated(torch.arange(30.0).index_fill(0, torch.tensor([4, 9]), math.nan), 0.05, "It")

    def test_what_is_held_out_is_not_learnt_from(self) -> None:
        x = torch.arange(101.0).unsqueeze(1)
        taught, held = held_out(x, 0.05, "It", 3)
        assert (len(taught), len(held)) == (76, 25)
        assert torch.equal(torch.cat([taught, held]).sort(0).values, x)
        assert not torch.equal(held_out(x, 0.05, "It", 4)[1], held)
        with pytest.raises(DataError, match=r"got 75 in all\. Give 76 or more"):
            held_out(x[:75], 0.05, "It", 3)

    def test_lid_too_refuses_to_promise_what_it_cannot_hold(self) -> None:
        x = fashion(240)[0][:62]
        with pytest.raises(DataError, match="LID needs its 40 references and at least 38 further examples"):
            LID(k=5, references=40).fit(net(), x, (x + 0.1).clamp(0, 1))


class TestFeatureSqueezing:
    def test_the_score_by_hand(self) -> None:
        x, model = uniform(40, 1, 4, 4), linear(16, 3)
        detector = FeatureSqueezing((BitDepth(1), MedianBlur(3)))
        guarded = detector.fit(model, x)
        flat = x.numpy()
        around = np.pad(flat, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        median = np.empty_like(flat)
        for i in range(4):
            for j in range(4):
                median[:, 0, i, j] = np.median(around[:, 0, i : i + 3, j : j + 3], axis=(1, 2))
        weight = model[1].weight.numpy()
        p, rounded, blurred = (softmax(v.reshape(40, 16) @ weight.T) for v in (flat, np.rint(flat), median))
        expected = np.maximum(np.abs(p - rounded).sum(1), np.abs(p - blurred).sum(1))
        assert np.allclose(detector.scores(guarded, x), expected)
        # of 40 the 39th is the threshold: ceil(0.95 * 41)
        assert float(guarded.model["detector"].threshold) == pytest.approx(np.sort(expected)[38])
        assert int((guarded(x).argmax(1) == 3).sum()) == 1

    def test_the_honest_gradient_lets_the_rounding_stand_aside(self) -> None:
        x, model = uniform(30, 1, 3, 3, seed=2), linear(9, 3)
        guarded = FeatureSqueezing((BitDepth(1),)).fit(model, x)
        weight = model[1].weight

        def slope(z: Tensor, sign: Tensor) -> Tensor:  # of sum(sign * softmax(z)) with respect to the input
            p = z.softmax(1)
            return (p * (sign - (sign * p).sum(1, keepdim=True))) @ weight

        z, squeezed = model(x), model(x.round())
        sign = (z.softmax(1) - squeezed.softmax(1)).sign()
        own, past = slope(z, sign), slope(squeezed, sign)
        for model_or_guide, expected in ((guarded, own), (Honest(guarded), own - past)):
            at = x.clone().requires_grad_()
            answer = model_or_guide(at)
            excess = answer[:, 3] - answer[:, :3].amax(1)
            (found,) = torch.autograd.grad(excess.sum(), at)
            assert torch.allclose(found.flatten(1), expected)

    def test_where_both_answers_are_sure_the_honest_gradient_still_says_where_they_meet(self) -> None:
        x, model = uniform(60, 1, 3, 3, seed=3).float(), linear(9, 3, scale=2000.0).float()
        model[1].weight -= model[1].weight.mean(1, keepdim=True)  # no class for all that is bright
        guarded = FeatureSqueezing((BitDepth(1),), fpr=0.9).fit(model, x)
        apart = model(x).argmax(1) != model(x.round()).argmax(1)
        assert int(apart.sum()) > 10
        x = x[apart]
        slopes = []
        for one in (guarded, Honest(guarded)):
            at = x.clone().requires_grad_()
            answer = one(at)
            (found,) = torch.autograd.grad((answer[:, 3] - answer[:, :3].amax(1)).sum(), at)
            slopes.append(found.flatten(1))
        blind, honest = slopes
        assert bool((blind.abs().amax(1) < 1e-12).any()), "saturated for some, or this tests nothing"
        assert bool((honest.abs().amax(1) > 1e-6).all())

    def test_what_the_squeezers_need_is_declared(self) -> None:
        x = fashion(1000)[0][:24]
        plain = FeatureSqueezing((MedianBlur(3), GaussianBlur())).fit(net(), x)
        assert not declared(plain).unit
        assert declared(plain).rejects
        colour = FeatureSqueezing((MedianBlur(3), NonLocalMeans(search=1))).fit(net(), x)
        assert declared(colour).unit
        assert isinstance(declared(plain).guide, Honest), "a softmax may saturate whatever the squeezers are"

    @pytest.mark.parametrize(
        "squeezers", [(), [BitDepth(1)], (NoiseInput(0.1),), (MeanLogits(),), (BitDepth(1), "median-blur:3")]
    )
    def test_what_is_no_squeezer_is_refused(self, squeezers: object) -> None:
        wrong: dict[str, Any] = {"squeezers": squeezers}
        with pytest.raises(UsageError, match=r"squeezers? of FeatureSqueezing must be .* got"):
            FeatureSqueezing(**wrong)

    def test_a_squeezer_that_changes_the_shape_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"makes \(4, 28, 28\) of \(1, 28, 28\)"):
            FeatureSqueezing((Thermometer(4),)).fit(net(), fashion()[0])


class TestMagNet:
    def test_the_autoencoders_are_those_of_the_paper_for_mnist(self) -> None:
        state = detectors()["magnet"].model["detector"]
        shapes = [
            [tuple(p.shape[:2]) for p in part.parameters() if p.dim() > 1] for part in (state.first, state.second)
        ]
        assert shapes == [[(3, 1), (3, 3), (3, 3), (3, 3), (1, 3)], [(3, 1), (3, 3), (1, 3)]]
        assert state.first(torch.rand(2, 1, 9, 7)).shape == (2, 1, 9, 7)
        assert not any(p.requires_grad for p in state.parameters())

    @pytest.mark.parametrize("reform", [True, False])
    def test_the_score_by_hand(self, reform: bool) -> None:
        x = fashion(1000)[0][:120].double()
        model = copy.deepcopy(net()).double()
        detector = MagNet(steps=5, temperatures=(1.0, 10.0), reform=reform)
        guarded = detector.fit(model, x)
        state = guarded.model["detector"]
        taught, held = held_out(x, 0.05, "MagNet", 0)

        def distances(x: Tensor) -> np.ndarray:
            one, two = state.first(x).numpy(), state.second(x).numpy()
            with torch.no_grad():
                z, r = model(x).numpy(), model(torch.from_numpy(one)).numpy()
            found = [((x.numpy() - one) ** 2).mean((1, 2, 3)), np.abs(x.numpy() - two).mean((1, 2, 3))]
            for temperature in (1.0, 10.0):
                p, q = softmax(z / temperature), softmax(r / temperature)
                m = (p + q) / 2
                found.append(((p * np.log(p / m) + q * np.log(q / m)) / 2).sum(1))
            return np.stack(found, 1)

        scale = np.quantile(distances(taught), 0.95, axis=0)
        assert np.allclose(state.scale, scale)
        assert np.allclose(detector.scores(guarded, x), np.log(distances(x) / scale).max(1))
        # of 30 the 30th is the threshold: ceil(0.95 * 31)
        assert float(state.threshold) == pytest.approx(np.log(distances(held) / scale).max())
        with torch.no_grad():
            expected = model(state.first(x)) if reform else model(x)
            assert torch.allclose(guarded(x)[:, :10], expected)

    def test_training_rebuilds_better_and_draws_from_seeds_of_its_own(self) -> None:
        x, small = fashion(1000)[0][:120, :, ::2, ::2], mohs.models.nets.small_cnn(size=14).eval()
        before = torch.get_rng_state()
        short, more, same, other = (
            MagNet(steps=steps).fit(small, x, seed=seed) for steps, seed in ((2, 0), (60, 0), (60, 0), (60, 1))
        )
        assert torch.equal(torch.get_rng_state(), before)
        errors = [(g.model["detector"].first(x) - x).square().mean() for g in (short, more)]
        assert errors[1] < 0.7 * errors[0]
        assert torch.equal(more(x), same(x))
        assert not torch.equal(more(x), other(x))

    def test_it_learns_to_take_the_noise_away(self) -> None:
        x = 0.01 * uniform(100, 1, 8, 8)
        guarded = MagNet(steps=80, noise=0.5).fit(linear(64, 3), x)
        # the noisy images are 0.2 bright on average: half of a normal distribution, clipped at 0
        assert float(guarded.model["detector"].first(x).mean()) < 0.05

    def test_sure_answers_that_differ_leave_the_honest_attacker_a_gradient(self) -> None:
        x = fashion(1000)[0][:120]
        sure = nn.Sequential(copy.deepcopy(net()), nn.Linear(10, 10, bias=False)).eval().requires_grad_(False)
        sure[1].weight.copy_(1e5 * torch.eye(10))
        guarded = MagNet(steps=40, temperatures=(10.0,)).fit(sure, x)
        state = guarded.model["detector"]
        state.scale = state.scale * torch.tensor([1e6, 1e6, 1.0])  # the divergence alone is looked at
        apart = sure(x).argmax(1) != sure(state.first(x)).argmax(1)
        assert int(apart.sum()) > 10
        largest = []
        for one in (guarded, Honest(guarded)):
            at = x[apart].clone().requires_grad_()
            answer = one(at)
            (found,) = torch.autograd.grad((answer[:, 10] - answer[:, :10].amax(1)).sum(), at)
            largest.append(found.flatten(1).abs().amax(1))
        assert bool((largest[0] == 0).any())
        assert bool((largest[1] > 0).all())

    def test_refusals(self) -> None:
        wrong: list[dict[str, Any]] = [
            {"steps": 0}, {"noise": -1.0}, {"width": 0}, {"temperatures": 10.0}, {"temperatures": (0.0,)}, {"fpr": 1.0},
        ]  # fmt: skip
        for given_ in wrong:
            with pytest.raises(UsageError, match="MagNet"):
                MagNet(**given_)
        with pytest.raises(ModelError, match=r"images \[B, C, H, W\]"):
            MagNet().fit(linear(16, 3), uniform(100, 16))
        with pytest.raises(ModelError, match=r"needs inputs in \[0, 1\]"):
            MagNet().fit(net(), 255 * fashion(1000)[0][:100])
        with pytest.raises(DataError, match="Give 76 or more"):
            MagNet().fit(net(), fashion()[0])


class TestPCAWhitening:
    def test_the_score_by_hand(self) -> None:
        mix = torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.3, 0.1, 0.02], dtype=torch.float64))
        turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        x = (torch.randn(400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ mix @ turn) + 3
        detector, model = PCAWhitening(tail=0.5, ridge=1e-4), linear(6, 3)
        guarded = detector.fit(model, x)
        taught, held = (part.numpy() for part in held_out(x, 0.05, "PCAWhitening", 0))
        centred = taught - taught.mean(0)
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        axes = axes[3:]  # the last three of six
        axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
        variance = singular[3:] ** 2 / (len(taught) - 1)
        w = (held - taught.mean(0)) @ axes.T / np.sqrt(variance + 1e-4)
        expected = np.log(w.var(1))
        assert np.allclose(detector.scores(guarded, torch.from_numpy(held)), expected)
        assert float(guarded.model["detector"].threshold) == pytest.approx(np.sort(expected)[math.ceil(0.95 * 101) - 1])
        seen = (taught - taught.mean(0)) @ guarded.model["detector"].whiten.numpy()
        assert np.allclose(np.cov(seen.T), np.diag((variance / (variance + 1e-4))[::-1]), atol=1e-9)
        assert torch.equal(guarded(x)[:, :3], model(x))

    def test_pixels_that_never_change_are_no_trouble_and_betray_whoever_touches_them(self) -> None:
        x = torch.cat([uniform(400, 10), torch.zeros(400, 2, dtype=torch.float64)], 1)
        guarded = PCAWhitening(tail=0.2).fit(linear(12, 3), x)
        touched = x.clone()
        touched[:, 10] += 0.05
        assert float((guarded(x).argmax(1) == 3).double().mean()) < 0.1
        assert bool((guarded(touched).argmax(1) == 3).all())

    def test_fewer_examples_than_values_teach_nothing(self) -> None:
        with pytest.raises(
            DataError, match=r"than input values, 784; got 750, three quarters of 1000. Give 1047 or more"
        ):
            PCAWhitening().fit(net(), fashion(1000)[0])
        with pytest.raises(DataError, match="Give 76 or more"):
            PCAWhitening().fit(linear(4, 3), uniform(75, 4))

    def test_settings(self) -> None:
        for name, value in (("tail", 0.0), ("tail", 1.5), ("ridge", 0.0), ("fpr", 0.0)):
            with pytest.raises(UsageError, match=f"{name} of PCAWhitening"):
                PCAWhitening(**{name: value})


@pytest.mark.parametrize("name", NEW)
class TestEach:
    def test_rejected_exactly_above_the_threshold(self, name: str) -> None:
        guarded, x = detectors()[name], fashion(1000)[0]
        detector = guarded.defense
        assert isinstance(detector, Detector)
        with torch.no_grad():
            rejected = torch.cat([guarded(part).argmax(1) == 10 for part in x[300:700].split(100)])
        scores, threshold = detector.scores(guarded, x[300:700], batch=100), guarded.model["detector"].threshold
        clear = (scores - threshold).abs() > 1e-4
        assert torch.equal(rejected[clear], (scores > threshold)[clear])
        assert float(rejected.double().mean()) < detector.fpr + 0.1

    def test_saved_and_loaded(self, name: str) -> None:
        guarded, x = detectors()[name], fashion()[0][:8]
        file = io.BytesIO()
        torch.save(guarded, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), guarded(x))
        other = copy.deepcopy(guarded)
        other.load_state_dict({k: torch.zeros_like(v) for k, v in guarded.state_dict().items()})
        assert not torch.equal(other(x), guarded(x))
        other.load_state_dict(guarded.state_dict())
        assert torch.equal(other(x), guarded(x))

    def test_behind_another_defense(self, name: str) -> None:
        both = BitDepth(4)(detectors()[name])
        assert declared(both).rejects
        assert both(fashion()[0][:3]).shape == (3, 11)

    def test_around_another_detector_one_rejection_is_left(self, name: str) -> None:
        inner, x = detectors()[name], fashion(1000)[0]
        outer = FeatureSqueezing((GaussianBlur(2.0),), fpr=0.3)
        both = outer.fit(inner, x[300:400])
        assert declared(both).rejects
        x = x[:200]
        with torch.no_grad():
            one, two = inner(x), both(x)
        assert two.shape == (200, 11)
        by_outer = outer.scores(both, x) > both.model["detector"].threshold
        by_inner = one.argmax(1) == 10
        assert bool(by_outer.any())
        assert bool(by_inner.any())
        assert torch.equal(two.argmax(1) == 10, by_outer | by_inner)
        assert torch.equal(two[:, :10], one[:, :10])

    def test_before_it_is_fitted(self, name: str) -> None:
        with pytest.raises(UsageError, match=rf"fit\(model, {DETECTORS[name].taught_by}\), which"):
            DETECTORS[name]()(net())

    def test_a_model_in_training_mode_is_refused(self, name: str) -> None:
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))
        unfitted: Any = DETECTORS[name]()
        x, y = fashion(1000)
        given = {"x": x[:100], "y": y[:100], "changed": x[:100]}
        with pytest.raises(UsageError, match="training mode"):
            unfitted.fit(model, *(given[argument] for argument in unfitted.taught_by.split(", ")))


def test_what_ignores_the_detector_is_caught_and_what_knows_it_is_not() -> None:
    guarded, (x, y) = detectors()["pca-whitening"], fashion(1000)
    x, y = x[:48], y[:48]
    right = guarded(x).argmax(1) == y
    x, y = x[right], y[right]
    blunt = mohs.attack(PGD(steps=10), net(), x, y, "linf:0.1")
    assert float(blunt.success.double().mean()) > 0.9
    assert float((guarded(blunt.x).argmax(1) == 10).double().mean()) > 0.9
    knowing = mohs.attack(
        APGD(steps=50, objective=margin), guarded, x, y, "linf:0.1", guide=declared(guarded).guide, reject=10
    )
    assert float(knowing.success.double().mean()) > 0.8
    assert bool((guarded(knowing.x[knowing.success]).argmax(1) != 10).all())


class Opaque(nn.Module):
    """A model that shows neither layers nor declarations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["hidden"] = model

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["hidden"](x)


def test_an_evaluation_attacks_it_declared_and_withheld() -> None:
    guarded, (x, y) = detectors()["feature-squeezing"], fashion(1000)
    data = (x[:12], y[:12])
    plan = Plan("short", (PlanStep.make("APGD", {"steps": 40, "objective": "margin"}),))
    said = mohs.evaluate(guarded, data, "linf:0.1", plan=plan, control=0)
    hidden = mohs.evaluate(Opaque(guarded).eval(), data, "linf:0.1", plan=plan, control=0, adaptive="blind", reject=10)
    right = float((guarded(data[0]).argmax(1) == data[1]).double().mean())
    for record in (said, hidden):
        assert record.header.subject.reject == 10
        assert record.clean_accuracy == pytest.approx(right)
        assert record.robust_accuracy <= 0.2
    assert float((net()(data[0]).argmax(1) == data[1]).double().mean()) >= right
