"""Models whose answers hang on rounding, or on draws from a seed of their own."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checked_models import Wrapped, conv, found, images, linear, norm
from planted_models import Hidden
from torch import Tensor, nn

import mohs
from mohs.models import BlackBox


def large(z: Tensor) -> Tensor:
    return (z + 1e7) - 1e7


class TestPrecision:
    def test_differences_of_large_numbers(self) -> None:
        finding = found(Wrapped(after=large))["precision"]
        assert finding.severity == "warn"
        assert "answers in float32 are others in float64" in finding.saw

    def test_half_precision_weights(self) -> None:
        x = images().half()
        near = Wrapped(after=lambda z: 1e-2 * z + 1).half()
        assert found(near, x=x, y=torch.zeros(96).long())["precision"].severity == "warn"

    def test_one_answer_of_many_is_a_remark(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mohs.evaluation.checks._precision.MOST", 1 / 64)

        def one(z: Tensor) -> Tensor:
            return z if z.dtype == torch.float64 or len(z) < 64 else torch.cat([-z[:1], z[1:]])

        finding = found(Wrapped(after=one))["precision"]
        assert (finding.severity, finding.saw[:8]) == ("info", "1 of 64 ")

    @pytest.mark.parametrize("make", [linear, conv, norm, lambda: mohs.models.load("bundled:fashion-pgd")])
    def test_healthy(self, make: Callable[[], nn.Module]) -> None:
        model = make()
        dtypes = [p.dtype for p in model.parameters()]
        bundled = any(isinstance(m, nn.Linear) and m.in_features > 300 for m in model.modules())
        x = mohs.data.load("bundled:fashion-mnist", n=64).x if bundled else images()
        assert found(model, x=x)["precision"].severity == "ok"
        assert [p.dtype for p in model.parameters()] == dtypes

    def test_a_model_in_double_needs_no_copy(self) -> None:
        finding = found(linear().double(), x=images().double(), y=torch.zeros(96).long())["precision"]
        assert (finding.severity, finding.saw) == ("ok", "the model computes in float64")

    @pytest.mark.parametrize(
        "make",
        [
            lambda: BlackBox(lambda x: x.reshape(len(x), -1)[:, :5]),
            lambda: Wrapped(after=lambda z: z + torch.randn_like(z)),
            lambda: Hidden(linear()).eval(),
        ],
    )
    def test_not_where_no_copy_answers(self, make: Callable[[], nn.Module]) -> None:
        finding = found(make())["precision"]
        assert finding.severity == "info"
        assert finding.saw.startswith("not tested")


def reseeding(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x + 0.1 * torch.randn_like(x)


def wasteful(x: Tensor) -> Tensor:
    torch.rand(1)
    return x


def private(x: Tensor) -> Tensor:
    return x + 0.1 * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0))


def with_python(x: Tensor) -> Tensor:
    random.seed(1)
    return x * random.random()


def with_numpy(x: Tensor) -> Tensor:
    np.random.seed(1)  # noqa: NPY002
    return x * float(np.random.rand())  # noqa: NPY002


class TestFrozenSeed:
    @pytest.mark.parametrize(
        ("before", "severity", "said"),
        [
            (reseeding, "warn", "of torch in one and the same state"),
            (with_python, "warn", "of Python in one and the same state"),
            (with_numpy, "warn", "of numpy in one and the same state"),
            (wasteful, "warn", "draws from the global generator of torch"),
            (private, "info", "draws (rand) from a generator of the model's own"),
        ],
    )
    def test_planted(self, before: Callable[[Tensor], Tensor], severity: str, said: str) -> None:
        findings = found(Wrapped(before=before))
        assert findings["randomness"].severity == "ok"
        assert findings["frozen-seed"].severity == severity
        assert said in findings["frozen-seed"].saw

    @pytest.mark.parametrize("batch", [None, 64])
    def test_layers_that_draw_in_training_only(self, batch: int | None) -> None:
        attention = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 32, dropout=0.5, batch_first=True),
                                  nn.Flatten(), nn.Dropout(), nn.Linear(64, 5)).eval()  # fmt: skip
        for model in (norm(), attention):
            assert found(model, batch=batch)["frozen-seed"].severity == "ok"

    def test_open_chance_is_the_business_of_another_check(self) -> None:
        finding = found(Wrapped(after=lambda z: z + torch.randn_like(z)))["frozen-seed"]
        assert finding.saw.startswith("not tested")

    def test_a_model_that_takes_no_four_rows(self) -> None:
        def picky(x: Tensor) -> Tensor:
            if len(x) == 4:
                raise ValueError("not four, please")
            return x

        assert found(Wrapped(before=picky))["frozen-seed"].severity == "info"
