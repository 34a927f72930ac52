"""Virtual adversarial training beside its formula, and its points beside the eigenvectors of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_formulas import Weights, agrees, batch, fixed, net, probabilities, room, weights
from training_problem import CLASSES, FEATURES, mixed_net, never, run, same

from mohs.attacks import REGISTRY
from mohs.defenses.training import VAT, Context, Natural
from mohs.defenses.training.files import recipe_from_table
from mohs.defenses.training.trades import divergence
from mohs.errors import UsageError

WIDE = "in [-9, 9]"
"""A box that no point reaches."""


def linear(seed: int = 0, features: int = FEATURES, classes: int = CLASSES) -> nn.Linear:
    made = nn.Linear(features, classes).double()
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def curvatures(model: nn.Linear, x: Tensor) -> Tensor:
    """H of each row, [B, D, D]: the divergence of a linear model is r^T H r / 2 up to third order."""
    p = model(x).detach().softmax(1)
    fisher = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    w = model.weight.detach()
    return w.T @ fisher @ w


def by_hand(alpha: float, frozen: Weights | None) -> Callable[[Weights], float]:
    """The formula, with the answer at the input as given by ``frozen``."""
    x, near, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        p, q = probabilities(frozen or w, x), probabilities(w, near)
        right = probabilities(w, x)[np.arange(len(y)), y]
        return float(-np.log(right).mean() + alpha * (p * (np.log(p) - np.log(q))).sum() / len(y))

    return f


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_it_is_the_formula_and_takes_the_answer_at_the_input_as_given(alpha: float) -> None:
    context = fixed(batch()[1])
    assert agrees(VAT(alpha=alpha), context, by_hand(alpha, weights(net())))
    assert not agrees(VAT(alpha=alpha), context, by_hand(alpha, None))


@pytest.mark.parametrize("seed", range(4))
def test_the_power_method_ends_at_the_top_eigenvector(seed: int) -> None:
    model, (x, _, _) = linear(seed), batch()
    eps = 1e-3
    change = VAT(iterations=200, xi=1e-5).points(model, x, room(f"l2:{eps} {WIDE}")) - x
    values, vectors = torch.linalg.eigh(curvatures(model, x))
    assert torch.allclose(change.norm(dim=1), torch.full((len(x),), eps, dtype=x.dtype))
    aligned = (change / eps * vectors[:, :, -1]).sum(1).abs()
    assert torch.allclose(aligned, torch.ones_like(aligned), atol=1e-3)
    apart = divergence(model(x).log_softmax(1), model(x + change).log_softmax(1))
    assert torch.allclose(apart, eps**2 / 2 * values[:, -1], rtol=0.01)


@pytest.mark.parametrize("steepest", ["l2", "linf"])
def test_an_iteration_multiplies_by_the_fisher_matrix(steepest: str) -> None:
    model, (x, _, _) = linear(), batch()
    here, eps = room(f"{steepest}:0.01 {WIDE}"), 0.01
    d = here.normal(x)
    for iterations in (1, 2, 3):
        d = (curvatures(model, x) @ d.unsqueeze(2)).squeeze(2)
        d = d.sign() if steepest == "linf" else d / d.norm(dim=1, keepdim=True)
        change = VAT(iterations=iterations, xi=1e-6).points(model, x, here) - x
        assert torch.allclose(change, eps * d, atol=1e-5 * eps)


def test_the_slope_is_that_of_the_divergence_from_the_answer_at_the_input() -> None:
    x, model, here = batch()[0], net(), room(f"l2:0.1 {WIDE}")
    w, d = weights(model), here.normal(x).numpy()
    p = probabilities(w, x.numpy())
    at = x.numpy() + 0.8 * d / np.linalg.norm(
        d, axis=1, keepdims=True
    )  # so far that the other divergence would point elsewhere
    rise = np.zeros_like(at)
    for k in range(FEATURES):
        step = 1e-6 * np.eye(FEATURES)[k]
        ahead, behind = (probabilities(w, at + sign * step) for sign in (1, -1))
        rise[:, k] = (p * (np.log(behind) - np.log(ahead))).sum(1)
    expected = x.numpy() + 0.1 * rise / np.linalg.norm(rise, axis=1, keepdims=True)
    assert np.allclose(VAT(xi=0.8).points(model, x, here).numpy(), expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(["l2", "linf", "l1", "l1.5", "l4"]))
def test_no_iteration_lowers_the_quadratic_form_in_any_norm(seed: int, norm: str) -> None:
    model, (x, _, _) = linear(seed), batch()
    h = curvatures(model, x)
    last = torch.zeros(len(x), dtype=x.dtype)
    for iterations in (1, 2, 4, 8):
        r = VAT(iterations=iterations, xi=1e-6).points(model, x, room(f"{norm}:0.01 {WIDE}", seed)) - x
        value = torch.einsum("bi,bij,bj->b", r, h, r)
        assert bool((value >= last * (1 - 1e-4)).all())
        last = value


def test_the_default_difference_is_long_enough_for_single_precision() -> None:
    model = linear(0, features=784)
    x = torch.rand(16, 784, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    model.weight.data.mul_(0.05)
    here = room(f"l2:0.1 {WIDE}")
    truth = (curvatures(model, x.double()) @ here.normal(x).double().unsqueeze(2)).squeeze(2)
    model.float()

    def aligned(xi: float) -> Tensor:
        found = VAT(xi=xi).points(model, x, here) - x
        return torch.cosine_similarity(found.double(), truth, dim=1, eps=1e-30)

    assert bool((aligned(VAT().xi) > 0.99).all())
    assert float(aligned(1e-6).median()) < 0.9


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.4", "l1:1", "l3:0.2"])
def test_points_lie_in_region_and_box_and_depend_on_no_other_row(threat: str) -> None:
    x, model, here = batch()[0], net(), room(threat)
    points = VAT(iterations=2).points(model, x, here)
    region = here.threat.region
    assert bool(region.contains(points, x, here.radii(x)).all())
    assert 0 <= float(points.min()) <= float(points.max()) <= 1
    assert bool((points != x).any(1).all())
    assert torch.allclose(VAT(iterations=2).points(model, x[[4, 1]], here), points[[4, 1]], atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert not points.requires_grad


def test_a_saturated_net_has_no_direction_and_no_divergence() -> None:
    model, x = nn.Linear(2, 2), torch.rand(3, 2)
    model.bias.data.copy_(torch.tensor([500.0, -500.0]))
    assert torch.equal(VAT(iterations=3).points(model, x, room("l2:0.1")), x)


def test_alpha_zero_is_natural_training_bit_for_bit(tmp_path: Path) -> None:
    def trained(objective: Any, out: str) -> nn.Module:
        return run(tmp_path, objective, how=never, model=mixed_net(), threat="l2:0.1", out=out).model

    natural = trained(Natural(), "a")
    assert same(trained(VAT(alpha=0.0), "b"), natural)
    assert not same(trained(VAT(alpha=0.1), "c"), natural)


def test_training_with_it_flattens_the_answers(tmp_path: Path) -> None:
    def moved(alpha: float) -> float:
        model = run(tmp_path, VAT(alpha=alpha), how=never, threat="l2:0.2", epochs=6, out=f"{alpha}").model
        x = batch()[0].float()
        points = VAT(iterations=5).points(model, x, room("l2:0.2"))
        with torch.no_grad():
            return float(divergence(model(x).log_softmax(1), model(points).log_softmax(1)).mean())

    assert moved(20.0) < 0.6 * moved(0.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VAT(alpha=-1), r"alpha of VAT.*at least 0; got -1"),
        (lambda: VAT(iterations=0), "iterations of VAT.* whole number"),
        (lambda: VAT(xi=0.0), "xi of VAT.* above 0"),
    ],
)
def test_bad_settings_are_refused_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_recipes_name_it() -> None:
    rest = {"name": "t", "data": "d", "net": "linear", "epochs": 1, "threat": "l2:0.1"}
    read = recipe_from_table({**rest, "objective": {"name": "vat", "alpha": 2.0, "iterations": 3}}, REGISTRY, "here")
    assert read.objective == VAT(2.0, 3)


def test_without_a_threat_it_has_no_radius() -> None:
    x, _, y = batch()
    with pytest.raises(UsageError, match="needs a threat"):
        VAT().loss(net(), x, y, Context(never, 0.1, 0.0))
