"""Total variation minimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._scikit import restoration
from mohs.defenses._settings import by_image, images, number, numpy_generator, unit


@dataclass(frozen=True)
class TotalVariation(Defense):
    """Keeps a random part of the pixels and puts the smoothest image through them.

        x -> argmin_z  ||m (z - x)||^2 + weight/2 TV(z),   m a random mask, the same for all channels

    Dropped pixels are unknown, so a change has only the kept ones to work on, which are others at each call. There is no
    gradient; the identity going back, averaged over draws, breaks it.

    Args:
        keep: probability that a pixel is kept, above 0 and at most 1.
        weight: of the total variation; larger is smoother. Units of the input.
        rounds: how often dropped pixels are filled in from the last solution; more come nearer to the minimum.

    Raises:
        UsageError: other numbers, or scikit-image is missing (the extra ``images``).
        ModelError: at the first call, on inputs that are no images in [0, 1].

    Cost: ``rounds`` minimisations per image on the CPU, about a millisecond each for 28 x 28 pixels.

    **Differs from the paper**: the masked problem is solved by majorisation: fill the dropped pixels with the last solution (at
    first with the nearest kept one), minimise without a mask by Chambolle's algorithm, repeat (the authors: split Bregman
    iterations). The variation is isotropic, of each channel alone.
    **Source**: C. Guo, M. Rana, M. Cisse, L. van der Maaten, "Countering adversarial images using input transformations",
    ICLR 2018, section 3.3, equations 2 and 3; A. Chambolle, "An algorithm for total variation minimization and applications",
    JMIV 2004.
    """

    keep: float = 0.5
    weight: float = 0.03
    rounds: int = 5
    random: ClassVar[bool] = True
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.keep, "keep", 0, 1, above=True)
        number(self.weight, "weight", 0, above=True)
        number(self.rounds, "rounds", 1, whole=True)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], reconstructed from a part of their pixels."""
        minimise = restoration("TotalVariation").denoise_tv_chambolle
        from scipy.ndimage import distance_transform_edt  # here, as importing the library must stay quick

        generator = numpy_generator()

        def reconstruct(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            kept = generator.random(image.shape[1:]) < self.keep
            if not kept.any():
                kept = np.ones_like(kept)
            nearest = distance_transform_edt(~kept, return_distances=False, return_indices=True)
            found = image[:, nearest[0], nearest[1]]
            for _ in range(self.rounds):
                # channel by channel: the library minimises ||z - f||^2 + 2 w TV(z)
                found = np.stack([minimise(f, weight=self.weight / 4) for f in np.where(kept, image, found)])
            return found

        return by_image(reconstruct, unit(images(x, "TotalVariation")))
