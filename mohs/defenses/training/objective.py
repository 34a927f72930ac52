"""What a training objective is, and what it may use besides the model and the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from mohs.defenses.training.pretrained import Pretrained
from mohs.defenses.training.room import Room
from mohs.errors import UsageError

if TYPE_CHECKING:
    from mohs.attacks import Attack
    from mohs.threat import Threat


@dataclass(frozen=True)
class Last:
    """An attack whose last iterate is wanted, as most papers train, and not the best point that it saw.

    Where the attack's iterate is such a point (``attack.last``), that saves the look at it: a forward of steps + 1. Another
    attack answers with its best point.
    """

    attack: Attack


class Perturb(Protocol):
    """Runs an attack to the end of its budget and returns its points, [N, ...].

    Training receives it as an argument, because defenses know attacks as values only; ``mohs.evaluation.training``
    holds the one in use. The model it is given is in eval mode. The attack may be wrapped in ``Last``.
    """

    def __call__(
        self,
        attack: Attack | Last,
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


class Points(Protocol):
    """The attack's points for a batch; no gradient leads from them to any weight."""

    def __call__(
        self, attack: Attack | Last, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
    ) -> Tensor:
        """The points, [B, ...].

        Args:
            attack: runs to the end of its budget.
            x, y: inputs [B, ...] and the classes [B] to leave.
            of: the net that is attacked; None: the one in training, at its present weights. In eval mode meanwhile.
            radii: of the rows [B], input units; None: the present radius.
        """
        ...


def _now(make: Callable[[], Tensor]) -> Tensor:
    return make()


@dataclass(frozen=True)
class Context:
    """What the loop offers to an objective in one step.

    Args:
        perturb: ``(attack, x, y) -> x'``: the attack's points inside the present radius, against the present weights,
            with the model in eval mode; no gradient leads from ``x'`` to the weights. See ``Points`` for another net or radius.
        eps: the present radius (it grows during a warm-up), input units.
        done: share of the training behind us, in [0, 1).
        room: region, box and random streams, for an objective that makes points by itself; None without a threat.
        once: ``(make) -> make()``: what makes points out of the present weights goes through here, so that a wrapper
            that looks at a batch twice, at different weights, can have the same points again.
        seed: of the step, the room's too, for an objective that draws something without one.
    """

    perturb: Points
    eps: float
    done: float
    room: Room | None = None
    once: Callable[[Callable[[], Tensor]], Tensor] = _now
    seed: int = 0

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
    - ``norms: tuple[str, ...]``: the regions it serves, of "linf", "l2", "l1", "lp", "l0", "patch" and "words" (where
      it is not said: all).
    - ``prepare(x, points, box) -> Tensor``: what is trained on instead of the training set's inputs x [N, ...], such as
      ``points(attack)``, the attack's at the full radius. It is asked once, with the net as it is before the first step, and
      so only of a training that goes on from a trained net.
    - ``unbounded: bool``: its attack needs no radius, so that the threat may be infinite.
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


def layers(objective: object) -> Iterator[Any]:
    """An objective and, from the outermost to the innermost, those it wraps."""
    yield objective
    for value in _held(objective):
        if callable(getattr(value, "loss", None)):
            yield from layers(value)


def pretrained_in(objective: object) -> list[Pretrained]:
    """The fixed nets that an objective and those inside it use."""
    return [value for layer in layers(objective) for value in _held(layer) if isinstance(value, Pretrained)]


def _held(objective: object) -> Iterator[Any]:
    """The values of the fields of an objective, those in tuples one by one."""
    if is_dataclass(objective):
        for field in fields(objective):
            value = getattr(objective, field.name)
            yield from value if isinstance(value, tuple) else (value,)


def makes_points(objective: object) -> bool:
    """Does it, or one inside it, make adversarial points without an attack?"""
    return any(getattr(layer, "own_points", False) for layer in layers(objective))


def prepares(objective: object) -> bool:
    """Does it, or one inside it, train on inputs that it makes beforehand?"""
    return any(callable(getattr(layer, "prepare", None)) for layer in layers(objective))


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


def check_attacked(wrapper: str, objective: object) -> None:
    """Refuse what holds no attack that a wrapper could run against another net.

    Raises:
        UsageError: no objective; one that makes its points by itself, beforehand, or not at all; or one whose work is more
            than a loss.
    """
    check_inner(wrapper, objective)
    if getattr(objective, "attack", None) is None or prepares(objective):
        raise UsageError(
            f"{wrapper} runs the attack of an objective against another net, but {type(objective).__name__} runs none in its "
            "steps. Allowed: one that does, such as Mixture(attack), Saddle(attack) or UnifiedEmbedding(attack)."
        )
