"""What every attack of the registry promises, whatever it is."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from core_models import Counting, Linear, RowByRow, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Access, Outcome, Threat
from mohs.attacks import REGISTRY
from mohs.errors import AccessError, DataError, ModelError, ThreatError

FEW = {"steps": 4}
"""Small budgets for attacks that have steps."""

COSTS = {  # documented cost of a row that never succeeds: steps -> (forwards, backwards)
    "FGSM": lambda steps, classes: (2, 1),
    "BIM": lambda steps, classes: (steps + 1, steps),
    "PGD": lambda steps, classes: (steps + 1, steps),
    "DeepFool": lambda steps, classes: (steps + 1, classes - 1 + (steps - 1) * min(3, classes - 1)),
}


def make(name: str, **settings: Any) -> Any:
    known = {f.name for f in fields(REGISTRY[name])}
    return REGISTRY[name](**{k: v for k, v in (FEW | settings).items() if k in known})


def norms(name: str) -> list[str]:
    """Short forms the attack supports, at a radius some rows of the test nets give way to."""
    if REGISTRY[name].finite:
        return ["linf:0.1", "l2:0.5", "l1:1.5", "l3:0.35", "l1.5:0.8", "l0:3", "l0-features:4"]
    return ["linf:inf", "l2:inf", "l1:inf", "l3:inf", "linf:0.1", "l2:0.5"]


CASES = [(name, threat) for name in REGISTRY for threat in norms(name)]
each_case = pytest.mark.parametrize(("name", "threat"), CASES, ids=[f"{n}-{t}" for n, t in CASES])
each_attack = pytest.mark.parametrize("name", list(REGISTRY))


def some_threat(name: str) -> str:
    return norms(name)[0]


def same(a: Outcome, b: Outcome, index: Tensor | None = None) -> None:
    """Equal to the bit, where b ran the rows ``index`` of a."""
    for field in ("x", "success", "size", "margin", "restart", "forwards", "backwards", "queries"):
        left = getattr(a, field) if index is None else getattr(a, field)[index]
        assert torch.equal(left, getattr(b, field)), f"{field} differs"


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Large tensors are then cut into chunks somewhere inside a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@each_case
def test_the_outcome_is_true(name: str, threat: str, targeted: bool) -> None:
    net, x = conv_net(), inputs(24, 1, 12, 12)
    y = net(x).argmax(1)
    y[3] = (y[3] + 1) % 5  # one that is wrong from the start
    targets = (y + 1 + torch.arange(24) % 4) % 5 if targeted else None
    out = mohs.attack(make(name, steps=6), net, x, y, threat, targets=targets, batch=16)
    box, region = (0.0, 1.0), Threat.parse(threat).region
    assert out.x.shape == x.shape
    assert out.x.dtype == x.dtype
    assert not out.x.requires_grad
    assert bool((out.x >= box[0]).all())
    assert bool((out.x <= box[1]).all())
    eps = torch.full((24,), region.eps)
    assert bool(region.contains(out.x, x, eps).all())
    logits = net(out.x).detach()
    met = logits.argmax(1) == targets if targeted else logits.argmax(1) != y
    assert bool((met | ~out.success).all()), "a success that is none"
    margin = mohs.Goal.attain(targets).margin(logits) if targeted else mohs.Goal.leave(y).margin(logits)
    torch.testing.assert_close(out.margin[out.success], margin[out.success], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.size[out.success], region.measure(out.x, x)[out.success])
    assert bool(out.size[~out.success].isinf().all())
    assert bool((out.restart >= 0).eq(out.success).all())
    if not targeted:
        assert out.success[3]
        if not getattr(make(name), "random_start", False):
            assert out.size[3] == 0
        assert int(out.success.sum()) > 2, "the net should give way here and there, else this tests little"


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@each_attack
def test_nothing_outside_changes(name: str, targeted: bool) -> None:
    net, x = conv_net(), inputs(9, 1, 12, 12).requires_grad_(True)
    y = net(x).argmax(1)
    targets = (y + 1) % 5 if targeted else None
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, float(i))
    net[2].training = True  # a mode of its own that changes no answer
    net.eval_me_not = True
    x.grad = torch.ones_like(x)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    data = x.detach().clone(), y.clone()
    weights = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    flags = [p.requires_grad for p in net.parameters()]
    modes = {n: m.training for n, m in net.named_modules()}
    settings = torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.cudnn.deterministic

    mohs.attack(make(name), net, x, y, some_threat(name), targets=targets, restarts=2)

    assert torch.equal(x.detach(), data[0])
    assert torch.equal(y, data[1])
    assert x.requires_grad
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # noqa: NPY002
    assert (torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.cudnn.deterministic) == settings


@each_attack
def test_the_attack_itself_is_frozen_and_its_repr_rebuilds_it(name: str) -> None:
    attack = make(name)
    with pytest.raises(AttributeError):
        attack.steps = 3
    assert repr(attack).startswith(f"{name}(")
    names = {f.name: getattr(attack, f.name) for f in fields(attack)}
    assert REGISTRY[name](**names) == attack


@each_attack
def test_calling_contexts_do_not_matter(name: str) -> None:
    net, x = relu_net((6,)), inputs(5, 6)
    y = net(x).argmax(1)
    plain = mohs.attack(make(name), net, x, y, some_threat(name))
    with torch.no_grad():
        same(mohs.attack(make(name), net, x, y, some_threat(name)), plain)
    with torch.inference_mode():
        inside = mohs.attack(make(name), net, x.clone(), y, some_threat(name))
    same(inside, plain)
    assert not inside.x.is_inference()


class Caching(nn.Module):
    """Fills a table at its first look, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.table = relu_net((6,)), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(6) * 1.5
        return self.net(x * self.table)


