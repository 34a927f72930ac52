"""Large logits: a negative control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mohs.defenses._base import Defense
from mohs.defenses._settings import number


@dataclass(frozen=True)
class LogitScale(Defense):
    """A negative control: multiplies the logits, so that a softmax of them is 0 or 1. **It adds no robustness.**

        z -> factor z

    The cross-entropy's gradient rounds to zero where the model is right. It is ``smooth`` all the same: a loss on the logits,
    and Mohs' own cross-entropy, which is scaled, do not see the factor. ``plain_cross_entropy`` does.

    Args:
        factor: above 0.

    Raises:
        UsageError: factor is no number above 0.

    Cost: none worth naming.

    >>> LogitScale(1000.0)(nn.Identity())(Tensor([[1.0, 0.5]])).tolist()
    [[1000.0, 500.0]]

    **Differs from the paper**: a distilled net is trained at the temperature ``factor`` and used at 1; here nothing is trained.
    **Source**: N. Carlini, D. Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, section II.F
    (why defensive distillation stops attacks on the softmax).
    """

    factor: float = 1000.0
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.factor, "factor", 0, above=True)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Scaled logits [B, K]."""
        return self.factor * model(x)
