"""JPEG compression."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._settings import by_image, images, number, unit


@dataclass(frozen=True)
class JPEG(Defense):
    """Compresses each image and decompresses it again: what the eye does not see, and fine noise, is rounded away.

        x -> decode(encode(round(255 x), quality)) / 255

    The codec is the real one (Pillow's libjpeg), so there is no gradient at all; the identity going back breaks it.

    Args:
        quality: libjpeg's, 1 (coarse) to 100 (fine).

    Raises:
        UsageError: another quality.
        ModelError: at the first call, on inputs that are no images in [0, 1].

    Cost: one pass of the codec per image, on the CPU.

    >>> import torch
    >>> x = torch.full((1, 3, 8, 8), 0.5)
    >>> bool((JPEG(75).transform(x) - x).abs().max() < 0.01)
    True

    **Differs from the paper**: one channel is coded as grey, three as RGB (with the codec's usual halved chroma); where there
    are other numbers of channels, each is coded as a grey image of its own.
    **Source**: G. Dziugaite, Z. Ghahramani, D. Roy, "A study of the effect of JPG compression on adversarial images", 2016,
    section 2; C. Guo et al., "Countering adversarial images using input transformations", ICLR 2018, section 3.2 (quality 75).
    """

    quality: int = 75
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.quality, "quality", 1, 100, whole=True)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], compressed and decompressed."""
        return by_image(self._image, unit(images(x, "JPEG")))

    def _image(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from PIL import Image  # here, as importing the library must stay quick

        pixels = np.rint(image * 255).astype(np.uint8)
        planes = [pixels.transpose(1, 2, 0)] if len(pixels) == 3 else list(pixels)
        decoded = []
        for plane in planes:
            file = io.BytesIO()
            Image.fromarray(plane).save(file, "JPEG", quality=self.quality)
            decoded.append(np.asarray(Image.open(file), dtype=np.float64) / 255)
        return decoded[0].transpose(2, 0, 1) if len(pixels) == 3 else np.stack(decoded)
