"""What every attack of the registry promises, whatever it is: truth, no side effects, its cost, and more is never less."""

from __future__ import annotations

import copy
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from cases import (
    LABELS,
    by_gradient,
    by_label,
    each_attack,
    each_case,
    first_served,
    make,
    norms,
    same,
    shape,
    some_threat,
)
from core_models import Counting, Linear, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Access, Threat, streams
from mohs.attacks import REGISTRY
from mohs.errors import AccessError

COSTS = {  # documented cost of a row that never succeeds: steps -> (forwards, backwards)
    "FGSM": lambda steps, classes: (2, 1),
    "BIM": lambda steps, classes: (steps + 1, steps),
    "PGD": lambda steps, classes: (steps + 1, steps),
    "APGD": lambda steps, classes: (steps + 1, steps),
    "MIFGSM": lambda steps, classes: (steps + 1, steps),
    "NIFGSM": lambda steps, classes: (steps + 1, steps),
    "ODI": lambda steps, classes: (steps + 1, steps),
    "DeepFool": lambda steps, classes: (steps + 1, classes - 1 + (steps - 1) * min(4, classes - 1)),
    "FAB": lambda steps, classes: (steps + 1, classes - 1 + (steps - 1) * min(4, classes - 1)),
    "Square": lambda steps, classes: (steps + 1, 0),
    "HopSkipJump": lambda steps, classes: (steps + 1, 0),
    "Boundary": lambda steps, classes: (steps + 1, 0),
    "OrthogonalPGD": lambda steps, classes: (steps + 1, steps),  # of a model that does not reject
    "WeightedPGD": lambda steps, classes: (steps + 1, steps),
    "LogitMatching": lambda steps, classes: (steps + 1, steps - 1),
    "PatchSearch": lambda steps, classes: (steps + 1, 0),
    "HotFlip": lambda steps, classes: (steps + 1, 1),  # too few steps for a second round
    "SigmaZero": lambda steps, classes: (steps + 1, steps),
    "JSMA": lambda steps, classes: (steps + 1, steps * min(2, classes - 1)),
    "DDN": lambda steps, classes: (steps + 1, steps),
    "FMN": lambda steps, classes: (steps + 1, steps),
    "PDGD": lambda steps, classes: (steps + 1, steps),
    "PDPGD": lambda steps, classes: (steps + 1, steps),
    "SuperDeepFool": lambda steps, classes: (steps + 1, steps + min(10, classes - 1)),
    "ALMA": lambda steps, classes: (steps + 1, steps),
    "TrustRegion": lambda steps, classes: (steps + 1, steps + min(9, classes - 1)),
    "CarliniWagner": lambda steps, classes: (steps + 1, steps),
    "LBFGS": lambda steps, classes: (steps + 1, steps),
    "EAD": lambda steps, classes: (steps + 1, steps),
    "SparseFool": lambda steps, classes: (steps + 1, steps),
    "SPGD": lambda steps, classes: (steps + 1, steps),
    "LaVAN": lambda steps, classes: (steps + 1, steps),  # too few steps to look at windows
}


# --- what comes out --------------------------------------------------------------------------------------------------


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
    net, x = relu_net((6,)), inputs(5, *shape(name, 6))
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
        return self.net(x.flatten(1) * self.table)


@each_attack
def test_what_a_model_caches_stays_usable_for_training(name: str) -> None:
    model, x = Caching().eval(), inputs(5, *shape(name, 6))
    y = torch.zeros(5, dtype=torch.int64)
    mohs.attack(make(name), model, x, y, some_threat(name), aims=2)
    weighted = nn.Parameter(torch.ones(6)) * model.table  # a gradient through the cache
    model.net(x.flatten(1) * weighted).sum().backward()


# --- access and cost -------------------------------------------------------------------------------------------------


@each_attack
def test_declared_access_suffices_and_one_level_less_raises(name: str) -> None:
    net, x = relu_net((6,)), inputs(3, *shape(name, 6))
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
    threat = first_served(name, "linf:0.01", "l2:0.02", "l1:0.05", "l0:1", "patch:1", "words:1")
    out = mohs.attack(make(name), model, inputs(5, *shape(name, 6)), y, threat, batch=8)
    assert not out.success.any()
    forwards, backwards = COSTS[name](make(name).steps, classes)
    assert torch.equal(out.forwards, out.queries)
    if name in ("JSMA", "SparseFool"):  # a row that has no feature left to move ends
        assert max(out.forwards.tolist()) <= forwards
    else:
        assert out.forwards.tolist() == [forwards] * 5
    if name in (
        "DeepFool",
        "FAB",
        "JSMA",
        "SparseFool",
    ):  # a limit: classes that cannot be the nearest are not linearised
        assert max(out.backwards.tolist()) <= backwards
        assert (
            classes > 2
            or out.backwards.tolist() == [int(f) - 1 for f in out.forwards]
            or name in ("JSMA", "SparseFool")
        )
        assert (model.forwards, model.backwards) <= (forwards, backwards)
        assert int(out.backwards.max()) <= model.backwards <= int(out.backwards.sum())
    else:
        assert out.backwards.tolist() == [backwards] * 5
        assert (model.forwards, model.backwards) == (forwards, backwards)
    assert out.spent == int((out.forwards + out.backwards).sum())


