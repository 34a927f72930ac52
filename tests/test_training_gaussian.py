"""Gaussian augmentation beside its formula, and the statistics of its noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_formulas import agrees, batch, probabilities
from training_problem import FEATURES, mixed_net, never, run, same

from mohs.attacks import REGISTRY
from mohs.defenses.training import Context, GaussianAugmentation, Natural
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import UsageError


def context(seed: int = 0) -> Context:
    return Context(never, 0.0, 0.0, seed=seed)


class Seeing(nn.Module):
    """Notes what it is asked."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x[:, : self.classes]


def asked(objective: GaussianAugmentation, x: Tensor, seed: int = 0) -> Tensor:
    """Everything the net is asked, in one pass."""
    model = Seeing()
    objective.loss(model, x, torch.zeros(len(x), dtype=torch.int64), context(seed))
    (seen,) = model.seen
    return seen


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("copies", [1, 3])
def test_it_is_the_mean_cross_entropy_over_inputs_and_copies(copies: int, keep: bool) -> None:
    x, _, y = batch()
    objective = GaussianAugmentation(0.3, copies, keep)
    looks = asked(objective, x).numpy()
    labels = np.tile(y.numpy(), copies + keep)
    assert len(looks) == len(labels)

    def f(w: Any) -> float:
        return float(-np.log(probabilities(w, looks)[np.arange(len(labels)), labels]).mean())

    assert agrees(objective, context(), f)
    assert np.array_equal(looks[: len(x)], x.numpy()) == keep


def test_the_noise_is_normal_of_the_stated_size_and_unclipped() -> None:
    x = torch.rand(500, 40, generator=torch.Generator().manual_seed(0))
    noise = asked(GaussianAugmentation(0.25, copies=2, keep=False), x) - x.repeat(2, 1)
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.25 / n**0.5
    assert float(noise.std()) == pytest.approx(0.25, rel=5 / (2 * n) ** 0.5)
    share = float((noise.abs() < 0.25).float().mean())
    assert share == pytest.approx(0.6827, abs=5 * 0.47 / n**0.5)
    first, second = noise.chunk(2)
    assert abs(float((first * second).mean())) < 5 * 0.25**2 / (n / 2) ** 0.5


def test_noise_is_that_of_seed_and_row_alone() -> None:
    x, objective = batch()[0], GaussianAugmentation(0.1, copies=2, keep=False)
    whole, part = asked(objective, x), asked(objective, x[[4, 1]])
    assert torch.equal(whole.view(2, len(x), -1)[:, [4, 1]].reshape(4, -1), part)
    assert not torch.isclose(whole, asked(objective, x, seed=1)).any()


def test_each_step_draws_anew_and_no_threat_is_needed(tmp_path: Path) -> None:
    model = nn.Sequential(Seeing(FEATURES), nn.Linear(FEATURES, 3))
    run(tmp_path, GaussianAugmentation(0.1, keep=False), how=never, model=model, epochs=2, batch=100)
    first, second = (x[x[:, 0].argsort()] for x in model[0].seen if len(x) == 80)
    assert not torch.isclose(first, second).all(1).any()


def test_vanishing_noise_is_natural_training(tmp_path: Path) -> None:
    def trained(objective: Any, out: str) -> nn.Module:
        return run(tmp_path, objective, how=never, model=nn.Linear(FEATURES, 3).requires_grad_(), out=out).model

    torch.manual_seed(0)
    natural = trained(Natural(), "a")
    torch.manual_seed(0)
    noisy = trained(GaussianAugmentation(1e-12), "b")
    assert torch.allclose(natural.weight, noisy.weight, atol=1e-5)
    assert not same(run(tmp_path, GaussianAugmentation(0.5), how=never, model=mixed_net(), out="c").model, mixed_net())


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"sigma of GaussianAugmentation.* above 0; got 0"):
        GaussianAugmentation(0)
    with pytest.raises(UsageError, match="copies of GaussianAugmentation must be a whole number"):
        GaussianAugmentation(copies=0)


def test_recipes_name_it() -> None:
    rest = {"name": "t", "data": "d", "net": "linear", "epochs": 1}
    table = {**rest, "objective": {"name": "gaussian_augmentation", "sigma": 0.3, "copies": 10, "keep": False}}
    assert recipe_from_table(table, REGISTRY, "here").objective == GaussianAugmentation(0.3, 10, False)
