"""Ensemble that averages probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._members import Ensemble


@dataclass(frozen=True)
class MeanProbabilities(Ensemble):
    """Answers with the mean of several models' probabilities: ``MeanProbabilities()(model_a, model_b)``.

        z = log mean_m softmax f_m(x)

    Differentiable; the logarithm keeps a gradient where members are sure. Attacked as the one model that it is.

    Raises:
        UsageError: fewer than two models.
        ModelError: at the first call, where the members have different classes.

    Cost: a pass through each member.

    >>> from torch import nn
    >>> net = MeanProbabilities()(nn.Identity(), nn.Softplus())
    >>> round(float(net(torch.zeros(1, 2)).exp().sum()), 4)
    1.0

    **Differs from the paper**: logits are log-probabilities, so that losses on logits apply.
    **Source**: F. Tramer et al., "Ensemble adversarial training", ICLR 2018, for ensembles as a defense; B. Lakshminarayanan,
    A. Pritzel, C. Blundell, "Simple and scalable predictive uncertainty estimation using deep ensembles", NeurIPS 2017,
    section 2.4.
    """

    smooth: ClassVar[bool] = True

    def combine(self, each: Sequence[Tensor], guiding: bool) -> Tensor:
        """Logarithm of the mean probability."""
        return torch.stack([z.log_softmax(1) for z in each]).logsumexp(0) - math.log(len(each))
