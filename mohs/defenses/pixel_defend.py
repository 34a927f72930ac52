"""PixelDefend: purification by a density, pixel after pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mohs.defenses._base import Defense
from mohs.defenses._generative import digest, kept
from mohs.defenses._settings import number, unit
from mohs.errors import UsageError
from mohs.models.pixelcnn import LEVELS, PixelCNN, log_mass, scan

BUNDLED = "fashion-pixelcnn"
TOP = LEVELS - 1


@dataclass(frozen=True)
class PixelDefend(Defense):
    """Moves each image to a likelier one nearby: pixel after pixel, the likeliest level near the pixel's value.

        x_ij -> argmax over levels v with |v - x_ij| <= eps of p(v | the pixels chosen before)

    The density is an autoregressive net. The choice has no gradient, and a change as large as ``eps`` can be undone where the
    density gives another level more mass; as the output is close to the input, the identity going back breaks it. It may also do
    harm: what is likely is smooth, and pixels chosen greedily need not make a likely image.

    Args:
        eps: how far a pixel may move, in units of the input.
        net: the density (``mohs.models.pixelcnn``); None: the one that ships with Mohs, for the 28 x 28 grey images of Fashion-MNIST.

    Raises:
        UsageError: eps below one of 255 levels, or a net of another kind.
        ModelError: at the first call, on inputs that are not images in [0, 1] of the size that the net knows.

    Cost: the arithmetic of one forward pass of the density, in double precision, but in as many steps as there are pixels: 0.2 s
    of one CPU core for one image, 2 to 3 s for a hundred.

    >>> x = torch.full((1, 1, 28, 28), 0.5)
    >>> moved = PixelDefend().transform(x) - x
    >>> 0 < float(moved.abs().max()) <= 16 / 255 + 1e-5
    True

    **Differs from the paper**: a small density; every image is scanned, also a likely one, which the paper's adaptive variant leaves
    alone. The scan keeps what it has computed and works in double precision, so that a near tie does not depend on the batch.
    **Source**: Y. Song, T. Kim, S. Nowozin, S. Ermon, N. Kushman, "PixelDefend: leveraging generative models to understand and
    defend against adversarial examples", ICLR 2018, algorithm 1.
    """

    eps: float = 16 / 255
    net: PixelCNN | None = field(default=None, repr=False, compare=False)
    weights: str = field(init=False)
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.eps, "eps", 1 / TOP, 1)
        if self.net is not None and not isinstance(self.net, PixelCNN):
            raise UsageError(
                f"net must be a mohs.models.pixelcnn.PixelCNN or None; got {type(self.net).__name__}. Others cannot be scanned."
            )
        object.__setattr__(self, "weights", digest(self.net, BUNDLED))

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, 1, H, W] in [0, 1], purified."""
        net, count = self._density(x.device), int(2 * self.eps * TOP + 1e-3) + 1
        steps = torch.arange(count, dtype=torch.float64, device=x.device)

        def likeliest(described: Tensor, pixel: Tensor) -> Tensor:
            # a thousandth of a level is granted, as float32 has rounded the pixel
            low = ((pixel - self.eps) * TOP - 1e-3).ceil().clamp_min(0).unsqueeze(1)
            high = ((pixel + self.eps) * TOP + 1e-3).floor().clamp_max(TOP).unsqueeze(1)
            levels = low + steps
            mass = log_mass(described, levels.clamp_max(TOP)).masked_fill(levels > high, -torch.inf)
            return levels.gather(1, mass.argmax(1, keepdim=True)).squeeze(1) / TOP

        with torch.no_grad():
            return scan(net, unit(x).double(), likeliest).to(x.dtype)

    def _density(self, device: torch.device) -> PixelCNN:
        """The density in double precision, kept from call to call."""
        net = kept(self, self.net, BUNDLED, torch.float64, device)
        if not isinstance(net, PixelCNN):
            raise UsageError(f"{BUNDLED} is no PixelCNN but a {type(net).__name__}. Install Mohs again.")
        return net
