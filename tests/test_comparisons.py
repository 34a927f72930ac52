"""Straight through comparisons: the answers stay, and truth values get the slope of a soft step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.evaluation import tactics
from mohs.gradients import Straight


class Calls(nn.Module):
    """A model that shows no layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def soft(gap: Tensor) -> Tensor:
    return torch.sigmoid(gap / (0.2 * gap.detach().std(correction=0)))


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "cast": (lambda x: (x > 0.5).to(x.dtype) * 3, lambda x: 3 * soft(x - 0.5)),
    "cast by name": (lambda x: (x >= 0.5).double(), lambda x: soft(x - 0.5)),
    "below": (lambda x: (x < 0.3).double(), lambda x: soft(0.3 - x)),
    "number first": (lambda x: (x < 0.3).double(), lambda x: soft(0.3 - x)),
    "function": (lambda x: torch.le(x, 0.3).double(), lambda x: soft(0.3 - x)),
    "mask": (lambda x: x * (x > 0.4), lambda x: x * (x.detach() > 0.4) + x.detach() * soft(x - 0.4)),
    "one less": (lambda x: 1 - (x > 0.4).double(), lambda x: 1 - soft(x - 0.4)),
    "not": (lambda x: (~(x > 0.4)).double(), lambda x: 1 - soft(x - 0.4)),
    "where": (lambda x: torch.where(x > 0.4, x.new_tensor(2.0), -1.0), lambda x: 2 * soft(x - 0.4) - (1 - soft(x - 0.4))),
    "fill": (lambda x: x.masked_fill(x > 0.4, 0.9), lambda x: (1 - soft(x - 0.4)) * x + soft(x - 0.4) * 0.9),
    "moved": (
        lambda x: (x.unsqueeze(2) > torch.tensor([0.2, 0.7])).flatten(1).double(),
        lambda x: soft(x.unsqueeze(2) - torch.tensor([0.2, 0.7])).flatten(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_values_stay_and_slopes_are_those_of_the_soft_step(form: str, seed: int) -> None:
    hard, likewise = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 4, dtype=torch.float64, generator=generator).requires_grad_(True)
    guide = Straight(Calls(hard).eval(), compare=True)
    value = guide(x)
    assert torch.equal(value, hard(x))
    pull = torch.rand(value.shape, dtype=torch.float64, generator=generator)
    (got,) = torch.autograd.grad((value * pull).sum(), x)
    (wanted,) = torch.autograd.grad((likewise(x) * pull).sum(), x)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_an_infinite_alternative_leaves_the_gradient_as_it_is() -> None:
    model = Calls(lambda x: x.masked_fill(x > 0.5, -torch.inf).softmax(1)).eval()
    x = torch.tensor([[0.1, 0.3, 0.9]], requires_grad=True)
    (got,) = torch.autograd.grad(Straight(model, compare=True)(x)[0, 0], x)
    (plain,) = torch.autograd.grad(model(x)[0, 0], x)
    assert torch.equal(got, plain)


def test_what_controls_the_flow_of_a_program_is_left_alone() -> None:
    model = Calls(lambda x: x * 2 if bool((x > 0.5).any()) and (x > 0.2).sum() > 1 else x[(x > 0)]).eval()
    x = torch.tensor([[0.6, 0.3]], requires_grad=True)
    assert torch.equal(Straight(model, compare=True)(x), x * 2)


def test_a_code_of_thresholds_falls_without_its_declaration() -> None:
    """The tactic is found by itself where comparisons hide the gradient of a model whose code is unknown."""
    data = mohs.data.load("bundled:fashion-mnist", n=40)
    net = mohs.models.load("bundled:fashion-natural")
    thermometer = defenses.Thermometer(8)
    hidden = Calls(lambda x: net(thermometer.transform(x).mean(1, keepdim=True))).eval()
    tried = tactics.trial(
        tactics.Tactic("c", lambda m: Straight(m, compare=True)), hidden, data.x, data.y, mohs.Threat.parse("linf:0.15"), 0, 64
    )  # fmt: skip
    assert tried.broken >= 32
    record = mohs.evaluate(hidden, data, "linf:0.15", plan="quick", control=0, adaptive="blind")
    chosen = [t.name for t in record.header.tactics if t.chosen]
    assert chosen == ["straight through comparisons"]
    assert record.robust_accuracy <= 0.1
