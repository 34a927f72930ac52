"""Mohs: a hardness scale for neural networks.

Takes a classifier, a threat and a claim; tries to refute the claim with attacks, to prove it with certificates, and says
which it managed: certified <= truly robust <= survived.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mohs import attacks, certificates, data, defenses, evaluation, gradients, models, objectives, records, reports
    from mohs.attacks import Outcome, Stop, attack
    from mohs.certificates import certify
    from mohs.errors import MohsError
    from mohs.evaluation import check, evaluate, minimum_norm
    from mohs.evaluation.exam import exam
    from mohs.problem import Goal, Problem
    from mohs.regions import L0, L1, L2, Linf, Lp, Patch, Words
    from mohs.target import Target
    from mohs.threat import Access, Knowledge, Threat

__version__ = "0.1.0"

# Everything is loaded at its first use: a record is read, compared and shown without torch, and importing costs little.
_HOME = {
    **{name: f"mohs.{name}" for name in (
        "attacks", "certificates", "data", "defenses", "evaluation", "gradients", "models", "objectives", "records", "reports",
    )},
    **{name: f"mohs.attacks:{name}" for name in ("Outcome", "Stop", "attack")},
    **{name: f"mohs.regions:{name}" for name in ("L0", "L1", "L2", "Linf", "Lp", "Patch", "Words")},
    **{name: f"mohs.threat:{name}" for name in ("Access", "Knowledge", "Threat")},
    **{name: f"mohs.evaluation:{name}" for name in ("check", "evaluate", "exam", "minimum_norm")},
    **{name: f"mohs.problem:{name}" for name in ("Goal", "Problem")},
    "certify": "mohs.certificates:certify",
    "MohsError": "mohs.errors:MohsError",
    "Target": "mohs.target:Target",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mohs' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    loaded = importlib.import_module(module)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "L0", "L1", "L2", "Access", "Goal", "Knowledge", "Linf", "Lp", "MohsError", "Outcome", "Patch", "Problem", "Stop", "Target",
    "Threat", "Words", "attack", "attacks", "certificates", "certify", "check", "data", "defenses", "evaluate", "evaluation", "exam",
    "gradients", "minimum_norm", "models", "objectives", "records", "reports",
]  # fmt: skip
