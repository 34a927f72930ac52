"""What an evaluation must not say: that luck broke a random model, or that a model no attack could follow is upheld."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.evaluation import _layers, tactics
from mohs.evaluation.checks import Probe, examine
from mohs.evaluation.plans import Plan, PlanStep
from mohs.gradients import FiniteDifference
from mohs.models import BlackBox
from mohs.threat import Access, Threat


def points(n: int = 48, d: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(3))
    return x, (x.sum(1) > d / 2).long()


class Coin(nn.Module):
    """Right with probability 0.7 whatever the change: nothing can be done to it, and luck looks like a break."""

    def forward(self, x: Tensor) -> Tensor:
        right = (x.sum(1) > x.shape[1] / 2).long()
        answer = torch.where(torch.rand(len(x)) < 0.7, right, 1 - right)
        return nn.functional.one_hot(answer, 2).float() + 0 * x.sum(1, keepdim=True)


def short(**settings: object) -> Plan:
    return Plan("short", (PlanStep.make("PGD", {"steps": 30}, restarts=3), PlanStep.make("Square", {"steps": 60})))


def test_luck_breaks_no_random_model() -> None:
    x, y = points()
    # too small a radius to change which side an input lies on, for all but a few
    sure = (x.sum(1) - 6).abs() > 0.05
    data = (x[sure], y[sure])
    found = mohs.attack(
        mohs.attacks.PGD(steps=30), Coin().eval(), *data, Threat(mohs.Linf(0.001), draws=20), restarts=3
    )
    assert int(found.success.sum()) > 3, (
        "of many points put before the judge some must win by luck, or this tests nothing"
    )
    record = mohs.evaluate(Coin().eval(), data, "linf:0.001", plan=short(), control=0, claim="accuracy >= 0.8")
    assert record.clean_accuracy >= 0.95
    assert record.robust_accuracy >= 0.95
    assert record.verdict is not None
    assert record.verdict.word != "refuted"


def test_what_random_start_breaks_lifts_no_block() -> None:
    class Cliff(nn.Module):
        """Every input can be broken, and no gradient says where."""

        def forward(self, x: Tensor) -> Tensor:
            side = (x[:, :1] > 0.5).float()
            return torch.cat([1 - side, side], 1) + 0 * x.sum(1, keepdim=True)

    x = torch.rand(64, 6, generator=torch.Generator().manual_seed(1))
    x[:, 0] = torch.linspace(0.42, 0.58, 64)
    y = (x[:, 0] > 0.5).long()
    threat = Threat.parse("linf:0.1")
    probe = Probe(Cliff().eval(), x, y, threat, batch=64)
    findings = examine(probe)
    choice = tactics.choose(probe, findings, threat, 0, 64)
    first, chosen = choice.trials[0], next(t for t in choice.trials if t.tactic is choice.tactic)
    after = {f.id: f.severity for f in tactics.remedied(findings, choice)}
    assert after["zero-gradient"] == ("block" if chosen is first else "warn")
    assert chosen is first or chosen.broken >= first.broken + tactics.CLEARLY


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        raise NotImplementedError("no backward here")


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Refusing.apply(x)


def test_a_backward_pass_that_raises_ends_in_a_finding() -> None:
    x, _ = points()
    net = nn.Sequential(Refuses(), nn.Linear(12, 2)).eval()
    record = mohs.evaluate(net, (x, net[1](x).argmax(1)), "linf:0.1", plan=short(), control=0)
    assert any(f.id == "no-gradient" and f.severity in ("block", "warn") for f in record.header.checks)
    assert record.header.status == "complete"


def test_layers_that_keep_the_shape_of_the_whole_model_are_not_the_model() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.round())

    x, _ = points(16, 2)
    net = Root().eval()
    assert _layers.losing(net, x) == []
    record = mohs.evaluate(net, (x, net(x).argmax(1)), "linf:0.3", plan=short(), control=0)
    assert "straight through roundings" in [t.name for t in record.header.tactics]


def test_a_trace_leaves_no_gradients() -> None:
    hidden = [torch.randn(12, 12, requires_grad=True)]

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x @ hidden[0])

    _layers.trace(Loose().eval(), points()[0][:4])
    assert hidden[0].grad is None


def test_a_black_box_is_not_tried_out() -> None:
    asked: list[int] = []

    def answers(x: np.ndarray) -> np.ndarray:
        asked.append(len(x))
        return np.stack([6 - x.sum(1), x.sum(1) - 6], 1)

    record = mohs.evaluate(BlackBox(answers), points(), "linf:0.1", control=0)
    assert record.header.tactics == []
    assert any(f.id == "no-gradient" and f.severity == "block" for f in record.header.checks)
    assert sum(asked) < 30 * 256, "checks only, a dozen batches"


def test_looks_around_a_point_are_not_hidden_from_a_limit_of_queries() -> None:
    x, y = points()
    net = nn.Linear(12, 2).eval()
    threat = Threat(mohs.Linf(0.1), access=Access.LOGIT, queries=10)
    with pytest.raises(mohs.errors.UsageError, match="10 queries"):
        mohs.attack(mohs.attacks.PGD(steps=3), net, x, y, threat, guide=FiniteDifference(net, 0.1, 4))


@pytest.mark.parametrize(("queries", "average"), [(5, 10), (25, 10), (30, 10)])
def test_an_average_stays_within_the_limit(queries: int, average: int) -> None:
    x, y = points()
    threat = Threat(mohs.Linf(0.001), queries=queries, draws=20)
    found = mohs.attack(mohs.attacks.PGD(steps=8), Coin().eval(), x, y, threat, average=average)
    assert int(found.queries.max()) <= queries


def test_an_attack_on_a_model_that_rejects_has_to_be_told() -> None:
    x, y = points()
    nets = [nn.Linear(12, 2).eval() for _ in range(2)]
    model = defenses.RejectDisagreement()(*nets).eval()
    y = nets[0](x).argmax(1)
    free = mohs.attack(mohs.attacks.PGD(steps=20), model, x, y, "linf:0.2")
    strict = mohs.attack(mohs.attacks.PGD(steps=20), model, x, y, "linf:0.2", reject=2)
    assert int(strict.success.sum()) < int(free.success.sum())
    assert bool((model(strict.x[strict.success]).argmax(1) < 2).all())


def test_an_exam_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(mohs.errors.ThreatError, match="radius above 0"):
        mohs.evaluate(nn.Linear(12, 2).eval(), points(), "linf:0", exam=4)
