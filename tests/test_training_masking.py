"""The early warning of masked gradients: what a search without them breaks and many steps with them do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from training_problem import CLASSES, FEATURES, run

from mohs.attacks import FGSM, PGD, Square
from mohs.defenses.training import Saddle, Watch
from mohs.errors import UsageError
from mohs.threat import Threat


class Round(nn.Module):
    """Inputs in steps of one eighth: no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 8).round() / 8


def test_the_watch_warns_of_masked_gradients(tmp_path: Path) -> None:
    watch = Watch(FGSM(), PGD(steps=10), search=Square(steps=20))

    def trained(out: str, first: nn.Module, threat: str) -> Any:
        linear = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        settings = {"holdout": 45, "batch": 9, "epochs": 1, "threat": threat, "watch": watch, "out": out}
        return run(tmp_path, Saddle(PGD(steps=1)), model=nn.Sequential(first, linear), **settings)

    masked = trained("masked", Round(), "linf:0.3")
    row = masked.curve[-1]
    assert row["missed"] >= row["many_steps"] - row["search"] - 1e-9 > 0
    assert "under Square(steps=20" in str(masked.warnings[-1])
    assert "gradient masking" in masked.warnings[-1].means
    honest = trained("honest", nn.Identity(), "linf:0.2")
    assert not honest.warnings
    assert 0 < honest.curve[-1]["many_steps"] < 1
    assert set(watch.attacks(Threat.parse("linf:0.3"))) == {"one_step", "many_steps", "search"}
    assert set(watch.attacks(Threat.parse("l0:1"))) == {"one_step", "many_steps"}  # no region of Square's


def test_masking_is_judged_by_what_only_one_of_the_attacks_breaks() -> None:
    watch = Watch(FGSM(), PGD(steps=10), search=Square(steps=50), leak=0.08)

    def judge(search: float, missed: float, watched: int = 100, one_step: float = 0.6) -> Any:
        row = {
            "epoch": 1,
            "one_step": one_step,
            "many_steps": 0.5,
            "watched": watched,
            "search": search,
            "missed": missed,
        }
        return watch.judge([row])

    assert judge(0.4, 0.1) is not None  # 10 to 0
    assert judge(0.43, 0.1) is None  # less than the leak
    assert judge(0.55, 0.2) is None  # 20 to 25: each breaks what the other does not
    assert judge(0.4, 0.3) is None  # 30 to 20 may be luck
    assert judge(0.4, 0.1, watched=70) is not None  # 7 to 0: one in 128
    assert judge(0.4, 0.1, watched=60) is None  # 6 to 0: one in 64
    assert "catastrophic overfitting" in judge(0.4, 0.1, one_step=0.9).means  # the one that says why comes first
    assert watch.judge([{"epoch": 1, "one_step": 0.6, "many_steps": 0.5, "watched": 100}]) is None
    with pytest.raises(UsageError, match="leak"):
        Watch(FGSM(), PGD(), leak=0)
