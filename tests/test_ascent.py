"""Attacks that climb inside a ball: APGD, MI-FGSM, NI-FGSM and ODI beside closed forms and their papers; and rankings of aims."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_models import Counting, Linear, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Goal, Threat
from mohs.attacks import APGD, BIM, MIFGSM, NIFGSM, ODI, PGD, Job, by_distance, by_logit
from mohs.attacks.apgd import sparse_move
from mohs.errors import ThreatError, UsageError
from mohs.objectives import dlr, margin

FREE = " in [-inf, inf]"


def distances(net: Linear, x: Tensor, y: Tensor, threat: str, box: tuple[float, float]) -> Tensor:
    """The exact distance of each row to its nearest boundary, inside the box."""
    region, z = Threat.parse(threat).region, net(x).detach()
    sizes = []
    for c in range(z.shape[1]):
        w = (net.weight[:, c].detach() - net.weight.detach().T[y]).view_as(x)
        gap = z.gather(1, y.unsqueeze(1)).squeeze(1) - z[:, c]
        r = region.shortest(w, gap, x, box)
        reached = (w * r).flatten(1).sum(1) >= gap * 0.999
        sizes.append(region.measure(x + r, x).masked_fill((c == y) | ~reached, math.inf))
    return torch.stack(sizes).amin(0)


# --- APGD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [margin, dlr, APGD().objective], ids=repr)
@pytest.mark.parametrize("free", [False, True], ids=["box", "no box"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l3"])
def test_apgd_breaks_a_linear_model_just_beyond_the_exact_distance_and_not_below(
    norm: str, free: bool, objective: object
) -> None:
    net, x = Linear(20, 3, dtype=torch.float64), inputs(60, 20, dtype=torch.float64)
    y = net(x).argmax(1)
    box = (-math.inf, math.inf) if free else (0.0, 1.0)
    exact = distances(net, x, y, f"{norm}:1", box)
    near = exact < 3.0
    assert int(near.sum()) > 40
    x, y, exact = x[near], y[near], exact[near]
    slack = 1.15 if norm == "l3" else 1.03  # l3 projects radially, not to the nearest point
    threat = f"{norm}:1" + (FREE if free else "")
    above, below = (
        mohs.attack(APGD(60, objective=objective), net, x, y, threat, eps=exact * f, aims=2) for f in (slack, 0.999)
    )
    assert float(above.success.double().mean()) > (0.9 if objective is dlr else 0.95)
    assert not below.success.any()


def test_the_checkpoints_are_the_papers() -> None:
    assert list(APGD(100).checkpoints) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert [APGD(100).checkpoints[k] for k in (22, 41, 57, 99)] == [22, 19, 16, 6]
    assert list(APGD(25).checkpoints) == [0, 6, 11, 15, 18, 20, 22, 24, 25]
    assert list(APGD(1).checkpoints) == [0, 1]


def apgd_to_the_letter(net: nn.Module, x0: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Algorithm 1 in Linf for one row, as printed; the margin at every look."""

    def look(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_(True)
        z = net(x.unsqueeze(0))[0]
        value = torch.cat([z[:y], z[y + 1 :]]).max() - z[y]
        (g,) = torch.autograd.grad(value, x)
        return float(value.detach()), g

    def project(x: Tensor) -> Tensor:
        return x.clamp(x0 - eps, x0 + eps).clamp(0, 1)

    marks = [w for w in (22, 41, 57, 70, 80, 87, 93, 99) if w < steps]
    size, x, last = 2 * eps, x0, x0
    value, g = look(x)
    best, slope, top = x, g, value
    values, rises, mark, before, halved = [value], 0, 0, value, True
    for k in range(steps):
        z = project(x + size * g.sign())
        new = z if k == 0 else project(x + 0.75 * (z - x) + 0.25 * (x - last))
        last, x = x, new
        new_value, g = look(x)
        rises, value = rises + (new_value > value), new_value
        values.append(value)
        if value > top:
            best, slope, top = x, g, value
        if k + 1 in marks:
            # after the first checkpoint there is none before it to compare with
            halved_now = rises <= 0.75 * (k + 1 - mark) or (not halved and top <= before)
            if halved_now:
                size, x, g = size / 2, best, slope
            halved, before, rises, mark = halved_now, top, 0, k + 1
    return torch.tensor(values)


def test_apgd_is_its_algorithm_box() -> None:
    net, x = conv_net().double(), inputs(4, 1, 12, 12, dtype=torch.float64)
    y = net(x).argmax(1)
    out = mohs.attack(APGD(100, random_start=False, objective=margin), net, x, y, "linf:0.01", trace=True)
    for i in range(4):
        want = apgd_to_the_letter(net, x[i], y[i], 0.01, 100)
        torch.testing.assert_close(out.trace[i, 0].double(), want.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("rises", "gained", "halved", "want"),
    [
        (16, True, False, True),  # 16 of 22 steps are no more than three quarters
        (17, True, False, False),
        (17, True, True, False),
        (17, False, False, True),  # neither the step nor the best value has changed since the last checkpoint
        (17, False, True, False),  # the step has
    ],
)
def test_when_apgd_halves_its_step(rises: int, gained: bool, halved: bool, want: bool) -> None:
    net, x = Linear(6, 2, dtype=torch.float64), inputs(4, 6, dtype=torch.float64)
    problem, attack = problem_of(net, x, net(x).argmax(1), "linf:0.1"), APGD(100, objective=margin)
    state = attack.init(problem)
    none = torch.zeros_like(problem.eps)
    top = none + 1e6  # so that the look of this step is no rise
    state = replace(
        state, rises=none + rises, top=top, lead=top, value=top, before=top - int(gained), halved=none < int(halved),
        size=none + 0.05, best=x, slope=torch.ones_like(x),
    )  # fmt: skip
    new = attack.step(problem, state, 22)
    assert new.halved.tolist() == [want] * 4
    assert new.size.tolist() == [0.025 if want else 0.05] * 4
    assert torch.equal(new.last, x if want else state.x)
    assert not new.rises.any()
    assert torch.equal(new.before, top)


def test_the_stages_and_checkpoints_of_l1_are_the_papers() -> None:
    attack = APGD(100)
    assert [attack._stage(k) for k in (0, 29, 30, 59, 60, 99)] == [
        (0, 2, 3.0), (0, 2, 3.0), (30, 2, 2.0), (30, 2, 2.0), (60, 2, 1.0), (60, 2, 1.0),
    ]  # fmt: skip
    net, x = Linear(400, 2, dtype=torch.float64), inputs(2, 400, dtype=torch.float64)
    problem = problem_of(net, x, net(x).argmax(1), "l1:2")
    state = attack.init(problem)
    assert bool((state.spread > 20).all())  # a uniform point of the ball has nearly all of them
    assert bool((state.spread < 90).all())
    assert bool(((state.x - x).abs().sum(1) <= 6 * (1 + 1e-9)).all())
    assert state.size.tolist() == [6.0, 6.0]
    best = x.clone()
    best[:, :30] = 1 - best[:, :30].round()
    high = torch.full_like(problem.eps, 1e6)
    state = replace(state, best=best, top=high, lead=high, value=high, size=high * 0 + 3, slope=torch.ones_like(x))
    # sparser than at the last checkpoint by 5%: the whole step again, from the best point; else a smaller step
    new = attack.step(problem, replace(state, spread=torch.tensor([40.0, 30.0], dtype=torch.float64)), 32)
    assert new.spread.tolist() == [30, 30]
    assert new.width.tolist() == [20, 20]
    assert new.size.tolist() == [4.0, 2.0]
    small = attack.step(problem, replace(state, spread=high * 0 + 30, size=high * 0 + 0.42), 34)
    assert small.size.tolist() == [0.4, 0.4]  # no less than a tenth of the radius
    # into a smaller ball: from the best point, with steps that move two thirds of what it changes
    new = attack.step(problem, state, 60)
    moved = (new.x != x).sum(1)
    assert bool((moved < 30).all())
    torch.testing.assert_close((new.x - x).abs().sum(1), problem.eps)
    assert new.size.tolist() == [2.0, 2.0]
    torch.testing.assert_close(new.width, moved / 1.5, check_dtype=False)


def test_an_l1_step_moves_the_steepest_coordinates_that_the_box_lets_go() -> None:
    x, g = torch.tensor([[1.0, 0.5, 0.0, 0.5]]), torch.tensor([[9.0, -2.0, -5.0, 1.0]])
    one, two = (sparse_move(x, g, torch.tensor([0.2]), torch.tensor([w]), (0.0, 1.0)) for w in (1.9, 2.0))
    torch.testing.assert_close(one - x, torch.tensor([[0.0, -0.2, 0.0, 0.0]]))
    torch.testing.assert_close(two - x, torch.tensor([[0.0, -0.1, 0.0, 0.1]]))


def test_the_first_l1_stages_are_wider_but_nothing_outside_counts() -> None:
    net, x = relu_net((40,)), inputs(40, 40)
    y = net(x).argmax(1)
    out = mohs.attack(APGD(20), net, x, y, "l1:0.8")
    assert 0 < int(out.success.sum()) < 40
    assert bool((out.size[out.success] <= 0.8 * (1 + 1e-5)).all())
    assert bool(((out.x - x).abs().flatten(1).sum(1) <= 0.8 * (1 + 1e-4)).all())


@pytest.mark.parametrize("norm", ["linf:0.02", "l2:0.1", "l1:0.5"])
def test_apgd_is_no_weaker_than_pgd(norm: str) -> None:
    net, x = conv_net(), inputs(96, 1, 12, 12)
    y = net(x).argmax(1)
    count = [int(mohs.attack(a, net, x, y, norm).success.sum()) for a in (APGD(40), PGD(40))]
    assert 0 < count[0] < 96
    assert count[0] >= count[1]


def test_apgd_climbs_where_every_value_is_the_same() -> None:
    # saturated cross-entropy: the values tie at zero, the margins do not
    net, x = relu_net((12,)), inputs(40, 12)
    y = net(x).argmax(1)
    loud = nn.Sequential(net, Times(1e6))
    cross = mohs.objectives.cross_entropy
    quiet, at_once = (mohs.attack(APGD(30, objective=cross), m, x, y, "linf:0.05") for m in (net, loud))
    assert int(at_once.success.sum()) >= int(quiet.success.sum()) - 1 > 0


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_apgd_goes_on_from_given_points() -> None:
    net, x = conv_net(), inputs(16, 1, 12, 12)
    y = net(x).argmax(1)
    first = mohs.attack(APGD(20, objective=margin), net, x, y, "linf:0.003", stop=mohs.Stop.BUDGET)
    again = mohs.attack(APGD(20, objective=margin), net, x, y, "linf:0.003", start=first.x, stop=mohs.Stop.BUDGET)
    assert bool((again.margin >= first.margin - 1e-6).all())


def test_apgd_has_no_l0() -> None:
    net, x = relu_net((6,)), inputs(3, 6)
    with pytest.raises(ThreatError):
        mohs.attack(APGD(), net, x, net(x).argmax(1), "l0:2")


def test_aims_count_every_wrong_class() -> None:
    # one library counts only the class aimed at, and loses rows that cross into a third one
    net, x = relu_net((12,)), inputs(60, 12)
    y = net(x).argmax(1)
    out = mohs.attack(APGD(20), net, x, y, "linf:0.1", aims=1, rank=lambda p, n: p.look(p.x0).logits.argsort(1)[:, :n])
    aimed = net(x).argsort(1)[:, 0]
    hit = net(out.x).argmax(1)
    assert bool((out.success & (hit != aimed)).any())


# --- momentum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", ["linf:0.05", "l2:0.3"])
def test_without_decay_momentum_is_bim(threat: str) -> None:
    net, x = conv_net(), inputs(12, 1, 12, 12)
    y = net(x).argmax(1)
    runs = [
        mohs.attack(a, net, x, y, threat, stop=mohs.Stop.BUDGET).x for a in (BIM(), MIFGSM(decay=0), NIFGSM(decay=0))
    ]
    torch.testing.assert_close(runs[1], runs[0])
    torch.testing.assert_close(runs[2], runs[0])


@pytest.mark.parametrize("nesterov", [False, True], ids=["MI", "NI"])
def test_momentum_is_the_papers(nesterov: bool) -> None:
    net, x = conv_net().double(), inputs(5, 1, 12, 12, dtype=torch.float64)
    y, eps, steps, decay = net(x).argmax(1), 0.02, 6, 0.9
    attack = (NIFGSM if nesterov else MIFGSM)(steps, decay=decay)
    out = mohs.attack(attack, net, x, y, f"linf:{eps}", trace=True)
    here, m, losses = x, torch.zeros_like(x), []
    for _ in range(steps):
        at = here + nesterov * eps / steps * decay * m
        at = at.clamp(x - eps, x + eps).clamp(0, 1).requires_grad_(True)
        loss = nn.functional.cross_entropy(net(at), y, reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), at)
        m = decay * m + g / g.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        here = (here + eps / steps * m.sign()).clamp(x - eps, x + eps).clamp(0, 1)
        losses.append(loss.detach())
    losses.append(nn.functional.cross_entropy(net(here), y, reduction="none").detach())
    torch.testing.assert_close(out.trace[:, 0], torch.stack(losses, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("attack", [MIFGSM(), NIFGSM()], ids=repr)
def test_momentum_does_not_see_the_scale_of_the_gradient(attack: MIFGSM) -> None:
    net, x = relu_net((12,)), inputs(30, 12)
    y = net(x).argmax(1)
    faint = mohs.attack(attack, nn.Sequential(net, Times(1e-25)), x, y, "linf:0.1", stop=mohs.Stop.BUDGET)
    plain = mohs.attack(attack, net, x, y, "linf:0.1", stop=mohs.Stop.BUDGET)
    assert bool(plain.success.any())
    assert torch.equal(faint.success, plain.success)


# --- ODI --------------------------------------------------------------------------------------------------------------


class Decoy(nn.Module):
    """The way up is a hill that never wins; the class that can win is far below until the very corner."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        return torch.stack([torch.ones_like(a), 0.5 + 0.4 * a - 0.4 * b, 8 * (b - a) - 6.5], 1)


def test_diversified_starts_find_what_random_ones_miss() -> None:
    x = torch.full((64, 2), 0.5) + 0.01 * inputs(64, 2)
    y = torch.zeros(64, dtype=torch.int64)
    plain, spread = (mohs.attack(a, Decoy(), x, y, "linf:0.49", restarts=2) for a in (PGD(22, objective=margin), ODI()))
    assert int(spread.success.sum()) > int(plain.success.sum()) + 5


def test_odi_without_its_start_is_pgd() -> None:
    net, x = conv_net(), inputs(8, 1, 12, 12)
    y = net(x).argmax(1)
    a = mohs.attack(ODI(10, random_start=False), net, x, y, "linf:0.05", stop=mohs.Stop.BUDGET)
    b = mohs.attack(PGD(10, random_start=False, objective=margin), net, x, y, "linf:0.05", stop=mohs.Stop.BUDGET)
    assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("make", [lambda: ODI(diversify=-1), lambda: MIFGSM(decay=-1), lambda: APGD(steps=0)])
def test_settings_are_checked(make: object) -> None:
    with pytest.raises(UsageError):
        make()


# --- rankings ---------------------------------------------------------------------------------------------------------


def problem_of(net: nn.Module, x: Tensor, y: Tensor, threat: str) -> mohs.problem.Problem:
    job = Job(PGD(), net, x, y, Threat.parse(threat))
    index = torch.arange(len(x))
    problem = job.problem(index, torch.zeros_like(index))
    assert isinstance(problem.goal, Goal)
    return problem


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l3"])
def test_by_distance_is_exact_on_linear_models(norm: str) -> None:
    net, x = Linear(20, 6, dtype=torch.float64), inputs(40, 20, dtype=torch.float64)
    y = net(x).argmax(1)
    ranked = by_distance(problem_of(net, x, y, f"{norm}:1"), 5)
    z, region = net(x).detach(), Threat.parse(f"{norm}:1").region
    for i in range(40):
        w = net.weight.detach().T - net.weight.detach()[:, y[i]]
        size = (z[i, y[i]] - z[i]) / region.dual(w).clamp_min(1e-12)
        others = [c for c in size.argsort().tolist() if c != int(y[i])]
        assert ranked[i].tolist() == others
    if norm == "l2":
        assert not torch.equal(ranked, by_logit(problem_of(net, x, y, "l2:1"), 5))


def test_a_ranking_pays_for_its_looks() -> None:
    net, x = relu_net((6,), classes=7), inputs(5, 6)
    model = Counting(net)
    problem = problem_of(model, x, net(x).argmax(1), "linf:0.1")
    assert by_distance(problem, 2, candidates=4).shape == (5, 2)
    assert problem.found.forwards.tolist() == [1] * 5
    assert problem.found.backwards.tolist() == [4] * 5
    assert (model.forwards, model.backwards) == (1, 4)
    with pytest.raises(UsageError, match="at most 6"):
        by_distance(problem, 7)


def test_classes_that_have_won_come_first_and_those_without_gradient_last() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = x.sum(1)
            return torch.stack([s, s.detach() - 0.01 + s, s + 1.0, 2 * s], 1)

    x = torch.full((2, 3), 1.0 / 3)
    ranked = by_distance(problem_of(Mixed(), x, torch.zeros(2, dtype=torch.int64), "linf:0.1"), 3)
    assert ranked[0, 0] in (2, 3)  # both have won
    assert set(ranked[0].tolist()) == {1, 2, 3}


def test_true_is_no_number() -> None:
    with pytest.raises(UsageError, match="finite number above 0; got True"):
        mohs.attacks.PGD(step_size=True)
