"""Adversarial training on a mixture of clean and adversarial inputs."""

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
class Mixture:
    """The loss on the inputs as they are, mixed with the loss on adversarial ones.

        loss = alpha * J(x, y) + (1 - alpha) * J(x', y)        x' = attack(x)

    With FGSM as the attack this is the first adversarial training. It is cheap and raises accuracy under that attack;
    at radii that matter the net often learns to bend its loss instead (catastrophic overfitting: accuracy under FGSM
    soars, under PGD it falls to nothing). The loop watches for that; never report such a net under FGSM alone.

    Args:
        attack: makes x'; any attack, such as ``mohs.attacks.FGSM()``. Its gradient is not differentiated through.
        alpha: weight of the clean loss, in [0, 1]; 1 is natural training, and then the attack is not run.

    Cost: 2 forwards and 2 backwards, and the attack's own, per example and epoch.

    **Differs from the paper**: any attack and threat; FGSM is clipped to the box.
    **Source**: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015,
    section 6 (alpha = 0.5).
    """

    attack: Attack
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(
                f"alpha is the weight of the clean loss and must lie in [0, 1]; got {self.alpha!r}. The paper's is 0.5."
            )

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """alpha * J(x, y) + (1 - alpha) * J(x', y), means over the batch; a term of weight zero is not computed."""
        if self.alpha == 1:
            return F.cross_entropy(classify(model, x), y)
        adversarial = context.perturb(Last(self.attack), x, y)
        bent = F.cross_entropy(classify(model, adversarial), y)
        if self.alpha == 0:
            return bent
        return self.alpha * F.cross_entropy(classify(model, x), y) + (1 - self.alpha) * bent
