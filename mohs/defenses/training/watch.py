"""The early warning of catastrophic overfitting: one cheap attack soars while a patient one falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mohs.errors import UsageError

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class EarlyWarning:
    """A sign that a training goes wrong: what was seen, what it means, what to do."""

    epoch: int
    saw: str
    means: str
    do: str

    def __str__(self) -> str:
        return f"epoch {self.epoch}: {self.saw} {self.means} {self.do}"


@dataclass(frozen=True)
class Watch:
    """After each epoch, accuracy on held-out examples under a one-step attack and under a patient one.

    A net trained against one step may learn to bend its loss so that the step misleads (catastrophic overfitting). Then
    accuracy under one step rises and accuracy under many falls, often to zero within one epoch.

    Args:
        one_step: such as ``mohs.attacks.FGSM()``.
        many_steps: such as ``mohs.attacks.PGD(steps=10)``.
        gap: warn when accuracy under one step exceeds that under many by this much; honest nets stay well below.
        fall: warn when accuracy under many steps has fallen by this much below its best epoch while that under one step
            has risen since.

    **Source**: E. Wong, L. Rice, J. Z. Kolter, "Fast is better than free: revisiting adversarial training", ICLR 2020,
    section 5.4 (catastrophic overfitting, and PGD accuracy on held-out examples as its sign).
    """

    one_step: Attack
    many_steps: Attack
    gap: float = 0.2
    fall: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.gap <= 1 and 0 < self.fall <= 1):
            raise UsageError(
                f"gap and fall are differences of accuracies in (0, 1]; got {self.gap!r} and {self.fall!r}."
            )

    def judge(self, history: Sequence[Mapping[str, Any]]) -> EarlyWarning | None:
        """What the last epoch of a learning curve tells in the light of those before it."""
        seen = [row for row in history if row.get("many_steps") is not None]
        if not seen or seen[-1] is not history[-1]:
            return None
        now = seen[-1]
        best = max(seen, key=lambda row: row["many_steps"])
        fell = best["many_steps"] - now["many_steps"] >= self.fall and now["one_step"] > best["one_step"]
        if not fell and now["one_step"] - now["many_steps"] < self.gap:
            return None
        saw = (
            f"accuracy on {now['watched']} held-out examples is {now['one_step']:.1%} under {self.one_step!r} but "
            f"{now['many_steps']:.1%} under {self.many_steps!r}"
        )
        if fell:
            saw += (
                f"; in epoch {best['epoch']} they were {best['one_step']:.1%} and {best['many_steps']:.1%}, so the "
                "first rose while the second fell"
            )
        return EarlyWarning(
            now["epoch"],
            saw + ".",
            "The net has learnt to mislead one-step attacks, not to withstand them (catastrophic overfitting).",
            "Train against more steps or random starts, at a smaller radius or learning rate, or with a longer "
            "warm-up, and start anew.",
        )
