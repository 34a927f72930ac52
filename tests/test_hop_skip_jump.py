"""HopSkipJump: closed forms, and nothing but the answer is ever read."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Linear, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import Access, Goal, Threat, streams
from mohs.attacks import HopSkipJump
from mohs.errors import UsageError


class OneHot(nn.Module):
    """The answers of a net and nothing else of it: 1 for the answer, noise below it for all other classes."""

    def __init__(self, net: nn.Module, noise: float = 0.0) -> None:
        super().__init__()
        self.net, self.noise = net, noise

    def forward(self, x: Tensor) -> Tensor:
        answer = nn.functional.one_hot(self.net(x).argmax(1), 4).to(x)
        noise = streams.uniform(streams.point_keys(x), (4,), dtype=x.dtype) * self.noise
        return torch.maximum(answer, noise)


@pytest.mark.parametrize("threat", ["l2:inf", "linf:inf"])
def test_the_distance_approaches_the_closed_form(threat: str) -> None:
    net, x = Linear(12, 2, dtype=torch.float64), 0.3 + 0.4 * inputs(8, 12, dtype=torch.float64)
    y = net(x).argmax(1)
    w = (net.weight[:, 1] - net.weight[:, 0]).detach()
    dual = w.norm() if threat == "l2:inf" else w.abs().sum()
    exact = net(x).detach().diff(dim=1).squeeze(1).abs() / dual
    found = mohs.attack(HopSkipJump(steps=600, votes=30), net, x, y, threat)
    ratio = found.size / exact
    assert bool((ratio >= 1 - 1e-9).all()), "nearer than the boundary"
    assert float(ratio.median()) < 1.1
    assert float(ratio.max()) < 1.3


@pytest.mark.parametrize("threat", ["l2:inf", "linf:inf"])
def test_more_queries_never_find_less(threat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        streams, "text_key", lambda text: 1
    )  # the number of steps is a part of the random stream's name
    net, x = relu_net((12,)), inputs(6, 12)
    y, last = net(x).argmax(1), torch.full((6,), torch.inf)
    for steps in (30, 90, 150):
        out = mohs.attack(HopSkipJump(steps=steps, votes=10), net, x, y, threat)
        assert bool((out.size <= last).all())
        assert bool((out.queries <= steps + 1).all())
        last = out.size
    assert bool(last.isfinite().all())


def test_nothing_but_the_answer_is_read() -> None:
    net, x = relu_net((12,)), inputs(6, 12)
    y, threat = net(x).argmax(1), Threat(mohs.L2(torch.inf), access=Access.LABEL)
    one, other = (mohs.attack(HopSkipJump(steps=100, votes=10), OneHot(net, noise), x, y, threat) for noise in (0, 0.5))
    assert bool(one.success.all())
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.queries, other.queries)
    with pytest.raises(mohs.errors.AccessError):
        mohs.attack(mohs.attacks.Square(steps=3), OneHot(net), x, y, Threat(mohs.L2(0.1), access=Access.LABEL))


@pytest.mark.parametrize("threat", ["l2:inf", "linf:0.3", "l2:0.9"])
def test_targets_are_reached_from_a_start_that_the_caller_gives(threat: str) -> None:
    net, pool = relu_net((12,)), inputs(200, 12, seed=4)
    answers = net(pool).argmax(1)
    x, y = pool[:8], answers[:8]
    targets = (y + 1) % 4
    start = torch.stack([pool[answers == t][0] for t in targets.tolist()])
    out = mohs.attack(HopSkipJump(steps=250, votes=20), net, x, y, threat, targets=targets, start=start)
    assert bool((net(out.x).argmax(1) == targets)[out.success].all())
    if threat == "l2:inf":
        assert bool(out.success.all())
        assert bool((out.size < 0.8 * (start - x).norm(dim=1)).all())
    else:
        assert int(out.success.sum()) >= 7
        region = Threat.parse(threat).region
        assert bool(region.contains(out.x, x, torch.full((8,), region.eps)).all())
        assert int(out.queries[out.success].min()) < 250, "a row ends once it is inside"


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.1", "linf:inf"])
def test_the_clean_input_is_looked_at_first_and_the_start_next_as_it_is(threat: str) -> None:
    seen: list[Tensor] = []
    net, pool = relu_net((12,)), inputs(60, 12, seed=4)

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return net(x)

    answers = net(pool).argmax(1)
    x, start = pool[:6], torch.stack([pool[answers != own][0] for own in answers[:6].tolist()])
    mohs.attack(HopSkipJump(steps=2), Noted(), x, answers[:6], threat, start=start, batch=6)
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], start)
    # what is wrong already needs no change, wherever the caller begins
    wrong = mohs.attack(HopSkipJump(steps=40), net, x, (answers[:6] + 1) % 4, threat, start=start)
    assert wrong.size.tolist() == [0.0] * 6
    assert wrong.queries.tolist() == [1] * 6


def test_a_confidence_is_refused_as_answers_do_not_show_it() -> None:
    net, x = Linear(6, 3), inputs(2, 6)
    with pytest.raises(UsageError, match="confidence"):
        mohs.attack(HopSkipJump(steps=5), net, x, net(x).argmax(1), "l2:inf", confidence=0.5)


def test_the_most_frequent_answer_of_several_draws_counts_and_nan_is_none() -> None:
    class Torn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            shout = self.calls % 3 == 0  # one draw in three is sure of class 1, the others lean to class 0
            return x.new_tensor([0.0, 90.0] if shout else [1.0, 0.0]).expand(len(x), 2)

    threat = Threat(mohs.L2(0.5), access=Access.LABEL, draws=3)
    out = mohs.attack(HopSkipJump(steps=4), Torn(), inputs(2, 5), torch.zeros(2, dtype=torch.int64), threat, average=3)
    assert not bool(out.success.any())
    goal = Goal.leave(torch.tensor([0, 0, 0]))
    assert goal.reached(torch.tensor([-1, 0, 2])).tolist() == [False, False, True]
    assert Goal.attain(torch.tensor([1, 1])).reached(torch.tensor([1, 0])).tolist() == [True, False]


def test_boxes_without_bounds_and_mistakes() -> None:
    net, x = Linear(6, 3), inputs(5, 6)
    out = mohs.attack(HopSkipJump(steps=150, votes=10), net, x, net(x).argmax(1), "l2:inf in [-inf, inf]")
    assert bool(out.success.all())
    for bad in ({"steps": 0}, {"votes": 0}):
        with pytest.raises(UsageError, match="HopSkipJump"):
            HopSkipJump(**bad)


class Seen(nn.Module):
    """Wrong where ``lead`` is above 0, but for the looks ``deaf``, which are all answered rightly; notes points and answers."""

    def __init__(self, normal: Tensor, shift: float, deaf: range = range(0)) -> None:
        super().__init__()
        self.normal, self.shift, self.deaf = normal, shift, deaf
        self.points, self.wrong = list[Tensor](), list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        lead = x @ self.normal - self.shift
        if len(self.points) in self.deaf:
            lead = -lead.abs()
        self.points.append(x[0].clone())
        self.wrong.append(bool(lead > 0))
        return torch.stack([torch.zeros_like(lead), lead], 1)


def followed(x0: Tensor, model: Seen, votes: int, norm: str) -> list[str]:
    """Algorithms 1 and 2 of the paper for one row, over the looks that were seen: is each where those before it say? Which
    stages were come through."""
    looks, count, width, done = iter(zip(model.points, model.wrong, strict=True)), x0.numel(), 1e-3, list[str]()

    def size(v: Tensor) -> float:
        return float(v.norm() if norm == "l2" else v.abs().max())

    def towards(far_point: Tensor, length: float) -> Tensor:
        way = far_point - x0
        return x0 + (way * length / size(way) if norm == "l2" else way.clamp(-length, length))

    def look(expected: Tensor) -> bool:
        point, wrong = next(looks)
        assert torch.allclose(point, expected, rtol=0, atol=1e-6), done
        return wrong

    assert not look(x0)
    kept, wrong = next(looks)
    t, found, far = 0, wrong, size(kept - x0)
    try:
        while True:
            if found:
                low, high, far = 0.0, 1.0, size(kept - x0)
                while high - low > width:
                    middle = (low + high) / 2
                    low, high = (low, middle) if look(towards(kept, middle * far)) else (middle, high)
                kept, far = towards(kept, high * far), high * far
                done.append("search")
            t, u, phi = t + 1, list[Tensor](), list[float]()
            delta = float((kept - x0).norm()) / count
            while len(u) < votes * math.sqrt(t):
                point, wrong = next(looks)
                u.append((point - kept) / delta)
                assert float(u[-1].norm()) == pytest.approx(1, abs=1e-5)
                phi.append(1.0 if wrong else -1.0)
            agreed = len(set(phi)) == 1
            weights = torch.tensor(phi, dtype=x0.dtype) - (0 if agreed else sum(phi) / len(phi))
            v = weights @ torch.stack(u)
            v = v / v.norm() if norm == "l2" else v.sign()
            done.append("agreed" if agreed else "voted")
            leap, found, halved = far / math.sqrt(t), False, 0
            while leap > width * far and not found:
                found = look(kept + leap * v)
                kept = kept + leap * v if found else kept
                leap, halved = leap / 2, halved + (not found)
            done.append(f"leapt, halved {min(halved, 1)}" if found else "no leap")
    except StopIteration:
        return done


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    ("deaf", "stages"),
    [
        (range(0), {"leapt, halved 0"}),
        (range(43, 46), {"leapt, halved 1"}),  # the second leap
        (range(31, 80), {"agreed", "no leap"}),  # its votes and all of its halves
    ],
    ids=["honest", "a leap of eight", "no leap"],
)
def test_every_look_is_where_the_algorithm_has_it(norm: str, deaf: range, stages: set[str]) -> None:
    normal = torch.tensor([1.0, -0.5, 0.3, 0.8, -0.2, 0.6], dtype=torch.float64)
    x = torch.full((1, 6), 0.1, dtype=torch.float64)
    start = torch.tensor([[0.9, 1.5, 0.4, 1.8, -0.3, 0.2]], dtype=torch.float64)
    model, zero = Seen(normal, 1.0, deaf), torch.zeros(1, dtype=torch.int64)
    attack, threat = HopSkipJump(steps=300, votes=8), f"{norm}:inf in [-99, 99]"
    out = mohs.attack(attack, model, x, zero, threat, start=start, batch=1)
    assert len(model.points) == int(out.queries) == 301
    done = followed(x[0], model, 8, norm)
    assert {"search", "voted"} | stages <= set(done), done


def test_a_start_that_is_right_is_gone_beyond() -> None:
    normal, x = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0, 0.5, 0.5]])
    model, zero = Seen(normal, 0.7), torch.zeros(1, dtype=torch.int64)
    start = x + torch.tensor([[0.1, 0.0, 0.0]])
    out = mohs.attack(HopSkipJump(steps=60, votes=5), model, x, zero, "l2:inf", start=start, batch=1)
    assert [round(float(p[0]), 6) for p in model.points[:5]] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert float(out.size) == pytest.approx(0.7, rel=2e-3)
