"""What a training objective is, and what it may use besides the model and the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

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


@dataclass(frozen=True)
class Context:
    """What the loop offers to an objective in one step.

    Args:
        perturb: ``(attack, x, y) -> x'``: the attack's points inside the present radius, against the present weights,
            with the model in eval mode; no gradient leads from ``x'`` to the weights.
        eps: the present radius (it grows during a warm-up), input units.
        done: share of the training behind us, in [0, 1).
    """

    perturb: Callable[[Attack, Tensor, Tensor], Tensor]
    eps: float
    done: float


class Objective(Protocol):
    """A frozen dataclass whose fields are its whole configuration.

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
