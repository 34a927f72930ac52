"""What a training objective is, and what it may use besides the model and the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from mohs.defenses.training.room import Room
from mohs.errors import UsageError

if TYPE_CHECKING:
    from mohs.attacks import Attack
    from mohs.threat import Threat


class Perturb(Protocol):
    """Runs an attack to the end of its budget and returns its points, [N, ...].

    Training receives it as an argument, because defenses know attacks as values only; ``mohs.evaluation.training``
    holds the one in use. The model it is given is in eval mode.
    """

    def __call__(
        self,
        attack: Attack,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        eps: Tensor,
        seed: int,
        batch: int,
    ) -> Tensor:
        """The points found inside each row's radius ``eps`` [N], from the random stream ``seed``."""
        ...


def _now(make: Callable[[], Tensor]) -> Tensor:
    return make()


@dataclass(frozen=True)
class Context:
    """What the loop offers to an objective in one step.

    Args:
        perturb: ``(attack, x, y) -> x'``: the attack's points inside the present radius, against the present weights,
            with the model in eval mode; no gradient leads from ``x'`` to the weights.
        eps: the present radius (it grows during a warm-up), input units.
        done: share of the training behind us, in [0, 1).
        room: region, box and random streams, for an objective that makes points by itself; None without a threat.
        once: ``(make) -> make()``: what makes points out of the present weights goes through here, so that a wrapper
            that looks at a batch twice, at different weights, can have the same points again.
    """

    perturb: Callable[[Attack, Tensor, Tensor], Tensor]
    eps: float
    done: float
    room: Room | None = None
    once: Callable[[Callable[[], Tensor]], Tensor] = _now

    def around(self, objective: object) -> Room:
        """The room, for an objective that cannot do without.

        Raises:
            UsageError: There is none.
        """
        if self.room is None:
            raise UsageError(f"{objective!r} makes its own points and needs a threat, such as threat='linf:0.1'.")
        return self.room


class Objective(Protocol):
    """A frozen dataclass whose fields are its whole configuration.

    Further attributes are optional:

    - ``own_points: bool``: it makes adversarial points by itself, so that it needs a threat without holding an attack.
    - ``norms: tuple[str, ...]``: the regions it serves, of "linf", "l2", "l1", "lp", "l0" and "patch" (where it is not
      said: all).
    - ``step(turn) -> float``: what to do with a batch, where that is more than one gradient and one update; answers the
      batch's mean loss. See ``mohs.defenses.training.turn.Turn``.

    Attributes:
        attack: what it trains against, or None.
    """

    @property
    def attack(self) -> Attack | None:
        """What it trains against, or None."""
        ...

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """A scalar to minimise: a *mean* over the rows, so that shards of a batch can be averaged."""
        ...


def against(objective: Objective) -> str | None:
    """What a net is trained against, in words: the attack, or the objective that makes its own points; else None."""
    if objective.attack is not None:
        return repr(objective.attack)
    return repr(objective) if makes_points(objective) else None


def makes_points(objective: object) -> bool:
    """Does it make adversarial points without an attack?"""
    return bool(getattr(objective, "own_points", False))


def has_steps(objective: object) -> bool:
    """Does it say by itself what to do with a batch?"""
    return callable(getattr(objective, "step", None))


def check_inner(wrapper: str, objective: object, *, steps: bool = False) -> None:
    """Refuse what a wrapper cannot wrap: no objective, or (unless ``steps``) one whose work is more than a loss.

    Raises:
        UsageError: it is one of these.
    """
    if isinstance(objective, type) or not callable(getattr(objective, "loss", None)):
        raise UsageError(
            f"{wrapper} wraps an objective; got {objective!r}. Allowed: a value with a method loss(model, x, y, context), "
            "such as Saddle(attack) or TRADES()."
        )
    if has_steps(objective) and not steps:
        raise UsageError(
            f"{wrapper} adds to a loss, but {type(objective).__name__} is more than that: it decides what happens to the "
            f"weights in a step. Put {wrapper} inside it where it takes an objective; else use one of the two."
        )