@each_attack
def test_what_a_model_caches_stays_usable_for_training(name: str) -> None:
    model, x = Caching().eval(), inputs(5, 6)
    y = torch.zeros(5, dtype=torch.int64)
    mohs.attack(make(name), model, x, y, some_threat(name), aims=2)
    weighted = nn.Parameter(torch.ones(6)) * model.table  # a gradient through the cache
    model.net(x * weighted).sum().backward()


# --- the same bits --------------------------------------------------------------------------------------------------


@each_case
def test_same_seed_same_bytes_and_another_seed_other_starts(name: str, threat: str) -> None:
    net, x = RowByRow(12), inputs(6, 12)
    y = net(x).argmax(1)
    first = mohs.attack(make(name), net, x, y, threat, seed=3)
    torch.manual_seed(99)
    same(mohs.attack(make(name), net, x, y, threat, seed=3), first)
    if getattr(make(name), "random_start", False):
        stop = mohs.Stop.BUDGET
        a, b = (mohs.attack(make(name, steps=1, step_size=1e-4), net, x, y, threat, seed=s, stop=stop) for s in (3, 4))
        assert bool((a.x != b.x).flatten(1).any(1).all())


@pytest.mark.parametrize("shape", [(37,), (1, 13, 11)], ids=str)
@each_case
def test_a_row_does_not_depend_on_the_others(name: str, threat: str, shape: tuple[int, ...]) -> None:
    rows = 17  # with batch 7 the last batch is padded, and the waves close ranks
    net, x = RowByRow(math.prod(shape), seed=1), inputs(rows, *shape)
    y = net(x).argmax(1)
    run = {"restarts": 2, "batch": 7}
    whole = mohs.attack(make(name), net, x, y, threat, **run)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    for index in (order, order[:9], torch.tensor([16]), torch.tensor([3])):
        same(whole, mohs.attack(make(name), net, x[index], y[index], threat, **run), index)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("batch", [32, 64])
