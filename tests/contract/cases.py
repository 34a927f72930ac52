"""Which attack runs under which threat in the contract tests, and when two outcomes are the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mohs import Access, Outcome, Threat
from mohs.attacks import REGISTRY
from mohs.attacks.run import refused_norm

FEW = {"steps": 4}
"""Small budgets for attacks that have steps."""

MANY = {"steps": 40}
"""The same for attacks without gradients: a query says less."""

LABELS = 5
"""How many times as many steps attacks get that see labels alone."""


def by_gradient(name: str) -> bool:
    return REGISTRY[name].needs >= Access.GRADIENT


def by_label(name: str) -> bool:
    return REGISTRY[name].needs <= Access.LABEL


def make(name: str, **settings: Any) -> Any:
    known = {f.name for f in fields(REGISTRY[name])}
    settings = (FEW if by_gradient(name) else MANY) | settings
    settings["steps"] *= LABELS if by_label(name) else 1
    return REGISTRY[name](**{k: v for k, v in settings.items() if k in known})


def norms(name: str) -> list[str]:
    """Short forms the attack supports, at a radius some rows of the test nets give way to."""
    forms = ["linf:0.1", "l2:0.5", "l1:1.5", "l3:0.35", "l1.5:0.8", "l0:3", "l0-features:4", "patch:3", "words:2"]
    if not REGISTRY[name].finite:
        forms = ["linf:inf", "l2:inf", "l1:inf", "l3:inf", "l0:inf", "linf:0.1", "l2:0.5", "l1:1.5", "l0:3"]
    return [form for form in forms if refused_norm(REGISTRY[name], Threat.parse(form)) is None]


CASES = [(name, threat) for name in REGISTRY for threat in norms(name)]
each_case = pytest.mark.parametrize(("name", "threat"), CASES, ids=[f"{n}-{t}" for n, t in CASES])
each_attack = pytest.mark.parametrize("name", list(REGISTRY))


def shape(which: str, features: int) -> tuple[int, ...]:
    """Inputs of that many numbers: a row of them, or an image where the attack (or the threat) asks for one."""
    form = norms(which)[0] if which in REGISTRY else which
    return (1, 2, features // 2) if form.startswith(("patch", "words")) else (features,)


def some_threat(name: str) -> str:
    return norms(name)[0]


def serves(name: str, threat: str) -> bool:
    return refused_norm(REGISTRY[name], Threat.parse(threat)) is None


def first_served(name: str, *threats: str) -> str:
    """The first of the threats that the attack serves."""
    return next(t for t in threats if serves(name, t))


def same(a: Outcome, b: Outcome, index: Tensor | None = None) -> None:
    """Equal to the bit, where b ran the rows ``index`` of a."""
    for field in ("x", "success", "size", "margin", "restart", "forwards", "backwards", "queries"):
        left = getattr(a, field) if index is None else getattr(a, field)[index]
        assert torch.equal(left, getattr(b, field)), f"{field} differs"
