"""What the adaptive part costs: the checks, and a defended net beside the same net without its defense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

import mohs
from mohs import defenses
from mohs.data import Dataset, load

from .measure import Counted, table
from .subjects import BUNDLED_DATA, Options

Adaptive = Literal["declared", "blind", "off"]
THREAT, PLAN = "linf:0.1", "standard"
NET = "bundled:fashion-pgd"
DEFENSES = ("bit-depth:3", "jpeg:75", "median-blur", "k-winners", "logit-rounding:1", "detach", "gradient-truncation")
RANDOM = (
    "noise-input:0.1",
    "random-resize-pad",
)  # only their checks: an evaluation scores them on draws, at another price
FORWARDS, TIMES = 20.0, 2.0  # the bars: of the checks, per example of the sample; of an evaluation, over the undefended


def run(options: Options) -> Iterator[str]:
    """Forward-equivalents per example of the checks; per survivor of whole evaluations."""
    yield "## What the adaptive part costs"
    data = load(BUNDLED_DATA, n=options.robust_rows)
    yield (
        f"{NET}, {THREAT}, {len(data)} images, plan {PLAN}, no control subset, no exam. Rows that went through the model, forward or "
        "backward to the input; padding included. A survivor is an example that no attack broke."
    )
    checks = []
    for text in ("", *DEFENSES, *RANDOM):
        counted = Counted(_behind(text)).eval()
        mohs.check(counted, data, THREAT)
        looked = min(len(data), 64)
        checks.append(
            [
                text or "no defense",
                counted.forwards,
                _held(counted.forwards / looked, FORWARDS, ".1f"),
                counted.backwards,
            ]
        )
    yield table(["checks of", "forwards", "forwards per example of the sample of 64", "backwards"], checks)
    rows, bare = [], 0.0
    for text in ("", *DEFENSES):
        ways: tuple[Adaptive, ...] = ("declared", "blind") if text else ("off",)
        for adaptive in ways:
            spent, left = _evaluated(text, data, adaptive)
            each = spent / max(left, 1)
            bare = bare or each
            rows.append([
                f"{text or 'no defense'}, {adaptive}", f"{left}/{len(data)}", f"{spent:,}", f"{each:.0f}",
                _held(each / bare, TIMES, ".2f"),
            ])  # fmt: skip
    head = ["evaluation", "survivors", "passes", "passes per survivor", "over the undefended"]
    options.keep("costs", [dict(zip(head, row, strict=True)) for row in rows])
    yield table(head, rows)


def _held(value: float, bar: float, form: str) -> str:
    """A number, and whether it passes its bar.

    >>> _held(2.004, 2.0, ".2f"), _held(1.5, 2.0, ".2f")
    ('2.00 MISSED: above 2', '1.50')
    """
    return f"{value:{form}}" + (f" MISSED: above {bar:g}" if value > bar else "")


def _behind(text: str) -> nn.Module:
    net = mohs.models.load(NET)
    return defenses.parse(text)(net).eval() if text else net


def _evaluated(text: str, data: Dataset, adaptive: Adaptive) -> tuple[int, int]:
    """(passes, survivors)."""
    counted = Counted(_behind(text)).eval()
    record = mohs.evaluate(counted, data, THREAT, plan=PLAN, control=0, adaptive=adaptive)
    return counted.forwards + counted.backwards, int(record.survived.sum())
