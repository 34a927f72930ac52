"""Mohs: a hardness scale for neural networks.

Takes a classifier, a threat and a claim; tries to refute the claim with attacks, to prove it with certificates, and says
which it managed: certified <= truly robust <= survived.
"""

from __future__ import annotations

import importlib
from typing import Any

from mohs import attacks, objectives
from mohs.attacks import Outcome, Stop, attack
from mohs.errors import MohsError
from mohs.problem import Goal, Problem
from mohs.regions import L0, L1, L2, Linf, Lp
from mohs.target import Target
from mohs.threat import Access, Knowledge, Threat

__version__ = "0.1.0"

# loaded at first use, so that `import mohs` costs little beyond torch
_LAZY = {
    "certificates": "mohs.certificates",
    "data": "mohs.data",
    "defenses": "mohs.defenses",
    "evaluation": "mohs.evaluation",
    "models": "mohs.models",
    "records": "mohs.records",
    "reports": "mohs.reports",
    "certify": "mohs.certificates:certify",
    "check": "mohs.evaluation:check",
    "evaluate": "mohs.evaluation:evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mohs' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    loaded = importlib.import_module(module)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "L0", "L1", "L2", "Access", "Goal", "Knowledge", "Linf", "Lp", "MohsError", "Outcome", "Problem", "Stop", "Target",
    "Threat", "attack", "attacks", "certify", "check", "evaluate", "objectives",
]  # fmt: skip
