"""Every attack answers the same bits for an example, whatever ran beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, each_attack, each_case, make, norms, same, serves, shape, some_threat
from core_models import Counting, RowByRow, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import REGISTRY


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Large tensors are then cut into chunks somewhere inside a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- the same bits ---------------------------------------------------------------------------------------------------


@each_case
def test_same_seed_same_bytes_and_another_seed_other_starts(name: str, threat: str) -> None:
    net, x = RowByRow(12), inputs(6, *shape(threat, 12))
    y = net(x).argmax(1)
    first = mohs.attack(make(name), net, x, y, threat, seed=3)
    torch.manual_seed(99)
    same(mohs.attack(make(name), net, x, y, threat, seed=3), first)
    if getattr(make(name), "random_start", False):
        a, b = (mohs.attack(make(name), net, x, y, threat, seed=s, trace=True).trace for s in (3, 4))
        first = int(getattr(make(name), "outside", False))  # who comes from outside begins with the second look
        other = a[:, 0, first] != b[:, 0, first]  # the objective there
        assert bool(other.any() if threat.startswith("words") else other.all())  # few sentences there are to begin with


@pytest.mark.parametrize(
    ("name", "threat", "sides"),
    [
        pytest.param(name, threat, sides, id=f"{name}-{threat}-{sides}")
        for name, threat in CASES
        for sides in ((37,), (1, 13, 11))
        if len(sides) > 1 or not threat.startswith(("patch", "words"))  # these need an image
    ],
)
def test_a_row_does_not_depend_on_the_others(name: str, threat: str, sides: tuple[int, ...]) -> None:
    rows = 17  # with batch 7 the last batch is padded, and the waves close ranks
    net, x = RowByRow(math.prod(sides), seed=1), inputs(rows, *sides)
    y = net(x).argmax(1)
    run = {"restarts": 2, "batch": 7}
    whole = mohs.attack(make(name), net, x, y, threat, **run)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    for index in (order, order[:9], torch.tensor([16]), torch.tensor([3])):
        same(whole, mohs.attack(make(name), net, x[index], y[index], threat, **run), index)


@pytest.mark.parametrize("batch", [32, 64])
@each_attack
def test_a_net_of_matrix_products_and_convolutions_agrees_too(name: str, batch: int) -> None:
    # inner sizes are multiples of four: below, matrix libraries themselves answer by place in the batch
    net, x = conv_net(), inputs(75, 1, 12, 12)
    y = net(x).argmax(1)
    threat = norms(name)[:2][-1]
    whole = mohs.attack(make(name), net, x, y, threat, batch=batch)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(2))
    for index in (order, order[:40], order[40:], torch.tensor([74])):
        same(whole, mohs.attack(make(name), net, x[index], y[index], threat, batch=batch), index)


class Cheap(nn.Module):
    """Elementwise products and one reduction per row and class: light on large inputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, features, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        rows = [r.clone() for r in x.flatten(1).unbind(0)]
        return torch.stack([torch.stack([(r * w).sum() for w in self.weight]) for r in rows])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l3", "l0", "patch", "words"])
@each_attack
def test_large_inputs_cut_by_threads_inside_a_row(name: str, threat: str) -> None:
    # 3 x 75 x 73 x 7 = 114975 numbers: threads share them, and their borders fall inside rows
    if not serves(name, threat + ":1"):
        pytest.skip(f"does not serve {threat}")
    net, x = Cheap(3 * 75 * 73), inputs(9, 3, 75, 73)
    y = net(x).argmax(1)
    radius = (
        {"linf": "0.001", "l2": "0.3", "l1": "20", "l3": "0.05", "l0": "50", "patch": "9", "words": "9"}[threat]
        if REGISTRY[name].finite
        else "inf"
    )
    run = {"batch": 7}
    whole = mohs.attack(make(name, steps=2), net, x, y, f"{threat}:{radius}", **run)
    index = torch.tensor([8, 2, 5, 0])
    same(whole, mohs.attack(make(name, steps=2), net, x[index], y[index], f"{threat}:{radius}", **run), index)
    same(whole, mohs.attack(make(name, steps=2), net, x[4:5], y[4:5], f"{threat}:{radius}", **run), torch.tensor([4]))


@each_attack
def test_every_pass_has_the_same_shape(name: str) -> None:
    net, x = relu_net((6,)), inputs(21, *shape(name, 6))
    model = Counting(net)
    mohs.attack(make(name), model, x, net(x).argmax(1), some_threat(name), restarts=2, batch=8)
    assert model.shapes == {(8, *shape(name, 6))}
