"""Checks after the plan of what attacks climb and whom they attack: planted faults trip them, sound ones do not."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.evaluation import _afterwards, tactics
from mohs.evaluation._others import nearest_others
from mohs.evaluation.checks import _aimed, _climb
from mohs.evaluation.plans import Plan, PlanStep
from mohs.records import Record

SHAPE, N, EPS = (1, 4, 4), 24, 0.04


def plan(**settings: object) -> Plan:
    return Plan("one", (PlanStep.make("PGD", {"steps": 15} | settings),))


def evaluated(net: nn.Module, **settings: object) -> Record:
    x = inputs(N, *SHAPE, seed=5)
    with torch.no_grad():
        y = net(x).argmax(1)
    return mohs.evaluate(net, (x, y), f"linf:{EPS}", **{"plan": plan(), "control": 8, "adaptive": "off"} | settings)


def severities(record: Record) -> dict[str, str]:
    return {f.id: f.severity for f in record.header.checks}


def said(record: Record, id_: str) -> str:
    return next(f.saw for f in record.header.checks if f.id == id_)


@pytest.fixture(scope="module")
def sound() -> Record:
    """Projected gradient descent as it should be, on a net that is what it seems."""
    net = relu_net(SHAPE)
    net.trained_against = "APGD(steps=7)"
    return evaluated(net)


def test_a_sound_attack_trips_nothing(sound: Record) -> None:
    seen = severities(sound)
    assert [seen[id_] for id_ in ("step-size", "means-success", "climbs", "stand-in", "trained-against")] == ["ok"] * 5
    assert "steps 0.25 times as long break 0 of 6 survivors" in said(sound, "step-size")
    assert "go against each other for 0 of 6" in said(sound, "means-success")
    assert 0.2 < sound.robust_accuracy < 0.9, "else the checks have nothing to look at"


# ---- C3: step sizes, and does the objective rise? ---------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder that the other checks do not climb."""
    monkeypatch.setattr(_afterwards, "SUSPICIONS", ())
    monkeypatch.setattr(_afterwards, "NOT_ENOUGH", {})


@pytest.mark.usefixtures("quiet")
def test_steps_that_do_not_arrive_are_seen_and_mended() -> None:
    lame = plan(step_size=EPS / 400, random_start=False)
    record = evaluated(relu_net(SHAPE), plan=lame)
    assert severities(record)["step-size"] == "warn"
    mended = evaluated(relu_net(SHAPE), plan=lame, adaptive="declared")
    assert severities(mended)["step-size"] in ("ok", "info")
    assert mended.robust_accuracy < record.robust_accuracy
    assert ["step-size" in s.note for s in mended.header.plan.steps] == [False, True]


@pytest.mark.parametrize(
    ("paths", "severity"),
    [
        ([[0, 1, 2, 3], [0, 1, 0.5, 2]], "ok"),
        ([[0, -1, -2, -3], [0, -1, -1, -2], [0, 1, 2, 3]], "warn"),  # downhill
        ([[0, 1, -1, 1, -1, 0.5, -1, -2]] * 2, "warn"),  # to and fro
        ([[2, 2, 2, 2]] * 3, "ok"),  # no gradient at all is another check's matter
        ([[0, float("nan"), 1, 2]], "ok"),
        ([], "info"),
    ],
)
def test_loss_curves_that_fall_are_seen(paths: list[list[float]], severity: str) -> None:
    assert _climb.climbs([(0, i, 0, np.array(p)) for i, p in enumerate(paths)]).severity == severity


# ---- C7: objective and success --------------------------------------------------------------------------------


class Spread(nn.Module):
    """Where the first number grows, many classes gain a little each, and the only one that could win loses."""

    def forward(self, x: Tensor) -> Tensor:
        s = (x.flatten(1)[:, :1] - 0.5) / EPS
        return torch.cat([0 * s, -1 - 0.3 * s, (-6 + 4.5 * s).expand(-1, 48)], 1) + 0 * x.flatten(1).sum(
            1, keepdim=True
        )


