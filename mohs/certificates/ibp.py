"""Interval bound propagation: the cheapest certificate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mohs.certificates.run import Certificate, prove_by_bounds
from mohs.threat import Access, Threat


@dataclass(frozen=True)
class IBP:
    """Push an interval per number through the net; the margins are merged into the layers behind the last ReLU.

    Costs about three forward passes per row. Tight only for nets trained for it; on others use ``CROWN``. Centre c and
    reach r of each interval go through z = W a + b as W c + b and |W| r; a first Linear or Conv2d takes the dual norm
    of its rows instead when the threat is no Linf ball and that is tighter.

    The bound speaks of the net as it runs in the dtype of its weights: each layer's rounding, with dot products summed
    in any order, is part of the bound. Winograd convolutions, TF32 and autocast round more than that and are outside.

    Args:
        dtype: arithmetic of the bounds themselves, float64 or float32. Sound in either; their rounding is included.

    >>> IBP().name, IBP().needs.name
    ('IBP', 'GRADIENT')

    **Differs from the paper**: rounding is bounded, the ball is intersected with the box, other norms than Linf.
    **Source**: S. Gowal et al., "Scalable verified training for provably robust image classification", ICCV 2019,
    section 3 (equations 6 and 7; the merged last layer is its "elision").
    """

    dtype: torch.dtype = torch.float64
    name: ClassVar[str] = "IBP"
    needs: ClassVar[Access] = Access.GRADIENT

    def prove(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, batch: int) -> Certificate:
        """Certify checked inputs; see ``certify``."""
        return prove_by_bounds(self.name, model, x, y, threat, batch, self.dtype, None)