@each_attack
def test_a_net_of_matrix_products_and_convolutions_agrees_too(name: str, batch: int) -> None:
    # inner sizes are multiples of four: below, matrix libraries themselves answer by place in the batch
    net, x = conv_net(), inputs(75, 1, 12, 12)
    y = net(x).argmax(1)
    threat = norms(name)[1]
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
@pytest.mark.parametrize("threat", ["linf", "l2", "l1", "l3"])
@each_attack
def test_large_inputs_cut_by_threads_inside_a_row(name: str, threat: str) -> None:
    # 3 x 75 x 73 x 7 = 114975 numbers: threads share them, and their borders fall inside rows
    net, x = Cheap(3 * 75 * 73), inputs(9, 3, 75, 73)
    y = net(x).argmax(1)
    radius = {"linf": "0.001", "l2": "0.3", "l1": "20", "l3": "0.05"}[threat] if REGISTRY[name].finite else "inf"
    run = {"batch": 7}
    whole = mohs.attack(make(name, steps=2), net, x, y, f"{threat}:{radius}", **run)
    index = torch.tensor([8, 2, 5, 0])
    same(whole, mohs.attack(make(name, steps=2), net, x[index], y[index], f"{threat}:{radius}", **run), index)
    same(whole, mohs.attack(make(name, steps=2), net, x[4:5], y[4:5], f"{threat}:{radius}", **run), torch.tensor([4]))


@each_attack
def test_every_pass_has_the_same_shape(name: str) -> None:
    net, x = relu_net((6,)), inputs(21, 6)
    model = Counting(net)
    mohs.attack(make(name), model, x, net(x).argmax(1), some_threat(name), restarts=2, batch=8)
    assert model.shapes == {(8, 6)}


# --- access and cost ------------------------------------------------------------------------------------------------


@each_attack
def test_declared_access_suffices_and_one_level_less_raises(name: str) -> None:
    net, x = relu_net((6,)), inputs(3, 6)
    y, threat = net(x).argmax(1), Threat.parse(some_threat(name))
    needs = REGISTRY[name].needs
    granted = Threat(threat.region, access=needs)
    mohs.attack(make(name), net, x, y, granted)
    if needs > Access.NONE:
        with pytest.raises(AccessError, match=needs.name):
            mohs.attack(make(name), net, x, y, Threat(threat.region, access=Access(needs - 1)))


@pytest.mark.parametrize("classes", [2, 3, 7])
@each_attack
def test_counters_equal_the_documented_cost(name: str, classes: int) -> None:
    assert name in COSTS, f"state the documented cost of {name} in COSTS"
    net = relu_net((6,), classes=classes)
    y = torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        net[-1].bias[0] += 50.0  # nothing succeeds
    model = Counting(net)
    out = mohs.attack(make(name), model, inputs(5, 6), y, "linf:0.01", batch=8)
    assert not out.success.any()
    forwards, backwards = COSTS[name](make(name).steps, classes)
    assert out.forwards.tolist() == out.queries.tolist() == [forwards] * 5
    assert out.backwards.tolist() == [backwards] * 5
    assert (model.forwards, model.backwards) == (forwards, backwards)
    assert out.spent == 5 * (forwards + backwards)


@each_attack
def test_rows_that_are_wrong_from_the_start_cost_one_look(name: str) -> None:
    net, x = relu_net((6,)), inputs(5, 6)
    if getattr(make(name), "random_start", False):
        pytest.skip("starts elsewhere")
    out = mohs.attack(make(name), net, x, (net(x).argmax(1) + 1) % 4, some_threat(name))
    assert out.success.all()
    assert torch.equal(out.x, x)
    assert out.forwards.tolist() == [1] * 5


# --- more is never less ---------------------------------------------------------------------------------------------


@each_case
def test_more_restarts_never_lose_a_success(name: str, threat: str) -> None:
    net, x = relu_net((12,)), inputs(32, 12)
    y = net(x).argmax(1)
    one, four = (mohs.attack(make(name), net, x, y, threat, restarts=r, batch=32) for r in (1, 4))
    assert bool((four.success | ~one.success).all())
    assert bool((four.forwards >= one.forwards).all())


@each_attack
def test_a_larger_radius_never_loses_a_success_on_a_linear_model(name: str) -> None:
    if not REGISTRY[name].finite:
        pytest.skip("takes no radius")
    net, x = Linear(8, 3), inputs(64, 8)
    y = net(x).argmax(1)
    before = torch.zeros(64, dtype=torch.bool)
    for eps in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        now = mohs.attack(make(name, random_start=False), net, x, y, f"linf:{eps}").success
        assert bool((now | ~before).all())
        before = now
    assert bool(before.any())


