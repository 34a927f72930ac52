"""Ensemble that rejects what its members disagree about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._members import Ensemble


@dataclass(frozen=True)
class RejectDisagreement(Ensemble):
    """Answers what all models answer, and rejects the input where they differ: ``RejectDisagreement()(model_a, model_b)``.

        z_k = min_m (f_mk - max_(j != k) f_mj),   z_K = 0 (the rejection)

    z_k is positive exactly where every member answers k, so the highest logit is the common answer, or the rejection. That is
    differentiable, and an attack on 'another class wins over the rejection' is an attack on all members at once. An evaluation
    knows by itself that to be rejected is no success for the attack; ``mohs.attack`` has to be told, by ``reject=K``.

    Raises:
        UsageError: fewer than two models.
        ModelError: at the first call, where the members have different classes.

    Cost: a pass through each member.

    >>> from torch import nn
    >>> class Mirror(nn.Module):
    ...     def forward(self, x):
    ...         return torch.where(x < -1, -x, x)
    >>> net = RejectDisagreement()(nn.Identity(), Mirror())
    >>> net(torch.tensor([[-0.5, -1.0], [-1.0, -0.5], [-2.0, -3.0]])).argmax(1).tolist()
    [0, 1, 2]

    **Differs from the paper**: these logits, which say the same as the published rule;
    a member whose highest logits tie agrees with each of them.
    **Source**: A. Bagnall, R. Bunescu, G. Stewart, "Training ensembles to detect adversarial examples", 2017, section 2 (rejection
    where members disagree); the attack on all members: W. He et al., WOOT 2017, section 5.
    """

    smooth: ClassVar[bool] = True
    rejects: ClassVar[bool] = True

    def combine(self, each: Sequence[Tensor], guiding: bool) -> Tensor:
        """By how much the least convinced member answers each class, and 0 for the rejection: [B, K + 1]."""
        z = torch.stack(tuple(each))
        best = z.topk(2, dim=2)
        rival = torch.where(
            torch.arange(z.shape[2], device=z.device) == best.indices[..., :1],
            best.values[..., 1:],
            best.values[..., :1],
        )
        common = (z - rival).amin(0)
        return torch.cat([common, torch.zeros_like(common[:, :1])], 1)
