"""Adversarial training whose answers at an input and at its adversarial point are also drawn together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context, Last
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class UnifiedEmbedding:
    """A weighted cross-entropy at inputs and adversarial points, plus how far apart the two embeddings lie (the logits).

        loss = (J(x, y) + weight * J(x', y)) / (1 + weight) + similarity * ||z(x') - z(x)||^2 / 2

    The last term asks for the same answer, not for the right one (low-level similarity learning). With one step against the
    net itself it is adversarial training of one step, and needs a ``Cascade`` to withstand many.

    Args:
        attack: makes x', such as ``FGSM()``; its gradient is not differentiated through.
        weight: of the adversarial cross-entropy, >= 0. The paper's is 0.3.
        similarity: weight of the squared distance, >= 0. The paper's is 0.0001 of the sum over the 64 pairs of its batch, 0.0064
            of the mean.
        pivot: only the adversarial embedding moves, towards the clean one as it is (the pivot loss); else both
            move (the bidirectional loss).
        varied: every row has a radius of its own, |N(0, eps / 2)| cut at eps, as in the paper; else eps.

    Cost: 2 forwards and 2 backwards (as one pass of twice the batch), and the attack's own, per example and epoch.

    >>> context = Context(lambda attack, x, y, **_: x + torch.tensor([[0.0, 2.0]]), eps=0.1, done=0.0)
    >>> objective = UnifiedEmbedding(None, weight=0.0, similarity=0.5, varied=False)
    >>> loss = objective.loss(nn.Identity(), torch.zeros(1, 2), torch.tensor([0]), context)
    >>> round(float(loss), 4)  # log 2, and 0.5 * 2^2 / 2
    1.6931

    **Differs from the paper**: any attack and region; the paper has a step of FGSM or to the least likely class. Clean inputs
    and their points pass the net together and share batch statistics, as there. The published code's pivot loss lets the
    gradient through to the clean embedding, so that it is the bidirectional one; ``pivot`` here does as the paper says.
    **Source**: T. Na, J. H. Ko, S. Mukhopadhyay, "Cascade adversarial machine learning regularized with a unified embedding",
    ICLR 2018, low-level similarity learning; constants, the factor 1/2 and the distribution of radii from the authors' code.
    """

    attack: Attack
    weight: float = 0.3
    similarity: float = 0.0064
    pivot: bool = False
    varied: bool = True

    def __post_init__(self) -> None:
        number(self.weight, "weight of UnifiedEmbedding, that of the adversarial cross-entropy,", 0)
        number(self.similarity, "similarity of UnifiedEmbedding, the weight of the squared distance,", 0)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The cross-entropies and the distance, means over the batch."""
        radii = context.around(self).varied(x) if self.varied else None
        points = context.perturb(Last(self.attack), x, y, radii=radii)
        here, there = classify(model, torch.cat([x, points])).chunk(2)
        right = (F.cross_entropy(here, y) + self.weight * F.cross_entropy(there, y)) / (1 + self.weight)
        apart = (there - (here.detach() if self.pivot else here)).square().sum(1).mean() / 2
        return right + self.similarity * apart
