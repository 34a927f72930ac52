"""The LID detector: the estimate, the fit, the threshold, and how it falls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs.data import load
from mohs.defenses import LID, BitDepth, declared
from mohs.defenses._detector import threshold_at
from mohs.defenses.lid import lid
from mohs.errors import DataError, UsageError


class TestEstimate:
    @pytest.mark.parametrize("dimension", [1, 2, 5])
    def test_uniform_in_a_ball(self, dimension: int) -> None:
        # distances from the centre of a ball have the distribution r^d, whose LID is d
        generator = torch.Generator().manual_seed(dimension)
        x = torch.randn(4000, dimension, generator=generator, dtype=torch.float64)
        radius = torch.rand(4000, 1, generator=generator, dtype=torch.float64) ** (1 / dimension)
        points = x / x.norm(dim=1, keepdim=True) * radius
        found = float(lid(torch.zeros(1, dimension, dtype=torch.float64), points, 4000))
        assert found == pytest.approx(dimension, rel=5 / math.sqrt(4000))

    def test_by_hand_and_independent_of_scale(self) -> None:
        points = torch.tensor([[1.0], [2.0], [4.0], [50.0]])
        # -1 / mean(log 1/4, log 2/4, log 1)
        expected = 3 / (math.log(4) + math.log(2))
        assert float(lid(torch.zeros(1, 1), points, 3)) == pytest.approx(expected)
        assert float(lid(torch.zeros(1, 1), 7 * points, 3)) == pytest.approx(expected)

    def test_gradient(self) -> None:
        points = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: lid(x, points, 5), x)


def test_the_threshold_is_an_order_statistic_that_keeps_its_rate() -> None:
    draws = torch.rand(2000, 40, generator=torch.Generator().manual_seed(0))
    fresh = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    above = torch.stack([fresh[i] > threshold_at(draws[i], 0.1) for i in range(2000)]).double().mean()
    assert float(above) == pytest.approx(4 / 41, abs=0.02)
    assert threshold_at(torch.zeros(5), 0.05) == math.inf, "too few to promise so small a rate"


@pytest.fixture(scope="module")
def fashion() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    net, data = mohs.models.load("bundled:fashion-natural"), load("bundled:fashion-mnist", n=700)
    far = mohs.attack(mohs.attacks.PGD(steps=20, step_size=0.02), net, data.x, data.y, "linf:0.15")
    return net, data.x, data.y, far.x, far.success


class TestDetector:
    def test_it_tells_what_it_was_fitted_on_and_keeps_its_rate(
        self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        net, x, _, changed, broken = fashion
        detector = LID()
        guarded = detector.fit(net, x[:500], changed[:500], broken[:500])
        clean = detector.scores(guarded, x[500:])
        other = detector.scores(guarded, changed[500:][broken[500:]])
        auc = float((other.unsqueeze(1) > clean).double().mean())
        assert auc > 0.7, auc
        logits = guarded(x[500:])
        threshold = guarded.model["detector"].threshold
        assert torch.equal(logits.argmax(1) == 10, clean > threshold), "rejected exactly above the threshold"
        assert torch.equal(logits[:, :10], net(x[500:])), "the classifier's logits are its own"
        assert float((clean > threshold).double().mean()) < 0.15
        assert declared(guarded).rejects

    def test_it_falls_to_an_attack_on_both(self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
        net, x, y, changed, broken = fashion
        guarded = LID().fit(net, x[:500], changed[:500], broken[:500])
        record = mohs.evaluate(guarded, (x[500:600], y[500:600]), "linf:0.15", plan="quick", control=0)
        assert record.header.subject.reject == 10
        assert record.clean_accuracy > 0.7
        assert record.robust_accuracy <= 0.03

    def test_the_same_seed_the_same_detector(self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
        net, x, _, changed, broken = fashion
        one, two, other = (
            LID(k=5, references=40).fit(net, x[:100], changed[:100], broken[:100], seed=s) for s in (0, 0, 1)
        )
        assert torch.equal(one(x[:8]), two(x[:8]))
        assert not torch.equal(one(x[:8]), other(x[:8]))

    def test_behind_another_defense(self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
        net, x, _, changed, broken = fashion
        both = BitDepth(4)(LID(k=5, references=40).fit(net, x[:100], changed[:100], broken[:100]))
        assert declared(both).rejects
        assert both(x[:3]).shape == (3, 11)


class TestRefusals:
    def test_before_it_is_fitted(self) -> None:
        with pytest.raises(UsageError, match="fit"):
            LID()(nn.Linear(2, 2))

    def test_data(self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
        net, x, _, changed, _ = fashion
        with pytest.raises(DataError, match="one changed input"):
            LID().fit(net, x, changed[:3])
        with pytest.raises(DataError, match="further examples"):
            LID().fit(net, x[:110], changed[:110])
        with pytest.raises(DataError, match="None of the"):
            LID(k=5, references=40).fit(net, x[:80], changed[:80], torch.zeros(80, dtype=torch.bool))
        with pytest.raises(DataError, match=r"broken must be bool.*got torch\.int64"):
            LID(k=5, references=40).fit(net, x[:80], changed[:80], torch.ones(80, dtype=torch.int64))

    def test_a_model_in_training_mode_is_left_as_it_is(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
        with pytest.raises(UsageError, match=r"training mode \(1: BatchNorm1d\)"):
            LID(k=3, references=10).fit(model, x, x + 0.1)
        assert not bool(model[1].running_mean.any())

    def test_layers_and_settings(self, fashion: tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]) -> None:
        net, x, _, changed, _ = fashion
        with pytest.raises(UsageError, match="no layer 'nowhere'"):
            LID(layers=("nowhere",)).fit(net, x, changed)
        for settings in ({"k": 1}, {"references": 3}, {"fpr": 0.0}, {"fpr": 1.0}, {"layers": "net"}):
            with pytest.raises(UsageError):
                LID(**settings)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="fit returned"):
            LID().scores(net, x)
