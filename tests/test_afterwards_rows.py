"""Checks after the plan that need rows alone: planted rows trip them, sound ones do not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

from mohs.attacks import APGD, PGD, Square
from mohs.evaluation.checks import _ablation, _consistency, _convergence, _validity
from mohs.evaluation.plans import PlanStep
from mohs.records.schema import CurvePoint
from mohs.regions import Linf
from mohs.threat import Access, Threat

SHAPE, N = (1, 4, 4), 24


def review(wins: dict[int, list[int]] | None = None, steps: list[Any] | None = None, **more: Any) -> Any:
    """What a review shows to a check, made up: who was broken by which attack."""
    wins, net = wins or {}, relu_net(SHAPE)
    x = (inputs(N, *SHAPE, seed=3) * 255).round() / 255

    def won(attacks: list[int]) -> np.ndarray:
        flags = np.zeros(N, dtype=bool)
        flags[[i for a in attacks for i in wins.get(a, [])]] = True
        return flags

    steps = steps or []
    blind = [a for a, (_, attack) in enumerate(steps) if isinstance(attack, Square)]
    settings = {
        "won": won, "steps": steps, "attacks": list(range(len(steps))), "control": np.arange(N), "blind": blind,
        "sighted": [a for a in range(len(steps)) if a not in blind], "alive": ~won(list(wins)), "closed": "",
        "threat": Threat.parse("linf:0.1"), "strongest": None,
        "run": SimpleNamespace(model=net, x=x, y=net(x).argmax(1), batch=8, seed=0, classes=4, settings=SimpleNamespace(reject=None)),
    }  # fmt: skip
    return SimpleNamespace(**settings | more)


def step(attack: Any, **settings: Any) -> tuple[PlanStep, Any]:
    return PlanStep.make(type(attack).__name__, {"steps": attack.steps}, **settings), attack


PLAN = [step(APGD(steps=10)), step(PGD(steps=10), aims=3), step(Square(steps=10))]


@pytest.mark.parametrize(
    ("wins", "severity"),
    [
        ({0: [0, 1, 2], 1: [1], 2: [0]}, "ok"),
        ({0: [0, 1, 2], 2: [3]}, "info"),
        ({0: [0, 1, 2], 2: [3, 4, 5]}, "warn"),
    ],
)
def test_masking_counts_who_only_fell_without_gradients(wins: dict[int, list[int]], severity: str) -> None:
    seen = _consistency.masking(review(wins, PLAN))
    assert seen.severity == severity
    assert f"break {len(set(wins[2]) - set(wins[0]))} of {N} examples" in seen.saw


@pytest.mark.parametrize(
    ("wins", "severity"), [({0: [0, 1], 1: [0, 1]}, "ok"), ({0: [0, 1], 1: [2, 3]}, "info"), ({0: [5]}, "info")]
)
def test_aims_are_compared_per_example(wins: dict[int, list[int]], severity: str) -> None:
    assert _consistency.aims(review(wins, PLAN)).severity == severity


def test_kinds_of_attacks_are_counted() -> None:
    assert _consistency.families(review({}, PLAN)).severity == "ok"
    alike = [step(PGD(steps=5)), step(PGD(steps=50)), step(PGD(steps=500))]
    seen = _consistency.families(review({}, alike))
    assert (seen.severity, seen.saw[:24]) == ("info", "3 attacks, of 1 kind by ")
    assert _consistency.families(review({0: list(range(N))}, alike)).severity == "ok", "nobody is left to fail on"


def test_good_and_turing_count_what_one_attack_alone_found() -> None:
    wins = {0: [0, 1, 2, 3], 1: [0, 1, 2, 4], 2: [5]}
    tried = SimpleNamespace(success=torch.zeros(6, dtype=torch.bool))
    seen = _convergence.restarts(
        review(
            wins, PLAN, strongest=(0, APGD(steps=10)), start=lambda rows: None, manner={"restarts": 1, "aims": 0},
            near=lambda n: torch.arange(6), afford=lambda *a, **k: 6,
            tried=lambda *a, **k: tried,
        )
    )  # fmt: skip
    assert seen.severity == "ok"
    # 3 and 4 by one of the two strong attacks; the weak third is no peer of theirs
    assert "2 of 24 examples of the control subset were broken by just one of 2" in seen.saw
    assert f"{2 / 2 / N:.2%}" in seen.saw


@pytest.mark.parametrize(
    ("new", "of", "severity"),
    [
        (0, 16, "ok"), (1, 1, "info"), (1, 6, "info"), (1, 64, "info"), (2, 6, "warn"), (2, 64, "warn"), (16, 16, "warn"),
        (2, 100, "info"), (3, 100, "warn"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("check", [_convergence.one_step, _ablation.transfer], ids=["one-step", "transfer"])
def test_one_break_by_a_lesser_attack_is_no_suspicion(check: Any, new: int, of: int, severity: str) -> None:
    tail = sum(math.comb(of, k) * 0.002**k * 0.998 ** (of - k) for k in range(new, of + 1))
    assert (tail < 0.01 and new > 1) == (severity == "warn"), "the table above is that of the exact test"
    tried = SimpleNamespace(success=torch.arange(of) < new)
    made = review(
        {0: [0]}, PLAN, strongest=(0, APGD(steps=10)), inner=(relu_net(SHAPE), "layer 0"),
        record=SimpleNamespace(correct=np.ones(N, dtype=bool)),
        near=lambda *a: torch.arange(of), afford=lambda *a, **k: of, tried=lambda *a, **k: tried,
    )  # fmt: skip
    assert check(made).severity == severity


def test_what_keeps_a_check_from_being_made_is_said_and_nothing_is_run() -> None:
    made = review({}, PLAN, closed="the threat limits the queries", tried=None)
    for check in (_convergence.one_step, _convergence.optimisation, _consistency.random_points, _ablation.transfer):
        seen = check(made)
        assert (seen.severity, seen.saw) == ("info", "not tested: the threat limits the queries")
    made = review({}, PLAN, threat=Threat(Linf(0.1), access=Access.SCORE), strongest=None, tried=None)
    assert _ablation.ablation(made).saw == "not tested: the threat grants no gradients", "the first reason is said"


# ---- stored points ---------------------------------------------------------------------------------------


def stored(points: Tensor, clean: Tensor) -> Any:
    ids = np.arange(len(points))
    return lambda review, index: (ids, points.numpy(), clean.numpy())


def test_points_outside_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = review({}, PLAN[:1])
    x = made.run.x[:6]
    inside = (x + 0.1).clamp(0, 1)
    for points, severity in (
        (inside, "ok"),
        (torch.where(x < 0.5, x + 0.1001, x), "block"),
        (x + 0.09, "block"),  # leaves the box
        (torch.where(x < 0.5, torch.nan, x), "block"),
    ):
        monkeypatch.setattr(_validity, "_stored", stored(points, x))
        assert _validity.feasible(made).severity == severity
    made.threat = Threat.parse("l2:0.2")
    change = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    change = 0.2 * change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    middle = x * 0 + 0.5
    for scale, severity in ((1.0, "ok"), (1.001, "block")):
        monkeypatch.setattr(_validity, "_stored", stored(middle + scale * change, middle))
        assert _validity.feasible(made).severity == severity


def test_points_that_do_not_fool_again_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = review({}, PLAN[:1])
    right = made.run.y.clone()
    monkeypatch.setattr(_validity, "_stored", stored(made.run.x[:10], made.run.x[:10]))
    made.run.y = (right + 1) % 4
    assert _validity.rescored(made).severity == "ok"
    made.run.y[3] = right[3]
    seen = _validity.rescored(made)
    assert seen.severity == "warn"
    assert "9 are answered wrongly" in seen.saw
    made.run.y[4:6] = right[4:6]
    assert _validity.rescored(made).severity == "block", "three are no accident"


def test_changes_finer_than_grey_levels_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = review({}, PLAN[:1])
    x, net = made.run.x, made.run.model
    step = torch.autograd.grad(net(x.requires_grad_()).gather(1, made.run.y[:, None]).sum(), x)[0].sign()
    x = made.run.x = x.detach()
    coarse = (x - 25 / 255 * step).clamp(0, 1)
    won = (net(coarse).argmax(1) != made.run.y).nonzero().squeeze(1)
    assert len(won) > 3
    made.run.y = made.run.y[won]
    made.run.x = x[won]
    monkeypatch.setattr(_validity, "_stored", stored(coarse[won], x[won]))
    assert _validity.eight_bit(made).severity == "ok"
    monkeypatch.setattr(_validity, "_stored", stored(x[won] + 0.4 / 255, x[won]))
    seen = _validity.eight_bit(made)
    assert (seen.severity, seen.saw.split(" adv")[0]) == ("info", f"0 of {len(won)}")


# ---- examples and curve ----------------------------------------------------------------------------------


def examples(hashes: list[str], labels: list[int], right: int, stated: float | None = None) -> Any:
    correct = np.arange(len(hashes)) < right
    record = SimpleNamespace(examples=SimpleNamespace(hash=hashes, label=labels), n=len(hashes), correct=correct)
    header = SimpleNamespace(stated_accuracy=stated)
    return SimpleNamespace(
        record=record,
        run=SimpleNamespace(run=SimpleNamespace(header=header)),
        threat=Threat(Linf(0.1), draws=20),
        closed="paid",
    )


def test_equal_inputs_want_equal_labels() -> None:
    names = [f"{i}" for i in range(300)]
    assert _validity.labels_agree(examples(names, [0] * 300, 280)).severity == "ok"
    assert _validity.labels_agree(examples(["a", "a"], [1, 1], 1)).severity == "ok"
    assert _validity.labels_agree(examples(["a", "a"], [1, 2], 1)).severity == "warn"
    assert _validity.labels_agree(examples(names, [0] * 300, 300)).severity == "info"


@pytest.mark.parametrize(
    ("stated", "severity"), [(None, "ok"), (0.9, "ok"), (0.92, "ok"), (0.99, "block"), (0.8, "block")]
)
def test_the_statement_is_held_against_all_examples(stated: float | None, severity: str) -> None:
    names = [f"{i}" for i in range(1000)]
    assert _validity.whole_accuracy(examples(names, [0] * 1000, 900, stated)).severity == severity


@pytest.mark.parametrize(("stated", "severity"), [(0.9, "ok"), (0.75, "ok"), (0.8, "block"), (0.6, "block")])
def test_of_a_random_model_the_statement_may_speak_of_single_draws(stated: float, severity: str) -> None:
    class Often(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            right = (torch.rand(len(x)) < 0.75).float()
            return torch.stack([right, 1 - right], 1)

    review = examples([f"{i}" for i in range(4000)], [0] * 4000, 3600, stated)
    review.closed = ""
    run = SimpleNamespace(
        run=review.run.run, model=Often().eval(), x=torch.rand(4000, 1), y=torch.zeros(4000, dtype=torch.int64), seed=0, batch=64,
        settings=SimpleNamespace(reject=None),
    )  # fmt: skip
    review.run = run
    seen = _validity.whole_accuracy(review)
    assert seen.severity == severity
    assert ("by single draws" in seen.saw) == (stated != 0.9)


def curve(survived: list[int], lost: list[int]) -> list[CurvePoint]:
    return [
        CurvePoint(eps=0.1 * i, survived=s, n=100, lost=k) for i, (s, k) in enumerate(zip(survived, lost, strict=True))
    ]


@pytest.mark.parametrize(
    ("survived", "lost", "severity"),
    [
        ([95, 80, 60, 40, 20], [0] * 5, "ok"),
        ([95, 80, 60, 40, 20], [0, 0, 1, 2, 1], "ok"),
        ([95, 80, 60, 40, 20], [0, 0, 3, 8, 1], "warn"),
        ([95, 80, 80, 80, 80], [0] * 5, "info"),
        ([95, 0, 0, 0, 0], [0] * 5, "ok"),
        ([95], [0], "info"),
    ],
)
def test_a_larger_radius_breaks_no_less(survived: list[int], lost: list[int], severity: str) -> None:
    assert _validity.radii(curve(survived, lost)).severity == severity
