"""Spatial warps as latents: rotated, moved, scaled and bent images for attacks that know norms only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, interpolate

from mohs.errors import ModelError, UsageError
from mohs.regions import Linf
from mohs.threat import Threat

SPACING = 4.0
"""How far apart the numbers of two images are: no change of the radius 1 leads from one to another."""


class Warp(nn.Module, ABC):
    """What ``Affine`` and ``Flow`` share: a decoder from latents to warped images of a known set.

    A latent is a row [1 + parameters]: the number of its image, times ``SPACING``, then the parameters of the warp in units of
    their limits. So each row says which image it belongs to, in whatever order and batch it comes: the decoder rounds the
    number, which no change below half of the spacing moves, and whose gradient is zero.

    ``clean`` [N, 1 + parameters] are the latents of the images themselves, ``threat`` allows each parameter its limit.
    """

    images: Tensor

    def __init__(self, images: Tensor, parameters: int) -> None:
        super().__init__()
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"A warp needs floating-point images [N, C, H, W]; got {what}.")
        if torch.finfo(images.dtype).bits < 32:
            raise UsageError(
                f"A warp needs images in float32 or float64; got {images.dtype}, which cannot hold the numbers of the images. Convert "
                "them, and put the cast to a lower precision into the model."
            )
        # a part of the weights: two sets of images are two models, and a record must tell them apart
        self.register_buffer("images", images.detach().clone())
        self.parameters_count = parameters
        self.eval()

    @property
    def clean(self) -> Tensor:
        """Latents of the images as they are, [N, 1 + parameters]."""
        latent = self.images.new_zeros(len(self.images), 1 + self.parameters_count)
        latent[:, 0] = torch.arange(len(latent), device=latent.device) * SPACING
        return latent

    @property
    def threat(self) -> Threat:
        """Each parameter may go to its limit, both ways."""
        return Threat(Linf(1.0), box=(-math.inf, math.inf))

    def forward(self, latent: Tensor) -> Tensor:
        """The warped images [B, C, H, W] of latents [B, 1 + parameters].

        Raises:
            ModelError: latents of another width or below float32, or of an image that is not there.
        """
        if not latent.is_floating_point() or torch.finfo(latent.dtype).bits < 32:
            raise ModelError(f"Latents of a warp are float32 or float64; got {latent.dtype}. Begin at its `clean`.")
        if latent.dim() != 2 or latent.shape[1] != 1 + self.parameters_count:
            raise ModelError(
                f"Latents of this warp are rows of {1 + self.parameters_count} numbers; got shape {tuple(latent.shape)}. Begin at "
                "its `clean`."
            )
        number = (latent[:, 0].detach() / SPACING).round().long()
        if len(number) and not 0 <= int(number.min()) <= int(number.max()) < len(self.images):
            raise ModelError(
                f"A latent names image {int(number.min())} or {int(number.max())}; there are {len(self.images)}. Keep changes below "
                f"{SPACING / 2:g}, as under this warp's own threat."
            )
        images = self.images[number].to(latent)
        grid = self.grid(latent[:, 1:], images)
        return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @abstractmethod
    def grid(self, z: Tensor, images: Tensor) -> Tensor:
        """Where each pixel's value comes from, [B, H, W, 2], in units of half the image."""


