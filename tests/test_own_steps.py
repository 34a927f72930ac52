"""Each attack's own step: to give it as ``step_size`` changes nothing, and the check of step sizes starts from it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_models import Linear, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import streams
from mohs.attacks import BIM, JSMA, MIFGSM, NIFGSM, ODI, PGD, SPGD, LaVAN
from mohs.evaluation.checks import _climb


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (PGD(steps=7), "linf:0.03"),
        (BIM(), "linf:0.03"),
        (MIFGSM(steps=6), "l2:0.1"),
        (NIFGSM(steps=6), "linf:0.03"),
        (ODI(steps=8), "l2:0.1"),
        (LaVAN(steps=12), "patch:2"),
        (SPGD(steps=12), "l0:3"),
        (SPGD(steps=12, projected=True), "l0:3"),
    ],
)
def test_to_give_an_attack_its_own_step_changes_nothing(
    attack: Any, threat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "text_key", lambda text: 1)  # the settings are a part of the random stream's name
    net, x = relu_net((1, 4, 4)), inputs(6, 1, 4, 4)
    y, stop = net(x).argmax(1), mohs.Stop.BUDGET
    given = replace(attack, step_size=attack.own_step(mohs.Threat.parse(threat)))
    other = replace(attack, step_size=1.3 * given.step_size)
    one, same, differs = (mohs.attack(a, net, x, y, threat, stop=stop, trace=True) for a in (attack, given, other))
    assert torch.allclose(one.trace, same.trace, atol=1e-5, equal_nan=True)
    assert not torch.allclose(one.trace, differs.trace, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("projected", [False, True])
def test_sparse_pgd_moves_each_number_by_its_step_in_box_widths(projected: bool) -> None:
    net, low, high, steps = Linear(12, 2, dtype=torch.float64), -1.0, 3.0, 14
    x = 0.5 + inputs(8, 12, dtype=torch.float64)
    y, threat, seen = net(x).argmax(1), mohs.Threat(mohs.L0(4), box=(low, high)), list[Tensor]()

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return net(x)

    attack = SPGD(steps=steps, step_size=0.04, projected=projected, random_start=False)
    mohs.attack(attack, Noted(), x, y, threat, batch=8, stop=mohs.Stop.BUDGET)
    assert len(seen) == steps + 1
    w = (net.weight[:, 1] - net.weight[:, 0]).detach()
    sign = w.sign() * (1 - 2 * y).unsqueeze(1)  # of the gradient, which is the same all over but for its length
    length = attack.own_step(threat) * (high - low)
    # a dense change moves at every step, seen or not; a projected one where it is chosen: at first, and wherever it is seen
    count, most = torch.zeros_like(x), 0
    for k, look in enumerate(seen):
        moved = look != x
        assert int(moved.sum(1).max()) <= 4
        taken = (1 + count) if projected else torch.full_like(x, k)
        expected = (x + taken * length * sign).clamp(low, high)
        assert torch.allclose(look[moved], expected[moved], rtol=0, atol=1e-12)
        most = max(most, int(taken[moved].max()) if bool(moved.any()) else 0)
        count += moved
    assert most >= (5 if projected else steps)
    assert int((count > 0).sum(1).min()) > 4, "other positions were tried"


def review(attack: Any, tried: list[Any]) -> Any:
    def more(attack: Any, rows: torch.Tensor) -> Any:
        tried.append(attack)
        return SimpleNamespace(margin=torch.full((2,), -0.5), success=torch.zeros(2, dtype=torch.bool))

    return SimpleNamespace(
        closed="", threat=mohs.Threat.parse("linf:0.04"), strongest=(0, attack), alive=np.ones(2, bool), best=-np.ones(2) / 2,
        near=lambda count: torch.arange(2), afford=lambda passes, most: 2, tried=more,
        record=SimpleNamespace(examples=SimpleNamespace(clean_margin=np.ones(2))),
    )  # fmt: skip


def test_the_check_of_step_sizes_starts_from_the_attacks_own() -> None:
    tried: list[Any] = []
    seen = _climb.step_size(review(BIM(steps=10), tried))
    assert "BIM with a step of 0.004:" in seen.saw
    assert [a.step_size for a in tried] == pytest.approx([0.001, 0.016])
    seen = _climb.step_size(review(JSMA(), tried))
    assert seen.severity == "info"
    assert "not tested" in seen.saw
    assert len(tried) == 2, "four times JSMA's step is none"
