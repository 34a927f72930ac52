"""Reduction of the bit depth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mohs.defenses._base import Defense
from mohs.errors import UsageError


@dataclass(frozen=True)
class BitDepth(Defense):
    """Rounds each input value to ``2 ** bits`` levels, so that small changes vanish.

        x -> round((2^bits - 1) x) / (2^bits - 1)

    Its gradient is zero everywhere, which stops an attack that follows it; the identity going back breaks it.

    Args:
        bits: of each value, 1 to 8.

    Raises:
        UsageError: another number of bits.

    Cost: none worth naming.

    >>> BitDepth(1).transform(Tensor([0.2, 0.7])).tolist()
    [0.0, 1.0]

    **Differs from the paper**: nothing.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing", NDSS 2018, section 4.1; C. Guo et al., ICLR 2018, section 3.
    """

    bits: int = 3

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise UsageError(f"bits must be a whole number from 1 to 8; got {self.bits!r}.")

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] in [0, 1], rounded."""
        levels = 2**self.bits - 1
        return (x * levels).round() / levels
