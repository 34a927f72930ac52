"""GradAlign: gradients that point the same way all over the region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context, Objective, check_inner
from mohs.defenses.training.room import odds, slope
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class GradAlign:
    """Any objective, plus how far the input gradient turns between the input and a random point of the region.

        loss = objective + weight * (1 - cos(grad J(x, y), grad J(x + u, y)))        u random in the region

    One-step training fails where the loss bends inside the region; this term keeps it straight, and FGSM training whole at
    radii where it otherwise ends in catastrophic overfitting. It is dear: a gradient is differentiated. Only the gradient at
    the random point is; that at the input is taken as given.

    Args:
        objective: such as ``Saddle(mohs.attacks.FGSM())`` or ``Fast()``.
        weight: of the term, >= 0; 0 is the objective alone. The paper's is 0.2 for CIFAR-10 at 8/255.

    Cost: 2 forwards and 2 backwards, and the backward through one of them (about 2 more), beside the objective's own.

    **Differs from the paper**: any norm; the random point is brought into the box; rows without a gradient count as aligned,
    where the published code leaves them out of the mean.
    **Source**: M. Andriushchenko, N. Flammarion, "Understanding and improving fast adversarial training", NeurIPS 2020,
    section 5; which of the two gradients is differentiated, from the authors' code.
    """

    objective: Objective
    weight: float = 0.2
    own_points: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        check_inner("GradAlign", self.objective)
        number(self.weight, "weight of GradAlign", 0)

    @property
    def attack(self) -> Attack | None:
        """The objective's."""
        return self.objective.attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The objective's loss and the weighted term, means over the batch; a term of weight zero is not computed."""
        bare = self.objective.loss(model, x, y, context)
        if self.weight == 0:
            return bare
        near = context.around(self).start(x, draw=1)  # not where the objective starts
        here = slope(lambda point: odds(classify(model, point), y), x)
        there = slope(lambda point: odds(classify(model, point), y), near, graph=True)
        return bare + self.weight * (1 - alignment(here, there)).mean()


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the rows of two gradients, [B]; 1 where one of them is zero."""
    a, b = a.flatten(1), b.flatten(1)
    some = (a.detach().norm(dim=1) > 0) & (b.detach().norm(dim=1) > 0)
    # rows without a gradient are replaced before the norm, whose derivative at zero is nan
    b = b.where(some.unsqueeze(1), 1.0)
    a = a.where(some.unsqueeze(1), 1.0)
    return (F.normalize(a, dim=1, eps=0.0) * F.normalize(b, dim=1, eps=0.0)).sum(1)
