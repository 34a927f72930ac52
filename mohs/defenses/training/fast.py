"""Fast adversarial training: one step from a random start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training._quiet import evaluating
from mohs.defenses.training.objective import Context
from mohs.defenses.training.room import Room, odds, slope
from mohs.target import classify


@dataclass(frozen=True)
class Fast:
    """The loss at a point one step away from a random one.

        x0 = random point of the region
        x' = project(x0 + length * eps * steepest(grad J(x0, y)))
        loss = J(x', y)

    Nearly as cheap as natural training; the random start keeps one step useful up to middling radii. Beyond them, or late
    in a long training, it too ends in catastrophic overfitting (accuracy under many steps falls to nothing within an
    epoch): the loop watches for that. ``NFGSM`` and ``GradAlign`` put it off.

    Args:
        length: of the step, in radii; above 0. The paper's is 1.25.

    Cost: 2 forwards and 2 backwards per example and epoch.

    **Differs from the paper**: any norm; the net is in eval mode while the step is found.
    **Source**: E. Wong, L. Rice, J. Z. Kolter, "Fast is better than free: revisiting adversarial training", ICLR 2020,
    algorithm 3.
    """

    length: float = 1.25
    attack: ClassVar[None] = None
    own_points: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        number(self.length, "length of Fast, that of its step in radii,", 0, above=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x', y), mean over the batch."""
        room = context.around(self)
        return F.cross_entropy(classify(model, context.once(lambda: self.points(model, x, y, room))), y)

    def points(self, model: nn.Module, x: Tensor, y: Tensor, room: Room) -> Tensor:
        """One step from a random start, and back into region and box."""
        begin = room.start(x)
        with evaluating(model):
            g = slope(lambda point: odds(classify(model, point), y), begin)
        return room.advance(begin, g, self.length * room.eps, x)
