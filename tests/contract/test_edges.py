"""Every attack where floats and shapes run out, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from cases import each_attack, each_case, first_served, make, norms, same, serves, shape, some_threat
from core_models import Linear, RowByRow, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Goal, Threat
from mohs.attacks import REGISTRY
from mohs.errors import DataError, ModelError, ThreatError

# --- where floats and shapes run out ---------------------------------------------------------------------------------


class Flat(nn.Module):
    """No gradient anywhere, though there is a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([3.0, 1.0, 2.0]) + 0.0 * x.flatten(1).sum(1, keepdim=True)


@each_case
def test_zero_gradients_end_quietly(name: str, threat: str) -> None:
    for box in ((0.0, 1.0), (0.0, 255.0)):
        region = Threat.parse(threat).region
        x = inputs(4, 1, 3, 3)
        out = mohs.attack(make(name), Flat(), x, torch.zeros(4, dtype=torch.int64), Threat(region, box))
        assert not out.success.any()
        assert bool(out.x.isfinite().all())


class Poisoned(nn.Module):
    """Answers NaN to every input whose first number is above 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RowByRow(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.flatten(1)[:, :1] > 0.5, torch.nan, self.net(x))


@each_case
def test_nan_logits_are_no_success_and_harm_no_neighbour(name: str, threat: str) -> None:
    if threat.startswith("l0:"):
        threat = threat.replace("l0:", "l0-features:")
    x = inputs(10, *shape(threat, 6))
    x.view(10, 6)[:, 0] = torch.tensor([0.9, 0.01] * 5)
    y = Poisoned().net(x).argmax(1)
    out = mohs.attack(make(name), Poisoned(), x, y, threat, batch=16)
    logits = Poisoned()(out.x)
    assert bool(logits[out.success].isfinite().all())
    assert bool((logits.argmax(1) != y)[out.success].all())
    healthy = torch.arange(1, 10, 2)
    same(out, mohs.attack(make(name), Poisoned(), x[healthy], y[healthy], threat, batch=16), healthy)
    assert bool(out.x.isfinite().all())


class Scaled(nn.Module):
    """The same answers at another scale of the logits."""

    def __init__(self, net: nn.Module, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.net, self.scale, self.shift = net, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale + self.shift


@each_case
def test_saturated_logits_do_not_hide_the_gradient(name: str, threat: str) -> None:
    net, x = Linear(8, 2), inputs(32, *shape(threat, 8))
    y = net(x).argmax(1)
    plain = mohs.attack(make(name, random_start=False), net, x, y, threat)
    assert bool(plain.success.any())
    assert float(net(x).detach().diff(dim=1).abs().min() * 2**16) > 100  # saturated everywhere
    loud = mohs.attack(make(name, random_start=False), Scaled(net, 2.0**16), x, y, threat)
    assert torch.equal(loud.success, plain.success)
    torch.testing.assert_close(loud.x[loud.success], plain.x[plain.success], rtol=1e-3, atol=1e-4)


@each_attack
def test_logits_far_from_zero_and_masked_classes(name: str) -> None:
    net, x = Linear(8, 3), inputs(32, *shape(name, 8))
    y, threat = net(x).argmax(1), norms(name)[0]
    plain = mohs.attack(make(name, steps=40), net, x, y, threat)
    for shift in (-100.0, 100.0):  # one library's objective lost every success to negative logits
        assert torch.equal(
            mohs.attack(make(name, steps=40), Scaled(net, 1.0, shift), x, y, threat).success, plain.success
        )

    class Masked(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.net, self.value = net, value

        def forward(self, z: Tensor) -> Tensor:
            logits = self.net(z)
            return torch.cat([logits, torch.full_like(logits[:, :1], self.value)], 1)

    for value in (-1e9, -math.inf):
        assert torch.equal(mohs.attack(make(name, steps=40), Masked(value), x, y, threat).success, plain.success)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_attack
def test_logits_of_another_precision(name: str, dtype: torch.dtype) -> None:
    net, x = Linear(8, 3), inputs(16, *shape(name, 8))

    class Cast(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return net(z).to(dtype)

    y = Cast()(x).argmax(1)
    out = mohs.attack(make(name, steps=10), Cast(), x, y, norms(name)[0])
    assert out.x.dtype == out.margin.dtype == torch.float32
    assert bool(out.success.any())
    assert torch.equal(Cast()(out.x).argmax(1)[out.success] != y[out.success], out.success[out.success])


@each_attack
def test_double_precision_inputs(name: str) -> None:
    net, x = Linear(8, 3, dtype=torch.float64), inputs(16, *shape(name, 8), dtype=torch.float64)
    out = mohs.attack(make(name), net, x, net(x).argmax(1), norms(name)[0])
    assert out.x.dtype == out.size.dtype == torch.float64
    assert bool(out.success.any())


@pytest.mark.parametrize("rows", [0, 1])
@each_case
def test_no_rows_and_one_row(name: str, threat: str, rows: int) -> None:
    net, x = conv_net(), inputs(rows, 1, 12, 12)
    for settings in ({}, {"aims": 2}, {"targets": torch.ones(rows, dtype=torch.int64)}):
        y = torch.zeros(rows, dtype=torch.int64)
        out = mohs.attack(make(name), net, x, y, threat, restarts=2, **settings)
        assert out.x.shape == x.shape
        assert out.success.shape == out.size.shape == out.forwards.shape == (rows,)
        assert repr(out)


@pytest.mark.parametrize("form", ["[N]", "[N, 1]"])
@each_case
def test_one_logit_is_a_pair_of_classes(name: str, threat: str, form: str) -> None:
    single = Linear(8, None)
    x = inputs(32, *shape(threat, 8))

    class Column(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return single(z).unsqueeze(1)

    class Pair(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            z = single(z)
            return torch.stack([torch.zeros_like(z), z], 1)

    y = (single(x) > 0).long()
    model = single if form == "[N]" else Column()
    out = mohs.attack(make(name), model, x, y, threat)
    same(out, mohs.attack(make(name), Pair(), x, y, threat))
    assert bool(out.success.any())
    assert bool(((single(out.x) > 0).long() != y)[out.success].all())
    with pytest.raises(DataError, match="2 classes"):
        mohs.attack(make(name), model, x, y + 1, threat)


@pytest.mark.parametrize("targeted", [False, True], ids=["labels", "targets"])
@each_attack
def test_labels_out_of_range_are_named(name: str, targeted: bool) -> None:
    net, x = relu_net((6,)), inputs(5, *shape(name, 6))
    y = torch.tensor([0, 1, 7, 2, 9])
    arguments = {"y": torch.zeros(5, dtype=torch.int64), "targets": y + 1} if targeted else {"y": y}
    with pytest.raises(DataError, match=r"4 classes; rows 2 and 4"):
        mohs.attack(make(name), net, x, threat=some_threat(name), **arguments)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Dropout2d(0.1), nn.InstanceNorm2d(1)], ids=repr
)
@each_attack
def test_training_mode_is_refused_and_not_flipped(name: str, layer: nn.Module) -> None:
    net = nn.Sequential(layer, conv_net())
    net[1].eval()
    layer.train()
    with pytest.raises(ModelError, match=r"training mode.*eval\(\)"):
        mohs.attack(make(name), net, inputs(2, 1, 12, 12), torch.zeros(2, dtype=torch.int64), some_threat(name))
    assert layer.training
    layer.eval()
    mohs.attack(make(name), net, inputs(2, 1, 12, 12), torch.zeros(2, dtype=torch.int64), some_threat(name))


@each_attack
def test_inputs_outside_the_box_are_named(name: str) -> None:
    net, x = relu_net((6,)), inputs(5, *shape(name, 6))
    y = torch.zeros(5, dtype=torch.int64)
    flat = x.view(5, 6)
    flat[1, 2], flat[4, 0] = 1.5, -0.5
    if not some_threat(name).startswith("words"):  # which have no box
        with pytest.raises(DataError, match=r"box \[0, 1\].*rows 1 and 4"):
            mohs.attack(make(name), net, x, y, some_threat(name))
    mohs.attack(make(name), net, x, y, some_threat(name) + " in [-1, 2]")
    flat[3, 3] = math.nan
    with pytest.raises(DataError, match=r"nan or inf in row 3"):
        mohs.attack(make(name), net, x, y, some_threat(name) + " in [-inf, inf]")


@each_attack
def test_an_infinite_radius_is_for_those_that_can(name: str) -> None:
    net, x = relu_net((6,)), inputs(2, *shape(name, 6))
    threat = first_served(name, "l2:inf", "linf:inf", "l1:inf", "l0:inf", "patch:inf", "words:inf")
    if REGISTRY[name].finite:
        with pytest.raises(ThreatError, match="finite radius"):
            mohs.attack(make(name), net, x, net(x).argmax(1), threat)
    else:
        mohs.attack(make(name), net, x, net(x).argmax(1), threat)


@each_attack
def test_infinite_boxes(name: str) -> None:
    net, x = Linear(6, 3), inputs(16, *shape(name, 6)) * 10 - 5
    for short in ("linf", "l2", "l1", "l3"):
        threat = f"{short}:{20.0 if REGISTRY[name].finite else math.inf} in [-inf, inf]"
        if not serves(name, threat):
            continue
        out = mohs.attack(make(name, steps=20), net, x, net(x).argmax(1), threat)
        assert out.success.all(), threat


@each_attack
def test_a_failure_leaves_the_best_point_of_the_region(name: str) -> None:
    # one library answers the clean input where it fails, which trains nobody; another never looks at the last iterate
    net, x = relu_net((6,)), inputs(16, *shape(name, 6))
    y = net(x).argmax(1)
    threat = first_served(name, "linf:0.003", "l2:0.005", "l1:0.01", "l0:1", "patch:1", "words:1")
    out = mohs.attack(make(name), net, x, y, threat)
    if REGISTRY[name].finite:
        loss, clean = (nn.functional.cross_entropy(net(z), y, reduction="none") for z in (out.x, x))
        lead, before = (Goal.leave(y).margin(net(z)) for z in (out.x, x))
        assert bool(((loss > clean) | (lead > before)).all())  # which of the two an attack climbs is its own affair
    least = mohs.attack(make(name), Flat(), x, torch.zeros(16, dtype=torch.int64), threat)
    assert not least.success.any()
