"""The exam: plans that ought to find the hidden points, and attacks that are known to be too weak."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import mohs
from mohs import objectives
from mohs.attacks import PGD
from mohs.data import load

from .measure import table
from .subjects import BUNDLED_DATA, BUNDLED_NETS, SEED, Options

THREAT, EPS = "linf:0.1", 0.1
NEEDLES = 64
SCALE = 100.0


class Scaled(nn.Module):
    """Logits so large that a softmax saturates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * SCALE


SUBJECTS: tuple[tuple[str, Any, bool, bool | None], ...] = (
    ("plan quick", "quick", False, True),
    ("plan standard", "standard", False, True),
    ("PGD, 40 steps", PGD(steps=40), False, None),
    ("PGD, 5 steps", PGD(steps=5), False, False),
    ("PGD, 40 steps of eps / 200", PGD(steps=40, step_size=EPS / 200), False, False),
    (
        f"PGD, 40 steps, softmax loss, logits x {SCALE:g}",
        PGD(steps=40, objective=objectives.plain_cross_entropy),
        True,
        False,
    ),
    (f"PGD, 40 steps, margin, logits x {SCALE:g}", PGD(steps=40), True, None),
)
"""Name, attack, whether the logits are scaled, whether it ought to pass (None: an attack of middling strength, without restarts,
stands for the scale between; it may pass on a natural net and fail on a robust one)."""


def run(options: Options) -> Iterator[str]:
    """One table per bundled net."""
    yield "## The exam"
    n = min(options.robust_rows, NEEDLES)
    yield f"`mohs.exam` at {THREAT}, {n} images, seed {SEED}: points known to be adversarial that the attack found."
    for name in BUNDLED_NETS:
        rows: list[list[object]] = []
        for label, attack, scaled, ought in SUBJECTS:
            net = mohs.models.load(name)
            seen = mohs.exam(
                Scaled(net).eval() if scaled else net, load(BUNDLED_DATA, n=4 * n), THREAT, attack, n=n, seed=SEED
            )
            low, high = seen.interval
            rows.append([
                label, f"{seen.found}/{seen.tested}", f"{low:.0%} to {high:.0%}", int(seen.lucky.sum()),
                "passed" if seen.passed else "failed",
                "" if ought is None else "as it ought" if seen.passed == ought else "SURPRISING",
            ])  # fmt: skip
        head = ["attack", "found", "95% interval", "by random looks", "exam", ""]
        options.keep("exam", [{"net": name, **dict(zip(head, row, strict=True))} for row in rows])
        yield f"**{name}**\n\n{table(head, rows)}"
