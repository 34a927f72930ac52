"""Data and threats that must trip a check of the doctor: box, radius and clean accuracy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checked_models import found, images, linear
from torch import Tensor


class TestBox:
    @pytest.mark.parametrize(
        ("x", "threat", "severity", "remedy"),
        [
            (lambda: images() * 255, "linf:8/255", "block", "divide by 255"),
            (lambda: (images() * 255).round(), "linf:8/255", "block", "divide by 255"),
            (lambda: (images() - 0.5) / 0.29, "linf:8/255", "block", "look normalised"),
            (lambda: images() * 2 + 5, "linf:0.1", "block", "State the box"),
            (lambda: images(), "linf:8 in [0, 255]", "block", "linf:8/255"),
            (lambda: images() * 0.3, "linf:0.1", "warn", "scale"),
            (lambda: (images() - 0.5) / 0.29, "linf:0.1 in [-3, 3]", "warn", "normalised"),
            (lambda: (images() - 0.5) / 0.29, "linf:0.1 in [-inf, inf]", "info", "normalised"),
            (lambda: images() * 255, "linf:8 in [0, 255]", "ok", ""),
            (lambda: images() * 4, "linf:8 in [-inf, inf]", "ok", ""),
            (lambda: images() * 2 - 1, "linf:0.1 in [-1, 1]", "ok", ""),
        ],
    )
    def test_planted(self, x: Callable[[], Tensor], threat: str, severity: str, remedy: str) -> None:
        finding = found(linear(), threat, x=x())["input-box"]
        assert (finding.severity, remedy in finding.remedy) == (severity, True)

    def test_one_bad_input_of_many_is_seen(self) -> None:
        x = images(1000)
        x[777, 0, 3, 3] = 1.5
        assert found(linear(), x=x)["input-box"].saw.startswith("1 of 1000 inputs leave the box")


class TestRadius:
    @pytest.mark.parametrize(
        ("threat", "severity"),
        [
            ("linf:8", "warn"),
            ("linf:0.51", "warn"),
            ("l2:8", "warn"),
            ("linf:0", "warn"),
            ("linf:0.3", "ok"),
            ("l2:1", "ok"),
            ("l2:inf", "ok"),
            ("l0:3", "ok"),
            ("linf:8 in [0, 255]", "ok"),
        ],
    )
    def test_planted(self, threat: str, severity: str) -> None:
        x = images() * 255 if "255" in threat else images()
        assert found(linear(), threat, x=x)["radius"].severity == severity


class TestCleanAccuracy:
    def labels(self, right: float) -> tuple[Tensor, Tensor]:
        x = images(256)
        y = linear()(x).argmax(1)
        wrong = torch.arange(256) >= round(256 * right)
        return x, torch.where(wrong, (y + 1) % 5, y)

    @pytest.mark.parametrize(
        ("right", "stated", "severity"),
        [(1.0, 1.0, "ok"), (0.9, 0.9, "ok"), (0.9, 0.88, "ok"), (0.9, 0.945, "warn"), (0.8, 0.95, "block"),
         (1.0, 0.9, "block"), (0.1, None, "warn"), (0.5, None, "ok")],
    )  # fmt: skip
    def test_planted(self, right: float, stated: float | None, severity: str) -> None:
        x, y = self.labels(right)
        assert found(linear(), x=x, y=y, stated_accuracy=stated)["clean-accuracy"].severity == severity

    def test_few_examples_contradict_nothing(self) -> None:
        assert found(linear(), x=images(3), stated_accuracy=0.5)["clean-accuracy"].severity == "ok"
