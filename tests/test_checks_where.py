"""The layer that zeroes, breaks or randomises is named; where none shows it, that is said, and no model raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checked_models import Wrapped, found, images, linear
from planted_models import Hidden, Layer, coarse, dead
from torch import Tensor, nn

import mohs
from mohs.defenses._backward import changed
from mohs.evaluation.checks import _where
from mohs.threat import Threat

OWN = "in the model's own forward, outside its layers"


def chain(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts).eval()


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def bent(x: Tensor) -> Tensor:
    """The identity, with a gradient of random signs."""
    return changed(x, lambda g: g.abs() * torch.randn_like(g).sign())


class Branch(nn.Module):
    """A block with noise between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear()

    def forward(self, x: Tensor) -> Tensor:
        return noisy(self.net(x))


class TestZeroGradient:
    @pytest.mark.parametrize(
        ("build", "named"),
        [
            (lambda: chain(Layer(coarse), linear()), "lost in layer 0 (Layer)"),
            (lambda: chain(nn.Flatten(), Layer(dead), nn.Linear(64, 5)), "lost in layer 1 (Layer)"),
            (lambda: chain(Layer(coarse), linear(), Layer(dead)), "lost in layers 2 (Layer), 0 (Layer), the last first"),
            (lambda: chain(Layer(lambda x: (x > 0.5).float() * x.detach() + 0 * x), linear()), "lost in layer 0 (Layer)"),
            (lambda: Wrapped(before=coarse), OWN),
        ],
    )  # fmt: skip
    def test_layers_are_named(self, build: Callable[[], nn.Module], named: str) -> None:
        finding = found(build())["zero-gradient"]
        assert finding.severity == "block"
        assert finding.saw.endswith(named)

    def test_only_rows_that_lost_it_are_looked_at(self) -> None:
        def half(x: Tensor) -> Tensor:
            dark = (x.flatten(1).mean(1) < 0.5).view(-1, 1, 1, 1)
            return torch.where(dark, x.round(), x)

        finding = found(chain(Layer(half), linear()))["zero-gradient"]
        assert finding.severity == "warn"
        assert finding.saw.endswith("lost in layer 0 (Layer)")

    @pytest.mark.parametrize("batch", [None, 16])
    def test_what_cannot_be_taken_apart_is_not_named(self, batch: int | None) -> None:
        def picky(x: Tensor) -> Tensor:
            if len(x) in (2, 4):
                raise ValueError("not so few, please")
            return x

        for model in (
            Hidden(chain(Layer(coarse), linear())).eval(),
            Wrapped(before=picky, net=chain(Layer(coarse), linear())),
        ):
            finding = found(model, batch=batch)["zero-gradient"]
            assert finding.severity == "block"
            assert finding.saw.endswith("a further 0%")


class TestPromise:
    def test_the_layer_is_named(self) -> None:
        finding = found(chain(Layer(lambda x: 1.0 * x), nn.Flatten(), Layer(bent), nn.Linear(64, 5)))[
            "gradient-promise"
        ]
        assert finding.severity == "warn"
        assert finding.saw.endswith("in layer 2 (Layer)")

    def test_layers_that_break_it_together(self) -> None:
        finding = found(chain(Layer(bent), nn.Flatten(), Layer(bent), nn.Linear(64, 5)))["gradient-promise"]
        assert finding.saw.endswith("in layers 0 (Layer), 2 (Layer)")

    def test_no_layer_shows_it(self) -> None:
        finding = found(Wrapped(before=bent))["gradient-promise"]
        assert finding.severity == "warn"
        assert finding.saw.endswith("inputs)")


class TestRandomness:
    @pytest.mark.parametrize(
        ("build", "named"),
        [
            (lambda: chain(Layer(noisy), linear()), "in layer 0 (Layer)"),
            (lambda: chain(nn.Flatten(), Layer(noisy), nn.Linear(64, 5), Layer(noisy)), "in layer 1 (Layer)"),
            (lambda: chain(nn.Flatten(), nn.Sequential(nn.Linear(64, 5), Layer(noisy))), "in layer 1.1 (Layer)"),
            (lambda: chain(Branch()), "in the forward of layer 0 (Branch)"),
            (lambda: Wrapped(after=noisy), OWN),
            (lambda: Wrapped(before=noisy), OWN),
        ],
    )  # fmt: skip
    def test_the_first_that_differs_is_named(self, build: Callable[[], nn.Module], named: str) -> None:
        for threat in ("linf:0.1", Threat(mohs.Linf(0.1), draws=20)):
            finding = found(build(), threat)["randomness"]
            assert finding.severity != "ok"
            assert finding.saw.endswith(f"the first difference arises {named}")

    def test_noise_that_sleeps_on_clean_inputs(self) -> None:
        def sleeper(x: Tensor) -> Tensor:
            clean = (x == (x * 255).round() / 255).flatten(1).all(1)
            return torch.where(clean.view(-1, 1, 1, 1), x, noisy(x))

        finding = found(chain(Layer(sleeper), linear()), x=(images() * 255).round() / 255)["randomness"]
        assert finding.saw.endswith("in layer 0 (Layer)")

    def test_nothing_is_named_where_nothing_differs_and_hooks_go(self) -> None:
        model = chain(Layer(coarse), linear())
        assert _where.differing(model, images(4)) == ""
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_model_that_takes_no_two_rows_is_found_random_all_the_same(self) -> None:
        def picky(x: Tensor) -> Tensor:
            if len(x) == 2:
                raise ValueError("not two, please")
            return noisy(x)

        assert found(Wrapped(before=picky))["randomness"].saw.endswith("answers flip")
