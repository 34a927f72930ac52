"""Models that must trip a check of the doctor: their mode, their neighbours, chance, gradients and logits."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from checked_models import Cut, Functional, Needle, Rounding, Wrapped, conv, found, images, linear, norm, severities
from torch import Tensor, nn

import mohs
from mohs.threat import Access, Threat


class TestTrainingMode:
    def test_batch_norm_and_dropout(self) -> None:
        finding = found(norm().train())["training-mode"]
        assert finding.severity == "block"
        assert "1 (BatchNorm2d), 3 (Dropout)" in finding.saw

    def test_the_other_checks_speak_of_eval_mode(self) -> None:
        assert severities(found(norm().train())) == {"training-mode": "block"}

    def test_one_layer_only(self) -> None:
        model = norm()
        model[3].train()
        assert found(model)["training-mode"].severity == "block"

    def test_dropout_that_no_layer_shows(self) -> None:
        assert found(Functional().train())["training-mode"].severity == "block"

    def test_a_mode_that_changes_nothing_is_a_remark(self) -> None:
        assert severities(found(conv().train())) == {"training-mode": "info"}


class TestBatchCoupling:
    PLANTED = {
        "batch mean": lambda: Wrapped(after=lambda z: z - z.mean(0)),
        "batch mean of the input": lambda: Wrapped(before=lambda x: x - x.mean(0)),
        "statistics of the batch in eval mode": lambda: norm(track=False),
        "neighbour": lambda: Wrapped(after=lambda z: z + 0.1 * z.roll(1, 0)),
        "position in the batch": lambda: Wrapped(
            after=lambda z: z + 0.1 * torch.arange(len(z)).view(-1, 1) * torch.ones(5)
        ),
        "batch size": lambda: Wrapped(after=lambda z: z * (1 + 0.01 * len(z))),
    }

    @pytest.mark.parametrize("name", PLANTED)
    def test_planted(self, name: str) -> None:
        assert found(self.PLANTED[name]())["batch-coupling"].severity == "block"

    @pytest.mark.parametrize("name", ["batch mean", "neighbour", "statistics of the batch in eval mode"])
    def test_planted_at_a_fixed_batch(self, name: str) -> None:
        assert found(self.PLANTED[name](), batch=32)["batch-coupling"].severity == "block"

    def test_chance_is_not_mistaken_for_it(self) -> None:
        finding = found(Wrapped(after=lambda z: z + 0.1 * torch.randn_like(z)))["batch-coupling"]
        assert finding.severity == "info"
        assert "not tested" in finding.saw


class TestOutputType:
    def test_softmax(self) -> None:
        assert severities(found(Wrapped(after=lambda z: z.softmax(1)))) == {"output-type": "warn"}

    def test_saturated_softmax_says_so(self) -> None:
        findings = found(Wrapped(after=lambda z: (z * 1000).softmax(1)))
        assert "hold an exact 1" in findings["output-type"].saw
        assert findings["output-type"].severity == "warn"
        assert findings["zero-gradient"].severity in ("warn", "block")

    def test_sigmoid_of_a_single_logit(self) -> None:
        x = images()
        finding = found(Wrapped(after=lambda z: z[:, 0].sigmoid()), x=x, y=torch.arange(96) % 2)["output-type"]
        assert finding.severity == "warn"
        assert "sigmoid" in finding.means

    def test_rows_that_sum_to_one_but_leave_the_interval_are_logits(self) -> None:
        shifted = Wrapped(after=lambda z: 9 * (z - z.mean(1, keepdim=True)) + 0.2)
        assert found(shifted)["output-type"].severity == "ok"


class TestRandomness:
    def test_noise_that_flips_answers_blocks(self) -> None:
        finding = found(Wrapped(after=lambda z: z + torch.randn_like(z)))["randomness"]
        assert finding.severity == "block"
        assert "draws=20" in finding.remedy

    def test_noise_that_flips_none_warns(self) -> None:
        ones = torch.eye(5)[0] * 10
        assert found(Wrapped(after=lambda z: z + ones + 1e-3 * torch.randn_like(z)))["randomness"].severity == "warn"

    def test_it_is_a_remark_where_the_threat_scores_draws(self) -> None:
        threat = Threat(mohs.Linf(0.1), draws=20)
        assert found(Wrapped(before=lambda x: x + torch.randn_like(x)), threat)["randomness"].severity == "info"

    def test_noise_that_sleeps_on_clean_inputs(self) -> None:
        def sleeper(x: Tensor) -> Tensor:
            grey = (x * 255).round() / 255
            clean = (x == grey).flatten(1).all(1)
            return torch.where(clean.view(-1, 1, 1, 1), x, x + torch.randn_like(x))

        x = (images() * 255).round() / 255
        finding = found(Wrapped(before=sleeper), x=x)["randomness"]
        assert finding.severity == "block"
        assert "only inputs with noise show it" in finding.saw

    def test_numpy_and_python_chance(self) -> None:
        assert found(Wrapped(after=lambda z: z + float(np.random.rand())))["randomness"].severity != "ok"  # noqa: NPY002
        assert found(Wrapped(after=lambda z: z * (1 + random.random())))["randomness"].severity != "ok"

    def test_a_state_that_counts_calls(self) -> None:
        calls = []

        def grow(z: Tensor) -> Tensor:
            calls.append(1)
            return z * (1 + 0.1 * len(calls))

        assert found(Wrapped(after=grow))["randomness"].severity != "ok"


class TestNoGradient:
    def test_detached_between_layers(self) -> None:
        findings = found(Cut())
        assert findings["no-gradient"].severity == "block"
        assert "before layer second" in findings["no-gradient"].saw
        assert "not tested" in findings["zero-gradient"].saw

    def test_a_layer_that_leaves_torch_is_named(self) -> None:
        findings = found(nn.Sequential(Rounding(), linear()).eval())
        assert "in layer 0" in findings["no-gradient"].saw

    def test_frozen_parameters(self) -> None:
        findings = found(Cut().requires_grad_(False))
        assert findings["no-gradient"].severity == "block"
        assert severities(found(conv().requires_grad_(False))) == {}

    def test_answers_cut_off_at_the_end(self) -> None:
        assert "after layer" in found(Wrapped(after=lambda z: z.detach()))["no-gradient"].saw

    def test_no_loss_where_the_threat_grants_no_gradient(self) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.LABEL)
        assert severities(found(Cut(), threat)) == {
            "no-gradient": "info", "zero-gradient": "info", "sparse-gradient": "info", "imbalance": "info",
            "gradient-promise": "info",
        }  # fmt: skip

    def test_at_a_fixed_batch(self) -> None:
        assert found(Cut(), batch=16)["no-gradient"].severity == "block"


class TestZeroGradient:
    def test_rounded_input(self) -> None:
        finding = found(Wrapped(before=lambda x: (x * 8).round() / 8))["zero-gradient"]
        assert finding.severity == "block"
        assert "exactly zero for 100%" in finding.saw

    def test_some_rows(self) -> None:
        def half(x: Tensor) -> Tensor:
            dark = (x.flatten(1).mean(1) < 0.5).view(-1, 1, 1, 1)
            return torch.where(dark, x.round(), x)

        assert found(Wrapped(before=half))["zero-gradient"].severity == "warn"

    def test_nan(self) -> None:
        finding = found(Wrapped(before=Needle.apply))["zero-gradient"]
        assert finding.severity == "block"
        assert "nan or inf" in finding.saw

    def test_underflow_of_the_cross_entropy_is_told_from_a_true_zero(self) -> None:
        finding = found(Wrapped(after=lambda z: z * 1e5))["zero-gradient"]
        assert finding.severity == "info"
        assert "exactly zero for 0%" in finding.saw

    def test_low_access(self) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.SCORE)
        assert found(Wrapped(before=torch.round), threat)["zero-gradient"].severity == "info"


class TestSaturation:
    def test_logits_times_a_thousand(self) -> None:
        finding = found(Wrapped(after=lambda z: z * 1000))["saturated-logits"]
        assert finding.severity == "warn"

    def test_confident_but_sound(self) -> None:
        assert found(Wrapped(after=lambda z: z * 30))["saturated-logits"].severity == "ok"


class TestFewClasses:
    @pytest.mark.parametrize(("classes", "severity"), [(2, "info"), (3, "info"), (4, "ok")])
    def test_planted(self, classes: int, severity: str) -> None:
        assert found(linear(classes))["few-classes"].severity == severity
