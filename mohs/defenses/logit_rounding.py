"""Rounding of the logits: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mohs.defenses._base import Defense
from mohs.defenses._settings import number
from mohs.guide import instead


@dataclass(frozen=True)
class LogitRounding(Defense):
    """A negative control: rounds the logits, whose gradient is then zero everywhere. **It adds no robustness.**

        z -> round(10^decimals z) / 10^decimals

    Logits that round to the same value tie, and the lower class wins; the gradient of the logits themselves breaks it.

    Args:
        decimals: kept behind the point; negative: before it.

    Raises:
        UsageError: no whole number from -6 to 6.

    Cost: none worth naming.

    >>> LogitRounding(1)(nn.Identity())(Tensor([[1.23, 0.5]])).tolist() == Tensor([[1.2, 0.5]]).tolist()
    True

    **Differs from the paper**: it is no published method.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3
    (shattered gradients).
    """

    decimals: int = 1

    def __post_init__(self) -> None:
        number(self.decimals, "decimals", -6, 6, whole=True)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Rounded logits [B, K]."""
        z = model(x)
        value = z.round(decimals=self.decimals)
        return instead(value, z) if guiding and z.requires_grad else value
