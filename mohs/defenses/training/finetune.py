"""Fine-tuning on a training set that was perturbed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context
from mohs.regions import Box
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class FineTune:
    """Go on training a net, on adversarial points that were made once against the net as it came.

        x' = x + scale * (attack(x) - x)        for the whole training set, before the first step
        loss = J(x', y)                         no clean inputs; the same x' in every epoch

    A recipe names the net it starts from (``start``). With the smallest perturbations (``DeepFool()`` under ``l2:inf``) the
    mean distance to the nearest decision boundary grows within an epoch or two, and clean accuracy need not fall; larger ones
    (FGSM, or a scale of 2 or 3) leave the class of the image and make the net worse. The points are stale as soon as the
    weights move, so this is no defense against an attack that looks at the new net: expect little under PGD.

    The paper's setting is 5 epochs at half of the learning rate the net was trained with. Its controls are
    ``FineTune(FGSM())`` under a finite radius, and ``Natural()`` from the same ``start``.

    Args:
        attack: makes x', at the full radius; a minimum-norm attack may have a threat of infinite radius.
        scale: what the perturbation is multiplied by, >= 0; the paper's are 1, 2 and 3. At 0 the attack is not run.

    Cost: 1 forward, 1 backward per example and epoch; the attack's own once per example, again at each resumption.

    >>> x, found = torch.tensor([[0.5]]), torch.tensor([[0.6]])
    >>> FineTune(None, scale=3.0).prepare(x, lambda attack: found, (0.0, 1.0))
    tensor([[0.8000]])

    **Differs from the paper**: points are clipped to the box. Examples that the net gets wrong as they are stay as they are, as
    do those for which the attack finds nothing.
    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a simple and accurate method to fool deep neural
    networks", CVPR 2016, section 4, "Fine-tuning using adversarial examples" (figures 6 and 7, table 3).
    """

    attack: Attack
    scale: float = 1.0

    def __post_init__(self) -> None:
        number(self.scale, "scale of FineTune, what perturbations are multiplied by,", 0)

    @property
    def unbounded(self) -> bool:
        """Does the attack find the smallest change, so that no radius need be given?"""
        return not getattr(self.attack, "finite", True)

    def prepare(self, x: Tensor, points: Callable[[Attack], Tensor], box: Box) -> Tensor:
        """The points x' [N, ...] that stand for the inputs ``x`` [N, ...]."""
        if self.scale == 0:
            return x
        # lerp ends exactly at the attack's point for a scale of 1
        return torch.lerp(x, points(self.attack), self.scale).clamp_(*box)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        """J at the points, mean over the batch."""
        return F.cross_entropy(classify(model, x), y)
