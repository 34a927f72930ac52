"""Natural training: the baseline every defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses.training.objective import Context
from mohs.target import classify


@dataclass(frozen=True)
class Natural:
    """Cross-entropy on the inputs as they are.

        loss = J(x, y)

    The baseline; expect no robustness. One logit per input is trained as the two classes (0, z).

    >>> import torch
    >>> loss = Natural().loss(nn.Identity(), torch.zeros(3, 4), torch.tensor([0, 1, 2]), None)
    >>> round(float(loss), 4)  # log 4
    1.3863

    Cost: 1 forward, 1 backward per example and epoch.

    **Differs from the paper**: nothing.
    **Source**: textbook empirical risk minimisation.
    """

    attack: ClassVar[None] = None

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(classify(model, x), y)