@each_attack
def test_more_steps_never_lose_a_success(name: str) -> None:
    attack = REGISTRY[name]
    known = {f.name for f in fields(attack)}
    if "steps" not in known:
        pytest.skip("has no steps")
    fixed = {k: v for k, v in {"step_size": 0.02, "random_start": False}.items() if k in known}
    net, x = relu_net((12,)), inputs(48, 12)
    y, threat = net(x).argmax(1), norms(name)[0]
    before = torch.zeros(48, dtype=torch.bool)
    for steps in (1, 2, 4, 8):
        now = mohs.attack(attack(steps=steps, **fixed), net, x, y, threat).success
        assert bool((now | ~before).all())
        before = now


# --- where floats and shapes run out --------------------------------------------------------------------------------


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
        return torch.where(x[:, :1] > 0.5, torch.nan, self.net(x))


@each_case
def test_nan_logits_are_no_success_and_harm_no_neighbour(name: str, threat: str) -> None:
    if threat.startswith("l0:"):
        threat = threat.replace("l0:", "l0-features:")
    x = inputs(10, 6)
    x[:, 0] = torch.tensor([0.9, 0.01] * 5)
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
    net, x = Linear(8, 2), inputs(32, 8)
    y = net(x).argmax(1)
    plain = mohs.attack(make(name, random_start=False), net, x, y, threat)
    assert bool(plain.success.any())
    assert float(net(x).detach().diff(dim=1).abs().min() * 2**16) > 100  # saturated everywhere
    loud = mohs.attack(make(name, random_start=False), Scaled(net, 2.0**16), x, y, threat)
    assert torch.equal(loud.success, plain.success)
    torch.testing.assert_close(loud.x[loud.success], plain.x[plain.success], rtol=1e-3, atol=1e-4)


@each_attack
def test_logits_far_from_zero_and_masked_classes(name: str) -> None:
    net, x = Linear(8, 3), inputs(32, 8)
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
    net, x = Linear(8, 3), inputs(16, 8)

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
    net, x = Linear(8, 3, dtype=torch.float64), inputs(16, 8, dtype=torch.float64)
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
    x = inputs(32, 8)

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
    net, x = relu_net((6,)), inputs(5, 6)
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
    net, x = relu_net((6,)), inputs(5, 6)
    y = torch.zeros(5, dtype=torch.int64)
    x[1, 2], x[4, 0] = 1.5, -0.5
    with pytest.raises(DataError, match=r"box \[0, 1\].*rows 1 and 4"):
        mohs.attack(make(name), net, x, y, some_threat(name))
    mohs.attack(make(name), net, x, y, some_threat(name) + " in [-1, 2]")
    x[3, 3] = math.nan
    with pytest.raises(DataError, match=r"nan or inf in row 3"):
        mohs.attack(make(name), net, x, y, some_threat(name) + " in [-inf, inf]")


@each_attack
def test_an_infinite_radius_is_for_those_that_can(name: str) -> None:
    net, x = relu_net((6,)), inputs(2, 6)
    if REGISTRY[name].finite:
        with pytest.raises(ThreatError, match="finite radius"):
            mohs.attack(make(name), net, x, net(x).argmax(1), "l2:inf")
    else:
        mohs.attack(make(name), net, x, net(x).argmax(1), "l2:inf")


@each_attack
def test_infinite_boxes(name: str) -> None:
    net, x = Linear(6, 3), inputs(16, 6) * 10 - 5
    for short in ("linf", "l2", "l1", "l3"):
        threat = f"{short}:{20.0 if REGISTRY[name].finite else math.inf} in [-inf, inf]"
        out = mohs.attack(make(name, steps=20), net, x, net(x).argmax(1), threat)
        assert out.success.all(), threat


@each_attack
def test_a_failure_leaves_the_best_point_of_the_region(name: str) -> None:
    # one library answers the clean input where it fails, which trains nobody; another never looks at the last iterate
    net, x = relu_net((6,)), inputs(16, 6)
    y = net(x).argmax(1)
    out = mohs.attack(make(name), net, x, y, "linf:0.003")
    if REGISTRY[name].finite:
        loss, clean = (nn.functional.cross_entropy(net(z), y, reduction="none") for z in (out.x, x))
        assert bool((loss > clean).all())
    least = mohs.attack(make(name), Flat(), x, torch.zeros(16, dtype=torch.int64), "linf:0.003")
    assert not least.success.any()
