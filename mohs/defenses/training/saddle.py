"""Adversarial training as a saddle point: the loss at the worst point an attack finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses.training.objective import Context, Last
from mohs.errors import UsageError
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class Saddle:
    """Minimise the loss at the worst point of the region: the loss on adversarial inputs only.

        min over weights of  E [ max over x' in region(x) of J(x', y) ]        (the inner maximum by the attack)

    The baseline of honest defenses: with PGD inside, the gain survives stronger attacks. It costs clean accuracy and
    (steps + 1) times the compute of natural training. On hard problems warm the radius up, or the net may stay at
    chance.

    Args:
        attack: the inner maximisation, such as ``mohs.attacks.PGD(steps=10)``; it spends its whole budget.
        keep: 'last', the attack's last iterate, as in the paper; or 'best', the best point it has seen (one that fools the net,
            then the one of highest loss), which costs a forward more. An attack that does more than follow a gradient answers with
            its best point either way.

    Cost: 1 forward, 1 backward, and the attack's own (PGD: steps forwards and backwards) per example and epoch.

    Raises:
        UsageError: another ``keep``.

    **Differs from the paper**: the net is in eval mode while it is attacked.
    **Source**: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning models resistant to
    adversarial attacks", ICLR 2018, equation 2.1 and section 3.
    """

    attack: Attack
    keep: str = "last"

    def __post_init__(self) -> None:
        if self.keep not in ("last", "best"):
            raise UsageError(f"keep of Saddle must be 'last' or 'best'; got {self.keep!r}.")

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x', y), mean over the batch."""
        attack = Last(self.attack) if self.keep == "last" else self.attack
        return F.cross_entropy(classify(model, context.perturb(attack, x, y)), y)
