"""Ensemble that averages logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._members import Ensemble


@dataclass(frozen=True)
class MeanLogits(Ensemble):
    """Answers with the mean of several models' logits: ``MeanLogits()(model_a, model_b)``.

        z = mean_m f_m(x)

    Differentiable. A member with larger logits has a larger say. Attacked as the one model that it is.

    Raises:
        UsageError: fewer than two models.
        ModelError: at the first call, where the members have different classes.

    Cost: a pass through each member.

    >>> from torch import nn
    >>> MeanLogits()(nn.Identity(), nn.Softplus())(torch.zeros(1, 2)).shape
    torch.Size([1, 2])

    **Differs from the paper**: it is the plain ensemble, without training the members to differ.
    **Source**: W. He, J. Wei, X. Chen, N. Carlini, D. Song, "Adversarial example defenses: ensembles of weak defenses are not
    strong", WOOT 2017, section 2.
    """

    smooth: ClassVar[bool] = True

    def combine(self, each: Sequence[Tensor], guiding: bool) -> Tensor:
        """Their mean."""
        return torch.stack(tuple(each)).mean(0)