def test_an_objective_that_rises_away_from_success_is_seen() -> None:
    x = inputs(N, *SHAPE)
    x[:, 0, 0, 0] = 0.5
    xy = x, torch.zeros(N, dtype=torch.int64)
    settings = {"control": 8, "adaptive": "off"}
    record = mohs.evaluate(Spread().eval(), xy, f"linf:{EPS}", plan=plan(random_start=False), **settings)
    assert severities(record)["means-success"] == "warn"
    assert "against each other for 6 of 6" in said(record, "means-success")
    record = mohs.evaluate(Spread().eval(), xy, f"linf:{EPS}", plan=plan(objective="margin"), **settings)
    assert severities(record)["means-success"] == "ok"


def test_rank_correlation() -> None:
    up = np.arange(5.0)
    assert _climb._ranked(up, np.exp(up)) == pytest.approx(1)
    assert _climb._ranked(up, -up) == pytest.approx(-1)
    assert _climb._ranked(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.9486833)
    assert np.isnan(_climb._ranked(up, np.ones(5)))


# ---- C9, D6: whom, and with what --------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("right", [True, False])
def test_a_stand_in_that_is_another_model_is_seen(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = relu_net(SHAPE)
    other = copy.deepcopy(net) if right else relu_net(SHAPE, seed=8)
    choice = tactics.Choice(tactics.Tactic("another", lambda model: other))
    monkeypatch.setattr(tactics, "choose", lambda *a, **k: choice)
    record = evaluated(net, adaptive="declared")
    assert severities(record)["stand-in"] == ("ok" if right else "warn")
    assert "which gave the gradients" in said(record, "stand-in")


def test_the_attack_of_the_training_is_no_test() -> None:
    net = relu_net(SHAPE)
    steps = [(None, PGD(steps=3)), (None, mohs.attacks.APGD(steps=3))]
    review = SimpleNamespace(run=SimpleNamespace(model=nn.Sequential(net)), steps=steps, attacks=[0])
    assert _aimed.trained_against(review).severity == "info"
    net.trained_against = "PGD(steps=7)"
    assert _aimed.trained_against(review).severity == "warn"
    review.attacks = [0, 1]
    assert _aimed.trained_against(review).severity == "ok"


# ---- C10: budgets ------------------------------------------------------------------------------------------------


def test_who_was_still_gaining_is_named() -> None:
    margins = {0: [-0.5, -0.5, -0.5, -0.5], 1: [-0.5, -0.4, -0.5, -0.49]}
    rows = {
        a: SimpleNamespace(example=np.arange(4 if a == 0 else 3), margin=np.array(m)[: 4 if a == 0 else 3])
        for a, m in margins.items()
    }
    record = SimpleNamespace(
        n=4, results=rows.__getitem__, examples=SimpleNamespace(id=np.arange(10, 14), clean_margin=np.ones(4))
    )
    review = SimpleNamespace(alive=np.array([True, True, True, False]), attacks=[0, 1], record=record)
    seen = _climb.settled(review)
    assert seen.severity == "info"
    assert "of 3 survivors, 1 gained" in seen.saw
    assert "and 0 had one attack only" in seen.saw
    assert "(gaining: 11)" in seen.saw
    review.alive = np.array([True, False, True, False])
    assert _climb.settled(review).severity == "ok"
    review.alive = np.array([True, False, False, True])
    assert "and 1 had one attack only" in _climb.settled(review).saw


# ---- D2: the answer alone -----------------------------------------------------------------------------------------


def test_starts_are_the_nearest_examples_with_another_answer() -> None:
    net, x = relu_net(SHAPE), inputs(40, *SHAPE, seed=2)
    answers = net(x).argmax(1)
    record: Any = SimpleNamespace(examples=SimpleNamespace(clean_label=answers.numpy()))
    run: Any = SimpleNamespace(
        x=x, y=answers, classes=4, threat=mohs.Threat.parse("l2:1"), settings=SimpleNamespace(reject=None)
    )
    rows = torch.tensor([3, 17])
    found = nearest_others(run, rows, record)
    for row, point in zip(rows.tolist(), found, strict=True):
        size = (x - x[row]).flatten(1).norm(dim=1).masked_fill(answers == answers[row], torch.inf)
        assert torch.equal(point, x[size.argmin()])
    run.classes, record.examples.clean_label = 1, np.zeros(40, int)
    run.y = torch.zeros_like(answers)
    assert torch.equal(nearest_others(run, rows, record), x[rows])
