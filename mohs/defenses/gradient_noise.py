"""Noise on the gradient: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mohs import streams
from mohs.defenses._backward import changed
from mohs.defenses._base import Defense
from mohs.defenses._settings import number


@dataclass(frozen=True)
class GradientNoise(Defense):
    """A negative control: changes no answer, but adds noise to the input gradient. **It adds no robustness.**

        x -> x,   g -> g + scale rms(g) u,   u standard normal

    An evaluation that calls a model behind it more robust than the model alone has measured its own gradients.

    Args:
        scale: of the noise, in units of the gradient's root mean square of each row.

    Raises:
        UsageError: scale is no number above 0.

    Cost: none worth naming.

    >>> import torch
    >>> x = torch.ones(1, 4, requires_grad=True)
    >>> y = GradientNoise(10.0).transform(x)
    >>> y.sum().backward()
    >>> torch.equal(y, x), torch.equal(x.grad, torch.ones(1, 4))
    (True, False)

    **Differs from the paper**: the noise is a function of input and gradient, so that a run can be repeated.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, section 3
    (how such defenses are recognised).
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        number(self.scale, "scale", 0, above=True)

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] as they are."""
        still = x.detach()

        def noisy(g: Tensor) -> Tensor:
            size = g.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (g.dim() - 1))
            keys = streams.derive(streams.point_keys(still), streams.point_keys(g))
            return g + self.scale * size * streams.normal(keys, tuple(g.shape[1:]), 0, g.dtype)

        return changed(x, noisy)