class Affine(Warp):
    """Rotates, moves and scales each image of a set; the latent says by how much.

        z = (rotation / degrees, right / shift, down / shift, log(size) / log(1 + scale)),   x(z) = bilinear samples of the image

    For ``reparameterize``: an attack in Linf then looks for the worst rotation and translation. The landscape over so few
    numbers is full of local maxima, so that first-order attacks need many restarts; random starts alone do much of the work.

    Args:
        images: clean images [N, C, H, W].
        degrees: largest rotation, both ways, counterclockwise for z > 0.
        shift: largest translation, as a share of the side.
        scale: largest enlargement: sizes go from 1 / (1 + scale) to 1 + scale.

    Raises:
        UsageError: no images, or a limit below 0.
        ModelError: at a call, on latents that are not of this set.

    >>> from mohs.gradients import reparameterize
    >>> x = torch.rand(3, 1, 8, 8)
    >>> warp = Affine(x, degrees=30)
    >>> bool(torch.allclose(warp(warp.clean), x, atol=1e-5)), warp.clean.shape
    (True, torch.Size([3, 5]))
    >>> latent = reparameterize(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), warp)
    >>> latent(warp.clean).shape
    torch.Size([3, 2])

    **Differs from the paper**: the gradient passes through the samples, so that any attack serves; scaling; what comes from
    outside of the image is 0.
    **Source**: L. Engstrom, B. Tran, D. Tsipras, L. Schmidt, A. Madry, "Exploring the landscape of spatial robustness", ICML 2019,
    section 3.
    """

    def __init__(self, images: Tensor, degrees: float = 30.0, shift: float = 0.1, scale: float = 0.0) -> None:
        super().__init__(images, 4)
        self.degrees, self.shift, self.scale = degrees, shift, scale
        _limits(degrees=degrees, shift=shift, scale=scale)

    def grid(self, z: Tensor, images: Tensor) -> Tensor:
        """The inverse map of the rotation, translation and scaling."""
        angle = z[:, 0] * math.radians(self.degrees)
        size = (z[:, 3] * math.log1p(self.scale)).exp()
        cos, sin = angle.cos() / size, angle.sin() / size
        height, width = images.shape[2:]
        right, down = 2 * self.shift * z[:, 1], 2 * self.shift * z[:, 2]
        # the grid's unit is half a side, and sides may differ: angles are those of pixels
        xx, xy, yx, yy = cos, -sin * height / width, sin * width / height, cos
        rows = [torch.stack(row, 1) for row in ((xx, xy, -xx * right - xy * down), (yx, yy, -yx * right - yy * down))]
        return affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)

    def extra_repr(self) -> str:
        """What a record names."""
        return f"degrees={self.degrees:g}, shift={self.shift:g}, scale={self.scale:g}"


class Flow(Warp):
    """Bends each image of a set: every pixel's value comes from a place nearby, and the latent says from where.

        x(z)[i, j] = bilinear sample of the image at (i, j) + pixels * z[:, i, j]

    Args:
        images: clean images [N, C, H, W].
        pixels: how far a value may come from, down and across each.
        points: the flow is given at points x points places and interpolated between them, which keeps it smooth; None: at
            every pixel.

    Raises:
        UsageError: no images, a limit below 0, or fewer than 2 points.
        ModelError: at a call, on latents that are not of this set.

    >>> warp = Flow(torch.rand(2, 1, 8, 8), pixels=1.0, points=4)
    >>> warp.clean.shape, warp(warp.clean).shape
    (torch.Size([2, 33]), torch.Size([2, 1, 8, 8]))

    **Differs from the paper**: the flow is bounded (the paper adds its variation to the loss), and smooth by its few points.
    **Source**: C. Xiao, J.-Y. Zhu, B. Li, W. He, M. Liu, D. Song, "Spatially transformed adversarial examples", ICLR 2018,
    section 3.2, equation 1.
    """

    def __init__(self, images: Tensor, pixels: float = 1.0, points: int | None = None) -> None:
        if points is not None and (type(points) is not int or points < 2):
            raise UsageError(f"points must be a whole number >= 2, or None for one at each pixel; got {points!r}.")
        side = (points, points) if points is not None else tuple(images.shape[2:]) if isinstance(images, Tensor) else ()
        super().__init__(images, 2 * math.prod(side))
        self.pixels, self.points, self.side = pixels, points, side
        _limits(pixels=pixels)

    def grid(self, z: Tensor, images: Tensor) -> Tensor:
        """Each pixel's own place, plus the flow."""
        height, width = images.shape[2:]
        flow = z.reshape(len(z), 2, *self.side) * self.pixels
        if self.points is not None:
            flow = interpolate(flow, (height, width), mode="bilinear", align_corners=True)
        still = torch.eye(2, 3, dtype=z.dtype, device=z.device).expand(len(z), 2, 3)
        away = torch.stack([flow[:, 1] * (2 / width), flow[:, 0] * (2 / height)], 3)
        return affine_grid(still, list(images.shape), align_corners=False) + away

    def extra_repr(self) -> str:
        """What a record names."""
        return f"pixels={self.pixels:g}, points={self.points}"


def _limits(**values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise UsageError(f"{name} must be a finite number >= 0; got {value!r}.")
