"""CROWN: linear bounds, substituted backwards to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mohs.certificates.run import Certificate, prove_by_bounds
from mohs.errors import UsageError
from mohs.threat import Access, Threat


@dataclass(frozen=True)
class CROWN:
    """Bound each margin below by a linear function of the input, and minimise that over the ball in closed form.

    From the margins backwards, z = W a + b is substituted exactly; a ReLU whose input may lie on both sides of zero is
    replaced by a line: u (z - l) / (u - l) where its coefficient is negative, and z or 0 (the smaller area) where it is
    positive. The bounds l and u before each ReLU are intervals, tightened in the same way wherever they cross zero.
    Never looser than ``IBP``, and exact for affine nets.

    Costs, per row, two backward substitutions for every crossing number before each ReLU but the first: quadratic in
    depth, and slow for wide convolutional nets. A batch needs ``memory`` for the substitutions, and per row some ten
    numbers for each number of each layer.

    What is said about rounding at ``IBP`` holds here too.

    Args:
        dtype: arithmetic of the bounds themselves, float64 or float32. Sound in either; their rounding is included.
        memory: MiB for the linear functions in flight, each eight times the widest layer. Less memory, more passes.

    >>> CROWN()
    CROWN(dtype=torch.float64, memory=256)

    **Differs from the paper**: rounding is bounded, the ball is intersected with the box, bounds before a ReLU are
    intersected with intervals, and the margin with the interval behind the last ReLU.
    **Source**: H. Zhang et al., "Efficient neural network robustness certification with general activation functions",
    NeurIPS 2018, theorem 3.2 and section 3.3 (the adaptive line is its CROWN-Ada).
    """

    dtype: torch.dtype = torch.float64
    memory: int = 256
    name: ClassVar[str] = "CROWN"
    needs: ClassVar[Access] = Access.GRADIENT

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise UsageError(f"CROWN got memory={self.memory}. Give MiB, at least 1.")

    def prove(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, batch: int) -> Certificate:
        """Certify checked inputs; see ``certify``."""
        return prove_by_bounds(self.name, model, x, y, threat, batch, self.dtype, self.memory)
