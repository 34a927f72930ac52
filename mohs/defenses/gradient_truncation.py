"""Truncation of the gradient: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mohs.defenses._backward import changed
from mohs.defenses._base import Defense
from mohs.defenses._settings import number


@dataclass(frozen=True)
class GradientTruncation(Defense):
    """A negative control: changes no answer, but rounds the input gradient towards zero. **It adds no robustness.**

        x -> x,   g -> step trunc(g / step)

    Coordinates below ``step`` get no gradient at all, all others a coarse one.

    Args:
        step: distance of the values a gradient may have, in logits per unit of the input.

    Raises:
        UsageError: step is no number above 0.

    Cost: none worth naming.

    >>> import torch
    >>> x = torch.ones(1, 3, requires_grad=True)
    >>> (GradientTruncation(1.0).transform(x) * torch.tensor([0.9, 1.7, -2.2])).sum().backward()
    >>> x.grad.tolist()
    [[0.0, 1.0, -2.0]]

    **Differs from the paper**: it is no published method.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3
    (shattered and vanishing gradients).
    """

    step: float = 10.0

    def __post_init__(self) -> None:
        number(self.step, "step", 0, above=True)

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] as they are."""
        return changed(x, lambda g: (g / self.step).trunc() * self.step)
