"""Ensemble that votes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mohs.defenses._members import Ensemble
from mohs.guide import instead


@dataclass(frozen=True)
class MajorityVote(Ensemble):
    """Each of several models has one vote, and the class with most wins: ``MajorityVote()(model_a, model_b, model_c)``.

        z = mean_m onehot(argmax f_m(x)) + p / 2M,   p = mean_m softmax f_m(x), which decides between equal votes

    There is no gradient. That of the mean probability breaks it: a member that is fooled already has a flat probability, so the
    push goes to the others. (Where every member is so sure that its softmax rounds to 0 and 1, attack the logits' mean instead.)

    Raises:
        UsageError: fewer than two models.
        ModelError: at the first call, where the members have different classes.

    Cost: a pass through each member.

    >>> from torch import nn
    >>> net = MajorityVote()(nn.Identity(), nn.Identity(), nn.Tanh())
    >>> net(torch.tensor([[0.0, 3.0]])).argmax(1).tolist()
    [1]

    **Differs from the paper**: it is the plain vote.
    **Source**: W. He, J. Wei, X. Chen, N. Carlini, D. Song, "Adversarial example defenses: ensembles of weak defenses are not
    strong", WOOT 2017, section 2.
    """

    def combine(self, each: Sequence[Tensor], guiding: bool) -> Tensor:
        """Shares of the votes, equal ones told apart by less than a vote."""
        logits = torch.stack(tuple(each))
        known = logits.detach()
        votes = one_hot(known.argmax(2), known.shape[2]).to(known.dtype).mean(0)
        value = votes + known.softmax(2).mean(0) / (2 * len(known))
        return instead(value, logits.softmax(2).mean(0)) if guiding and logits.requires_grad else value
