"""N-FGSM: one step from strong noise, and no way back into the region."""

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
class NFGSM:
    """The loss one step away from a strongly noisy input; the point may lie outside the region.

        x0 = random point of the region of noise * eps
        x' = x0 + length * eps * steepest(grad J(x0, y))        (clipped to the box alone)
        loss = J(x', y)

    As cheap as ``Fast``, and much later in catastrophic overfitting: the noise keeps the loss straight around the input,
    and what is not clipped keeps the whole length of the step. It costs a little clean accuracy. The points lie up to
    noise + length radii away, so the net is trained for more than the threat asks.

    Args:
        noise: radius of the noise, in radii; at least 0. The paper's is 2.
        length: of the step, in radii; above 0. The paper's is 1.

    Cost: 2 forwards and 2 backwards per example and epoch.

    **Differs from the paper**: any norm; the net is in eval mode while the step is found.
    **Source**: P. de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training", NeurIPS
    2022, section 4 and algorithm 1.
    """

    noise: float = 2.0
    length: float = 1.0
    attack: ClassVar[None] = None
    own_points: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        number(self.noise, "noise of NFGSM, its radius in radii,", 0)
        number(self.length, "length of NFGSM, that of its step in radii,", 0, above=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x', y), mean over the batch."""
        room = context.around(self)
        return F.cross_entropy(classify(model, context.once(lambda: self.points(model, x, y, room))), y)

    def points(self, model: nn.Module, x: Tensor, y: Tensor, room: Room) -> Tensor:
        """One step from noise, and back into the box."""
        begin = room.start(x, self.noise)
        with evaluating(model):
            g = slope(lambda point: odds(classify(model, point), y), begin)
        return room.move(begin, g, self.length * room.eps, x)
