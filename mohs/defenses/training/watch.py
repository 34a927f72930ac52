"""The early warnings: of catastrophic overfitting, and of gradients that hide what a search without them finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

from mohs.errors import UsageError

if TYPE_CHECKING:
    from mohs.attacks import Attack
    from mohs.threat import Threat


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
    """After each epoch, accuracy on held-out examples under a one-step attack, a patient one and a search without gradients.

    A net trained against one step may learn to bend its loss so that the step misleads (catastrophic overfitting). Then
    accuracy under one step rises and accuracy under many falls, often to zero within one epoch.

    Where gradients are masked (a rounding in the net, saturation), many steps fail too, and nothing above is to be seen. But a
    short search without gradients is far weaker than many steps with them, unless gradients mislead: on honest nets it
    leaves more examples standing.

    Args:
        one_step: such as ``mohs.attacks.FGSM()``.
        many_steps: such as ``mohs.attacks.PGD(steps=10)``.
        gap: warn when accuracy under one step exceeds that under many by this much; honest nets stay well below.
        fall: warn when accuracy under many steps has fallen by this much below its best epoch while that under one step
            has risen since.
        search: an attack that needs no gradients, such as ``mohs.attacks.Square(steps=50)``; None: no look at masking. It
            is left out under a threat whose region it does not serve.
        leak: warn when accuracy under the search is below that under many steps by this much, and by more than luck: of the
            examples that only one of the two breaks, more fall to the search than a fair coin would give in 99 of 100 cases.

    **Source**: E. Wong, L. Rice, J. Z. Kolter, "Fast is better than free: revisiting adversarial training", ICLR 2020,
    section 5.4 (catastrophic overfitting, and PGD accuracy on held-out examples as its sign); A. Athalye, N. Carlini, D.
    Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3.1 (a search that does better than
    gradients is a sign of masking).
    """

    one_step: Attack
    many_steps: Attack
    gap: float = 0.2
    fall: float = 0.1
    search: Attack | None = None
    leak: float = 0.05

    def __post_init__(self) -> None:
        if not all(0 < value <= 1 for value in (self.gap, self.fall, self.leak)):
            raise UsageError(
                "gap, fall and leak are differences of accuracies in (0, 1]; got "
                f"{self.gap!r}, {self.fall!r} and {self.leak!r}."
            )

    def attacks(self, threat: Threat) -> dict[str, Attack]:
        """What to run under a threat, by the names of the learning curve."""
        found = {"one_step": self.one_step, "many_steps": self.many_steps}
        if self.search is not None and threat.region.kind in getattr(self.search, "norms", (threat.region.kind,)):
            found["search"] = self.search
        return found

    def judge(self, history: Sequence[Mapping[str, Any]]) -> EarlyWarning | None:
        """What the last epoch of a learning curve tells in the light of those before it."""
        seen = [row for row in history if row.get("many_steps") is not None]
        if not seen or seen[-1] is not history[-1]:
            return None
        now = seen[-1]
        best = max(seen, key=lambda row: row["many_steps"])
        fell = best["many_steps"] - now["many_steps"] >= self.fall and now["one_step"] > best["one_step"]
        if not fell and now["one_step"] - now["many_steps"] < self.gap:
            return self._masked(now)
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

    def _masked(self, now: Mapping[str, Any]) -> EarlyWarning | None:
        if "search" not in now or now["many_steps"] - now["search"] < self.leak:
            return None
        missed = round(now["missed"] * now["watched"])
        alone = missed + round((now["search"] - now["many_steps"]) * now["watched"])  # what only many steps break
        if _luck(missed, missed + alone) > 0.01:
            return None
        return EarlyWarning(
            now["epoch"],
            f"accuracy on {now['watched']} held-out examples is {now['many_steps']:.1%} under {self.many_steps!r} but only "
            f"{now['search']:.1%} under {self.search!r}, which uses no gradients.",
            "The net's gradients hide adversarial points that are there (gradient masking), so neither training nor "
            "evaluation by gradients is worth much.",
            "Look for what has no useful gradient (roundings, hard thresholds, saturated answers), give the attack one "
            "(mohs.gradients), and start anew.",
        )


def _luck(wins: int, games: int) -> float:
    """How likely a fair coin wins at least so often.

    >>> _luck(3, 3), _luck(0, 5)
    (0.125, 1.0)
    """
    return sum(comb(games, k) for k in range(wins, games + 1)) / 2**games
