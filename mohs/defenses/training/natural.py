"""Natural training: the baseline every defense is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context
from mohs.target import classify


@dataclass(frozen=True)
class Natural:
    """Cross-entropy on the inputs as they are.

        loss = J(x, y)        of the logits divided by the temperature

    The baseline; expect no robustness. One logit per input is trained as the two classes (0, z).

    Args:
        temperature: above 0. Another than 1 makes the teacher of a ``Distillation``: logits grow about as many times as large,
            for the same answers.

    >>> import torch
    >>> loss = Natural().loss(nn.Identity(), torch.zeros(3, 4), torch.tensor([0, 1, 2]), None)
    >>> round(float(loss), 4)  # log 4
    1.3863

    Cost: 1 forward, 1 backward per example and epoch.

    **Differs from the paper**: nothing.
    **Source**: textbook empirical risk minimisation.
    """

    temperature: float = 1.0
    attack: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "Natural")

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        """Mean cross-entropy of the batch."""
        return F.cross_entropy(classify(model, x) / self.temperature, y)


def check_temperature(value: float, name: str) -> None:
    """Refuse what logits cannot be divided by.

    Raises:
        UsageError: not a finite number above 0.
    """
    number(value, f"temperature of {name}, which divides the logits (1 leaves them as they are),", 0, above=True)
