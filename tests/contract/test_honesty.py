"""Nothing counts that is not true: small scales, low precision, models that change what they are given, wrong arguments."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import by_gradient, make, serves, shape
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Access, Threat, streams
from mohs.attacks import FGSM, PGD, REGISTRY, DeepFool
from mohs.errors import DataError, ModelError, ThreatError, UsageError


class Scaled(nn.Module):
    """The same net for inputs in other units."""

    def __init__(self, net: nn.Module, unit: float) -> None:
        super().__init__()
        self.net, self.unit = net, unit

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x / self.unit)


NORMS = ["linf", "l2", "l1", "l3", "l0", "patch"]
SERVED = [(name, norm) for name in REGISTRY for norm in NORMS if serves(name, norm + ":1")]


@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
@pytest.mark.parametrize(("name", "norm"), SERVED)
def test_units_do_not_matter(name: str, norm: str, unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # random numbers follow the content of the inputs, which differs; here they follow the row
    monkeypatch.setattr(streams, "content_keys", lambda x: torch.arange(len(x)))
    net, x = relu_net((12,)), inputs(40, *shape(norm, 12))
    y = net(x).argmax(1)
    eps = {"linf": 0.05, "l2": 0.15, "l1": 0.4, "l3": 0.1, "l0": 3, "patch": 2}[norm]
    region = {
        "linf": mohs.Linf, "l2": mohs.L2, "l1": mohs.L1, "l3": partial(mohs.Lp, 3.0), "l0": mohs.L0, "patch": mohs.Patch,
    }[norm]  # fmt: skip
    scale = 1.0 if norm in ("l0", "patch") else unit
    attack = REGISTRY[name]() if by_gradient(name) else make(name, steps=200)
    one = mohs.attack(attack, net, x, y, Threat(region(eps)))
    other = mohs.attack(attack, Scaled(net, unit), x * unit, y, Threat(region(eps * scale), box=(0, unit)))
    assert int(one.success.sum()) > 0
    assert int(one.success.sum()) < 40 or norm in ("l0", "patch")
    assert bool((other.size[other.success] <= eps * scale * 1.0001).all())
    assert int((one.success != other.success).sum()) <= 1  # rounding at the boundary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_low_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match="put the cast into the model"):
        mohs.attack(FGSM(), relu_net((6,)), inputs(3, 6).to(dtype), torch.zeros(3, dtype=torch.int64), "linf:0.1")


class Eager(nn.Module):
    """Halves its input in place before it looks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.5)
        return self.net(x)


def test_a_model_that_changes_its_input_is_refused() -> None:
    with pytest.raises(ModelError, match="in place"):
        mohs.attack(FGSM(), Eager(relu_net((6,))), inputs(3, 6), torch.zeros(3, dtype=torch.int64), "linf:0.1")


@pytest.mark.parametrize(
    ("attack", "change", "words"),
    [
        (PGD, {}, "made with parentheses"),
        ("PGD", {}, "FGSM, BIM, PGD"),
        (PGD(), {"stop": "success"}, "Stop.SUCCESS"),
        (PGD(), {"seed": 1.5}, "whole number"),
        (PGD(), {"eps": 0.1}, "shape"),
    ],
    ids=str,
)
def test_plain_mistakes_are_named(attack: object, change: dict, words: str) -> None:
    with pytest.raises((UsageError, DataError), match=words):
        mohs.attack(attack, relu_net((6,)), inputs(3, 6), torch.zeros(3, dtype=torch.int64), "linf:0.1", **change)


def test_objectives_and_steps_are_checked_when_an_attack_is_made() -> None:
    for bad in ({"objective": "margin"}, {"step_size": "a"}, {"step_size": math.inf}, {"steps": 0}):
        with pytest.raises(UsageError):
            PGD(**bad)
    for text in ("linf:1e400", "linf:inf/2"):
        with pytest.raises(ThreatError):
            Threat.parse(text)
    assert Threat.parse(mohs.Linf(0.1)) == Threat.parse("linf:0.1")


def test_only_looks_at_the_model_are_queries() -> None:
    net, x = relu_net((6,)), inputs(20, 6)
    y = net(x).argmax(1)
    threat = Threat(mohs.Linf(0.3), queries=5)
    out = mohs.attack(PGD(steps=20), net, x, y, threat, guide=relu_net((6,), seed=1))
    assert int(out.forwards.max()) > 5
    assert bool((out.queries <= 5).all())
    assert bool((net(out.x).argmax(1) != y)[out.success].all())


def test_a_row_at_its_limit_stops() -> None:
    net, x = relu_net((6,)), inputs(20, 6)
    with torch.no_grad():
        net[-1].bias[0] += 50.0  # nothing succeeds
    out = mohs.attack(PGD(steps=40), net, x, torch.zeros(20, dtype=torch.int64), Threat(mohs.Linf(0.1), queries=5))
    assert out.forwards.tolist() == out.queries.tolist() == [5] * 20


def test_transfer_needs_no_access() -> None:
    net, x = relu_net((6,)), inputs(40, 6)
    y = net(x).argmax(1)
    out = mohs.attack(
        PGD(steps=10), net, x, y, Threat(mohs.Linf(0.2), access=Access.NONE), guide=relu_net((6,), seed=1)
    )
    assert out.queries.tolist() == [0] * 40
    assert bool((net(out.x).argmax(1) != y)[out.success].all())


def test_restarts_of_a_deterministic_attack_are_one() -> None:
    net, x = relu_net((6,)), inputs(20, 6)
    y = net(x).argmax(1)
    one, five = (mohs.attack(DeepFool(), net, x, y, "l2:inf", restarts=r) for r in (1, 5))
    assert torch.equal(one.x, five.x)
    assert one.spent == five.spent


def test_finished_examples_come_early_where_there_are_many() -> None:
    net, x = relu_net((6,)), inputs(64, 6)
    with torch.no_grad():
        net[-1].bias[0] += 50.0  # nothing succeeds, so an example is finished after its last restart
    job = mohs.attacks.Job(
        PGD(steps=3), net, x, torch.zeros(64, dtype=torch.int64), Threat.parse("linf:0.1"), restarts=3, batch=2
    )
    first = next(iter(job.run()))
    assert len(first) <= 16  # one slab of eight batches
    assert job.spent < 0.3 * 64 * 3 * 7
