"""No gradient: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mohs.defenses._backward import changed
from mohs.defenses._base import Defense


@dataclass(frozen=True)
class Detach(Defense):
    """A negative control: changes no answer, and makes the input gradient zero everywhere. **It adds no robustness.**

        x -> x,   g -> 0

    Cost: none worth naming.

    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> Detach().transform(x).sum().backward()
    >>> x.grad.tolist()
    [[0.0, 0.0]]

    **Differs from the paper**: it is no published method. The gradient exists and is zero, where ``x.detach()`` would have none and
    an attack would end with an error.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3
    (shattered gradients).
    """

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] as they are."""
        return changed(x, torch.zeros_like)
