"""Non-local means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._scikit import restoration
from mohs.defenses._settings import by_image, images, number, unit


@dataclass(frozen=True)
class NonLocalMeans(Defense):
    """Replaces each pixel by a mean over pixels, near or far, whose surroundings look alike.

        x_i -> sum_j w_ij x_j / sum_j w_ij,   w_ij = exp(-d(patch_i, patch_j)^2 / strength^2)

    Noise averages out while structure stays. The implementation has no gradient; the identity going back breaks it as
    well as the true gradient does.

    Args:
        strength: cut-off distance between patches, in units of the input; larger is smoother.
        patch: side of the compared patches in pixels.
        search: how far away patches are looked for, in pixels.

    Raises:
        UsageError: other numbers, or scikit-image is missing (the extra ``images``).
        ModelError: at the first call, on inputs that are no images in [0, 1].

    Cost: about (2 search + 1)^2 operations per pixel, on the CPU.

    **Differs from the paper**: scikit-image's implementation rather than OpenCV's, which works on 8 bits and, for colours, in
    another colour space; patches are 3 x 3 and the window 13 x 13, the settings 13-3.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing", NDSS 2018, section 4.2 (non-local smoothing); A. Buades, B. Coll,
    J.-M. Morel, "A non-local algorithm for image denoising", CVPR 2005.
    """

    strength: float = 0.1
    patch: int = 3
    search: int = 6
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.strength, "strength", 0, above=True)
        number(self.patch, "patch", 1, whole=True)
        number(self.search, "search", 1, whole=True)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], denoised."""
        denoise = restoration("NonLocalMeans").denoise_nl_means

        settings = {"patch_size": self.patch, "patch_distance": self.search, "h": self.strength}

        def one(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            if len(image) == 1:  # the library would drop an axis of length one
                return denoise(image[0], **settings)[None]
            return denoise(image, **settings, channel_axis=0)

        return by_image(one, unit(images(x, "NonLocalMeans")))
