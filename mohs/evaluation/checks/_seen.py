"""What a check answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "info", "warn", "block"]


@dataclass(frozen=True)
class Seen:
    """How bad it is, what was seen (with numbers), what that means, and what to do."""

    severity: Severity
    saw: str
    means: str = ""
    remedy: str = ""


def untested(reason: str) -> Seen:
    """Could not be looked at, and why."""
    return Seen("info", f"not tested: {reason}")


def ok(saw: str, means: str = "") -> Seen:
    """Nothing to worry about."""
    return Seen("ok", saw, means)
