"""Adversarial training as a saddle point: the loss at the worst point an attack finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses.training.objective import Context
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class Saddle:
    """Minimise the loss at the worst point of the region: the loss on adversarial inputs only.

        min over weights of  E [ max over x' in region(x) of J(x', y) ]        (the inner maximum by the attack)

    The baseline of honest defenses: with PGD inside, the gain survives stronger attacks. It costs clean accuracy and
    (steps + 2) times the compute of natural training. On hard problems warm the radius up, or the net may stay at
    chance.

    Args:
        attack: the inner maximisation, such as ``mohs.attacks.PGD(steps=10)``; it spends its whole budget.

    Cost: 1 forward, 1 backward, and the attack's own (PGD: steps + 1 forwards, steps backwards) per example and epoch.

    **Differs from the paper**: the inner maximisation keeps the best point it has seen (one that fools the net, then
    the one of highest loss), not the last; the net is in eval mode while it is attacked.
    **Source**: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning models resistant to
    adversarial attacks", ICLR 2018, equation 2.1 and section 3.
    """

    attack: Attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x', y), mean over the batch."""
        return F.cross_entropy(classify(model, context.perturb(self.attack, x, y)), y)
