"""Geometry of word substitutions: at a few places another one of the words that may stand there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs._geometry import Box, per_row, unit_scale
from mohs.errors import ThreatError


@dataclass(frozen=True)
class Words:
    """Another word at no more than ``eps`` places of a sentence, each one of the alternatives that the input itself brings.

    Inputs are [B, P, T, C]: T places with C words each. The last plane holds the choice, whose largest number at a place (1, the others
    0) says which word stands there; the planes before it say what the words are (``mohs.models.text.choices`` makes such inputs from
    token ids), and nobody may change them. To choose another word is to swap its number with the largest one. So what is allowed is
    finite, known from the input alone, and exact: a point is inside or not, without rounding. There is no box, as nothing leaves it.

    Args:
        eps: how many places may change, a whole number, or inf.

    >>> x0 = torch.tensor([[[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]])  # two places with three words each
    >>> g = torch.tensor([[[[0.0, 2.0, 1.0], [0.0, 0.0, 3.0]]]])
    >>> Words(1).extreme(g, x0, torch.ones(1), (-math.inf, math.inf))[0, 0].tolist()  # at the second place the third word
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """

    eps: float
    kind: ClassVar[str] = "words"
    name: ClassVar[str] = "words"

    def __post_init__(self) -> None:
        whole = isinstance(self.eps, int | float) and (math.isinf(self.eps) or float(self.eps).is_integer())
        if not (whole and self.eps >= 0):
            raise ThreatError(f"words counts places; got eps={self.eps!r}. Give a whole number >= 0, or inf.")

    def refuse(self, x: Tensor) -> None:
        """Raise where there are no choices.

        Raises:
            ThreatError: no [B, P, T, C].
        """
        if x.dim() != 4:
            raise ThreatError(
                f"The threat words:{self.eps:g} chooses among words; got inputs of shape {tuple(x.shape[1:])}. Make [N, 2, T, C] of "
                "token ids by mohs.models.text.choices, for a net inside mohs.models.WordChoices."
            )

    # --- choices --------------------------------------------------------------------------------------------------------

    def picked(self, x: Tensor) -> Tensor:
        """Which word stands at each place, int64 [B, T]; the first one on ties."""
        self.refuse(x)
        return x[:, -1].argmax(2)

    def at(self, pick: Tensor, x0: Tensor) -> Tensor:
        """``x0`` with the words ``pick`` [B, T] chosen."""
        x, own, other = x0.clone(), self.picked(x0).unsqueeze(2), pick.unsqueeze(2)
        plane = x0[:, -1]
        x[:, -1] = plane.scatter(2, own, plane.gather(2, other)).scatter(2, other, plane.gather(2, own))
        return x

    def gains(self, g: Tensor, x0: Tensor) -> Tensor:
        """What each word at each place brings along ``g`` [B, P, T, C], beside the clean one, which brings 0: <g, x - x0> [B, T, C]."""
        own = self.picked(x0).unsqueeze(2)
        plane, along = x0[:, -1], unit_scale(g[:, -1])
        return (plane.gather(2, own) - plane) * (along - along.gather(2, own))

    def _best(self, gains: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """The best word at each of the ``eps`` [B] places where it gains most; ties go to the first place."""
        gain, word = gains.max(2)
        order = gain.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        changed = (order < eps.unsqueeze(1)) & (gain > 0)
        return self.at(torch.where(changed, word, self.picked(x0)), x0)

    # --- what every region can ------------------------------------------------------------------------------------------

    def measure(self, x: Tensor, x0: Tensor) -> Tensor:
        """At how many places another word stands, [B]; inf where anything else has been changed."""
        reachable = (x == self.at(self.picked(x), x0)).flatten(1).all(1)
        count = (x[:, -1] != x0[:, -1]).any(2).sum(1).to(x0.dtype)
        return count.masked_fill(~reachable, math.inf)

    def contains(self, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """[B] bool: are few enough words others, and nothing else changed?"""
        size = self.measure(x, x0)
        return (size <= eps) & size.isfinite()

    def steepest(self, g: Tensor) -> Tensor:
        """Words have no norm: no direction of unit length and no dual."""
        raise ThreatError(
            "This attack follows a norm; got the threat words. Allowed: l1, l2, linf and other p >= 1. Use HotFlip or PGD for words."
        )

    dual = steepest

    def shortest(self, w: Tensor, gain: Tensor, x: Tensor, box: Box) -> Tensor:
        """Words have no norm; raises as ``steepest`` does."""
        return self.steepest(w)

    def extreme(self, g: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """Exact maximiser of <g, x>: the places with the largest gain, each with its best word."""
        return self._best(self.gains(g, x0), x0, eps)

    def move(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, box: Box) -> Tensor:
        """A step of ``size`` [B] along the gradient, whose largest number in the last plane is made 1; it ends between the words."""
        moved = x.clone()
        moved[:, -1] += unit_scale(g[:, -1]).mul_(per_row(size, x[:, -1]))
        return moved

    def advance(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """``move``, then ``project``."""
        return self.project(self.move(x, g, size, x0, box), x0, eps, box)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The nearest point: all choices are equally long, so it is the one that gains most along ``x``."""
        return self._best(self.gains(x, x0), x0, eps)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """Random words at ``eps`` random places."""
        self.refuse(x0)
        _, _, places, words = x0.shape
        rank = streams.uniform(key, (places,), dtype=torch.float64).argsort(dim=1).argsort(dim=1)
        own = self.picked(x0)
        drawn = (streams.uniform(key, (places,), draw=1, dtype=torch.float64) * (words - 1)).long()
        drawn = (drawn + (drawn >= own)).clamp_(max=words - 1)  # one of the others
        return self.at(torch.where(rank < eps.unsqueeze(1), drawn, own), x0)

    def default_step(self, eps: Tensor, steps: int, box: Box) -> Tensor:
        """1: past the middle between two words, where the gradient prefers one by more than half of its largest number."""
        return torch.ones_like(eps)
