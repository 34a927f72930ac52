"""Ensemble of random crops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mohs.defenses._base import Defense
from mohs.defenses._settings import images, number


@dataclass(frozen=True)
class CropEnsemble(Defense):
    """Classifies random crops of the image, each enlarged to its size, and averages the probabilities.

        z = log mean_i softmax f(resize(crop_i(x)))

    What a change does at one place it does not do at another. Differentiable; an attack that averages over draws breaks it.

    Args:
        crops: crops per image and call.
        share: side of a crop, as a share of the image's side, above 0 and at most 1.

    Raises:
        UsageError: other numbers.
        ModelError: at the first call, on inputs that are no images.

    Cost: ``crops`` passes through the net per call.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    >>> CropEnsemble(4, 0.5)(net)(torch.rand(2, 1, 8, 8)).exp().sum(1).round().tolist()
    [1.0, 1.0]

    **Differs from the paper**: the images of a batch are cropped at places of their own; a share of 0.8 rather than 90 of 224
    pixels, as small images have no room; logits are log-probabilities.
    **Source**: C. Guo, M. Rana, M. Cisse, L. van der Maaten, "Countering adversarial images using input transformations",
    ICLR 2018, section 3.1 (30 crops).
    """

    crops: int = 30
    share: float = 0.8
    random: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.crops, "crops", 1, whole=True)
        number(self.share, "share", 0, 1, above=True)

    def transform(self, x: Tensor) -> Tensor:
        """One random crop of each of the images [B, C, H, W], enlarged (bilinear) to their size."""
        height, width = images(x, "CropEnsemble").shape[2:]
        rows, columns = _window(x, height, self.share), _window(x, width, self.share)
        crop = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, width))
        crop = crop.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], crop.shape[2], -1))
        return interpolate(crop, (height, width), mode="bilinear", align_corners=False)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logarithms of the mean probabilities, [B, K]."""
        each = [model(self.transform(x)).log_softmax(1) for _ in range(self.crops)]
        return torch.stack(each).logsumexp(0) - math.log(self.crops)


def _window(x: Tensor, side: int, share: float) -> Tensor:
    """Indices of a random stretch of each image's rows (or columns), [B, length]."""
    length = max(1, round(share * side))
    offset = torch.randint(side - length + 1, (len(x), 1), device=x.device)
    return offset + torch.arange(length, device=x.device)
