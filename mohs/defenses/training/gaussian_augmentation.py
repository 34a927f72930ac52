"""Gaussian augmentation: noisy copies of each input, with its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs import streams
from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context
from mohs.defenses.training.room import keys
from mohs.target import classify


@dataclass(frozen=True)
class GaussianAugmentation:
    """Cross-entropy on noisy copies of the inputs, and on the inputs as they are.

        loss = mean of J(x, y) and J(x + sigma * N(0, 1), y) for each copy

    Noise goes in all directions where an attack goes in one: in many dimensions it moves the boundary away from typical points, and the
    worst point near by much less. A net trained so resists small changes a little better, and is what randomised smoothing starts from.

    Args:
        sigma: standard deviation of the noise, input units, above 0.
        copies: noisy ones of each input, at least 1; each step draws new noise.
        keep: train on the inputs as they are as well; False: the copies take their place.

    Cost: 1 forward and 1 backward for each copy and for the input, if it is kept, per example and epoch; they pass the net together.

    >>> context = Context(perturb=lambda *_: None, eps=0.0, done=0.0)
    >>> x, y = torch.zeros(1, 2), torch.tensor([0])
    >>> kept, replaced = (GaussianAugmentation(1e-6, keep=keep).loss(nn.Identity(), x, y, context) for keep in (True, False))
    >>> round(kept.item(), 4), round(replaced.item(), 4)  # log 2 both times
    (0.6931, 0.6931)

    **Differs from the paper**: new noise in each step instead of a training set that is augmented once; it is not clipped, so that its
    mean is 0. The other half of the paper's defense is ``mohs.defenses.BoundedReLU``.
    **Source**: V. Zantedeschi, M.-I. Nicolae, A. Rawat, "Efficient defenses against adversarial attacks", AISec 2017, the section on
    Gaussian data augmentation.
    """

    sigma: float = 0.1
    copies: int = 1
    keep: bool = True
    attack: ClassVar[None] = None

    def __post_init__(self) -> None:
        number(self.sigma, "sigma of GaussianAugmentation, the standard deviation of its noise,", 0, above=True)
        number(self.copies, "copies of GaussianAugmentation", 1, whole=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """Mean cross-entropy over the copies and, if they are kept, the inputs."""
        looks = [self._noisy(x, context.seed, copy) for copy in range(self.copies)]
        if self.keep:
            looks.insert(0, x)
        return F.cross_entropy(classify(model, torch.cat(looks)), y.repeat(len(looks)))

    def _noisy(self, x: Tensor, seed: int, copy: int) -> Tensor:
        return x + self.sigma * streams.normal(keys(x, seed, copy), tuple(x.shape[1:]), dtype=x.dtype)