EXACT = {  # of 2 classes that no change of 6 numbers in the box exchanges: (forwards, backwards), whatever the weights
    "DeepFool": (3, 3),  # to the corner; from there a step that gains nothing; one that the box leaves no coordinate
    "FAB": (5, 4),  # it goes on: one boundary per step
    "JSMA": (4, 4),  # three pairs, and a look at what is left
    "SparseFool": (2, 2),  # to the corner, and a look at what is left
}


@pytest.mark.parametrize("name", EXACT)
def test_limits_are_exact_where_the_way_is_known(name: str) -> None:
    model = Linear(6, 2)
    with torch.no_grad():
        model.bias[0] += 50.0
    counting, threat = Counting(model), first_served(name, "l2:inf", "l0:inf")
    out = mohs.attack(
        make(name), counting, inputs(5, *shape(name, 6)), torch.zeros(5, dtype=torch.int64), threat, batch=8
    )
    assert out.forwards.tolist() == [EXACT[name][0]] * 5
    assert out.backwards.tolist() == [EXACT[name][1]] * 5
    assert (counting.forwards, counting.backwards) == EXACT[name]


@pytest.mark.parametrize(("name", "cost"), [("DeepFool", (3, 2)), ("SparseFool", (3, 3))])
def test_a_linear_boundary_is_crossed_at_a_known_cost(name: str, cost: tuple[int, int]) -> None:
    model, x = Linear(8, 2, dtype=torch.float64), 0.5 + 0.01 * inputs(16, *shape(name, 8), dtype=torch.float64)
    settings = {"polish": 0} if name == "SparseFool" else {}
    threat = first_served(name, "l2:inf", "l0:inf") + ("" if name == "SparseFool" else " in [-inf, inf]")
    out = mohs.attack(make(name, steps=9, **settings), model, x, model(x).argmax(1), threat)
    assert out.success.all()
    assert out.forwards.tolist() == [cost[0]] * 16
    assert out.backwards.tolist() == [cost[1]] * 16


@each_attack
def test_rows_that_are_wrong_from_the_start_cost_one_look(name: str) -> None:
    net, x = relu_net((6,)), inputs(5, *shape(name, 6))
    if getattr(make(name), "random_start", False):
        pytest.skip("starts elsewhere")
    out = mohs.attack(make(name), net, x, (net(x).argmax(1) + 1) % 4, some_threat(name))
    assert out.success.all()
    assert torch.equal(out.x, x)
    assert out.forwards.tolist() == [1] * 5


# --- more is never less ----------------------------------------------------------------------------------------------


@each_case
def test_more_restarts_never_lose_a_success(name: str, threat: str) -> None:
    net, x = relu_net((12,)), inputs(32, *shape(threat, 12))
    y = net(x).argmax(1)
    one, four = (mohs.attack(make(name), net, x, y, threat, restarts=r, batch=32) for r in (1, 4))
    assert bool((four.success | ~one.success).all())
    assert bool((four.forwards >= one.forwards).all())


@each_attack
def test_a_larger_radius_never_loses_a_success_on_a_linear_model(name: str) -> None:
    if not REGISTRY[name].finite:
        pytest.skip("takes no radius")
    net, x = Linear(8, 3), inputs(64, *shape(name, 8))
    y = net(x).argmax(1)
    before = torch.zeros(64, dtype=torch.bool)
    norm = first_served(name, "linf:1", "l2:1", "l1:1", "l0:1", "patch:1", "words:1").split(":")[0]
    whole = {"l0": 8, "patch": 4, "words": 2}.get(norm)  # radii that are counts
    for eps in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        now = mohs.attack(
            make(name, random_start=False),
            net,
            x,
            y,
            f"{norm}:{round(whole * eps) if whole else eps}",
            restarts=1 if by_gradient(name) else 9,  # a search may stay where it is
        ).success
        assert bool((now | ~before).all())
        before = now
    assert bool(before.any())


@pytest.mark.parametrize("name", [n for n in REGISTRY if n != "FGSM"])  # it has no steps
def test_more_steps_never_lose_a_success(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = REGISTRY[name]
    known = {f.name for f in fields(attack)}
    length = {"step_size": 0.02} if attack.finite else {}  # elsewhere it is relative to the distance
    fixed = {k: v for k, v in (length | {"random_start": False}).items() if k in known}
    if not by_gradient(name):
        # its draws follow the number of steps as well, and so does the size of the squares: here, one number at a time
        monkeypatch.setattr(streams, "text_key", lambda text: 1)
        fixed |= {k: 1e-6 for k in ("share",) if k in known}
    net, x = relu_net((12,)), inputs(48, *shape(name, 12))
    y, threat = net(x).argmax(1), norms(name)[0]
    before = torch.zeros(48, dtype=torch.bool)
    for steps in (1, 2, 4, 8) if by_gradient(name) else (5, 10, 20, 40):
        now = mohs.attack(attack(steps=steps * (LABELS if by_label(name) else 1), **fixed), net, x, y, threat).success
        assert bool((now | ~before).all())
        before = now
    assert bool(before.any())
