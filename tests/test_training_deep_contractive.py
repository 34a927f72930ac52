"""The penalty of deep contractive networks beside Jacobians that are worked out entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_formulas import Weights, agrees, batch, net, probabilities
from training_problem import CLASSES, FEATURES, mixed_net, never, run, same

from mohs.attacks import REGISTRY
from mohs.defenses.training import Context, DeepContractive, Natural
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import ModelError, UsageError
from mohs.models import nets

EXACT = DeepContractive(projections=None)


def context(seed: int = 0) -> Context:
    return Context(never, 0.0, 0.0, seed=seed)


def by_jacobian(steps: list[nn.Module], x: Tensor) -> list[float]:
    """The mean squared Frobenius norm of each step's Jacobian, row by row."""
    found = []
    for step in steps:
        rows = [torch.autograd.functional.jacobian(step, row.unsqueeze(0)) for row in x]
        found.append(float(torch.stack([j.square().sum() for j in rows]).mean()))
        x = step(x).detach()
    return found


def by_hand(penalty: float) -> Callable[[Weights], float]:
    """The formula for a net of two linear layers with a tanh between them."""
    x, _, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        right = probabilities(w, x)[np.arange(len(y)), y]
        slopes = 1 - np.tanh(x @ w[0].T + w[1]) ** 2
        first = ((slopes**2) @ (w[0] ** 2).sum(1)).mean()
        return float(-np.log(right).mean() + penalty * (first + (w[2] ** 2).sum()))

    return f


@pytest.mark.parametrize("penalty", [0.1, 2.0])
def test_value_and_gradient_are_the_formulas(penalty: float) -> None:
    assert agrees(replace(EXACT, penalty=penalty), context(), by_hand(penalty))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 6), came=st.integers(1, 7), went=st.integers(2, 6), more=st.integers(0, 3))
def test_as_many_directions_as_outputs_are_exact(rows: int, came: int, went: int, more: int) -> None:
    layer = nn.Linear(came, went).double()
    x = torch.rand(rows, came, dtype=torch.float64)
    truth = layer.weight.detach().square().sum()
    for projections in (went + more, None):
        (square,) = DeepContractive(projections=projections).squares(nn.Sequential(layer), x, seed=went)[1]
        assert torch.allclose(square.detach(), truth, rtol=1e-9)


@pytest.mark.parametrize("projections", [1, 2, 4])
def test_fewer_are_right_on_average(projections: int) -> None:
    layer = nn.Linear(4, 5).double()
    layer.weight.data[0] *= 20  # most of the norm in one output
    x = torch.rand(8000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (square,) = DeepContractive(projections=projections).squares(nn.Sequential(layer), x, seed=1)[1]
    truth = float(layer.weight.detach().square().sum())
    # a share of one of five directions has mean 1/5 and standard deviation below 1/5
    assert square.item() == pytest.approx(truth, rel=5 / 8000**0.5)
    assert square.item() != pytest.approx(truth, rel=1e-5)


def test_layers_of_a_convolutional_net_and_what_follows_them() -> None:
    model = nn.Sequential(
        nn.Softplus(), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(3, 4),
    ).double()  # fmt: skip
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, squares = EXACT.squares(model, x, seed=0)
    assert torch.equal(logits, model(x))
    expected = by_jacobian([model[:4], model[4:7], model[7:]], x)
    assert [s.item() for s in squares] == pytest.approx(expected, rel=1e-9)


def test_a_block_counts_as_one_layer() -> None:
    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    model = nn.Sequential(block, nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.rand(4, 4, dtype=torch.float64)
    squares = EXACT.squares(model, x, seed=0)[1]
    assert [s.item() for s in squares] == pytest.approx(by_jacobian([model[:2], model[2:]], x), rel=1e-9)


def test_with_batch_statistics_it_is_the_norm_of_the_whole_batch_on_average() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=0.0)).double()
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    truth = float(torch.autograd.functional.jacobian(model, x).square().sum()) / len(x)
    for projections in (1, None):
        objective = DeepContractive(projections=projections)
        drawn = torch.stack([objective.squares(model, x, seed=s)[1][0].detach() for s in range(600)])
        assert abs(float(drawn.mean()) - truth) < 5 * float(drawn.std()) / 600**0.5


def test_one_logit_is_trained_as_two() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    loss = EXACT.loss(model, torch.zeros(2, 3), torch.tensor([0, 1]), context())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_stays_behind() -> None:
    model, (x, _, y) = net(), batch()
    EXACT.loss(model, x, y, context())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not x.requires_grad
    first, again, other = (DeepContractive(1.0).loss(model, x, y, context(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_penalty_zero_is_natural_training_bit_for_bit(tmp_path: Path) -> None:
    def trained(objective: Any, out: str) -> nn.Module:
        return run(tmp_path, objective, how=never, model=mixed_net(), out=out).model

    natural = trained(Natural(), "a")
    assert same(trained(DeepContractive(0.0), "b"), natural)
    assert not same(trained(DeepContractive(0.1), "c"), natural)


def test_training_with_it_contracts(tmp_path: Path) -> None:
    def stretched(penalty: float) -> float:
        model = run(tmp_path, DeepContractive(penalty), how=never, model=mixed_net(), out=f"{penalty}", epochs=4).model
        return sum(s.item() for s in EXACT.squares(model, torch.rand(20, FEATURES), seed=0)[1])

    assert stretched(0.1) < 0.5 * stretched(0.0)


def test_what_it_cannot_look_at_is_refused() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x, y = torch.rand(2, CLASSES), torch.tensor([0, 1])
    with pytest.raises(ModelError, match=r"layers of an nn\.Sequential.*got Own"):
        EXACT.loss(Own(), x, y, context())
    with pytest.raises(ModelError, match="this model has none"):
        EXACT.loss(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(CLASSES)), x, y, context())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DeepContractive(-1), r"penalty of DeepContractive.*at least 0; got -1"),
        (lambda: DeepContractive(projections=0), "projections of DeepContractive must be a whole number"),
    ],
)
def test_bad_settings_are_refused_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_recipes_name_it_and_their_nets_are_chains() -> None:
    rest = {"name": "t", "data": "d", "net": "linear", "epochs": 1}
    table = {**rest, "objective": {"name": "deep_contractive", "penalty": 0.5, "projections": 3}}
    assert recipe_from_table(table, REGISTRY, "here").objective == DeepContractive(0.5, 3)
    for name, make in nets.NETS.items():
        x = torch.rand(2, 1, 28, 28)
        squares = DeepContractive().squares(make(), x, seed=0)[1]
        assert len(squares) == {"small_cnn": 4, "madry_cnn": 4, "lenet": 4, "fc_500_150_10": 3, "linear": 1}[name]
