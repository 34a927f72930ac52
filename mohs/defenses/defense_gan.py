"""Defense-GAN: projection onto what a generator can make."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.defenses._base import Defense
from mohs.defenses._generative import digest, kept
from mohs.defenses._settings import number, unit
from mohs.errors import ModelError, UsageError

BUNDLED = "fashion-generator"
MOMENTUM, RATE = 0.7, 10.0
"""Of the descent, as in the authors' code; the rate is that of the mean squared error of the pixels."""

LATE, FALL = 0.8, 0.1
"""After this share of the steps the rate falls to this share."""


def project(generator: nn.Module, x: Tensor, z: Tensor, steps: int, rate: float = RATE) -> Tensor:
    """The latents [B, d] whose images are nearest to ``x`` [B, ...], by descent from ``z`` [B, starts, d]: the best start's.

        v <- momentum v - rate grad_z mean((G(z) - x)^2),   z <- z + v

    Cost: steps + 1 forwards and steps backwards of the generator, on all starts.
    """
    rows, starts, latent = z.shape
    # a caller may be in no_grad or in inference_mode; the descent needs a graph of its own
    with torch.inference_mode(False), torch.enable_grad():
        wanted = x.detach().clone().repeat_interleave(starts, 0)
        z = z.detach().clone().reshape(-1, latent)
        speed = torch.zeros_like(z)
        for step in range(steps):
            point = z.requires_grad_()
            error = (generator(point) - wanted).square().flatten(1).mean(1).sum()
            (gradient,) = torch.autograd.grad(error, point)
            now = rate if step < LATE * steps else rate * FALL
            speed = speed.mul_(MOMENTUM).sub_(gradient, alpha=now)
            z = z.detach() + speed
    with torch.no_grad():
        error = (generator(z) - wanted).square().flatten(1).mean(1).view(rows, starts)
        best = error.argmin(1)
        return z.view(rows, starts, latent)[torch.arange(rows, device=z.device), best].detach()


@dataclass(frozen=True)
class DefenseGAN(Defense):
    """Shows the classifier, instead of an image, the one nearest to it among those that a generator can make.

        z* = argmin over z of |G(z) - x|^2,   x -> G(z*)

    found by descent from several random starts. The loop hides the gradient, and what the generator cannot make is taken away.
    Where the generator is poor, answers to clean inputs suffer; where it is rich, it can make adversarial inputs too
    (``mohs.attacks.Latent`` looks for them). The identity going back breaks a part of it, and as the descent does not end
    where the nearest image is, one that fools one draw of the starts need not fool the next.

    Args:
        steps: of the descent (the paper: 200).
        starts: how many latents it starts from (the paper: 10).
        rate: its step length, for the mean squared error.
        seed: None: starts are drawn anew at each call; a number: they depend on it and on the input's content alone.
        generator: a module with the attribute ``latent``, the length of its latents [B, latent]; None: the one that ships with
            Mohs, for the 28 x 28 grey images of Fashion-MNIST.

    Raises:
        UsageError: settings that cannot be, or a generator without ``latent``.
        ModelError: at the first call, on inputs that are not of the shape that the generator makes.

    Cost: ``starts * steps`` forwards and backwards of the generator per image: 1 s of one CPU core for a hundred images.

    >>> x = torch.rand(2, 1, 28, 28)
    >>> DefenseGAN(steps=3, starts=2, seed=0).transform(x).shape
    torch.Size([2, 1, 28, 28])

    **Differs from the paper**: 100 steps from 4 starts, where the paper takes 200 from 10; a generator of three linear layers.
    **Source**: P. Samangouei, M. Kabkab, R. Chellappa, "Defense-GAN: protecting classifiers against adversarial attacks using
    generative models", ICLR 2018, section 4; momentum, rate and the starts' deviation are those of the authors' code.
    """

    steps: int = 100
    starts: int = 4
    rate: float = RATE
    seed: int | None = None
    generator: nn.Module | None = field(default=None, repr=False, compare=False)
    weights: str = field(init=False)
    random: ClassVar[bool] = True
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.steps, "steps", 1, whole=True)
        number(self.starts, "starts", 1, whole=True)
        number(self.rate, "rate", 0, above=True)
        if self.seed is not None:
            number(self.seed, "seed", 0, whole=True)
            object.__setattr__(self, "random", False)
        if self.generator is not None and not isinstance(self.generator, nn.Module):
            raise UsageError(
                f"generator must be a torch module with the attribute latent, or None; got {type(self.generator).__name__}. Wrap it "
                "in a module."
            )
        if self.generator is not None and not isinstance(getattr(self.generator, "latent", None), int):
            raise UsageError(
                f"generator must be a module with the attribute latent, a whole number; got {type(self.generator).__name__} without."
            )
        object.__setattr__(self, "weights", digest(self.generator, BUNDLED))

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...] in [0, 1], each replaced by the nearest that the generator finds."""
        generator = kept(self, self.generator, BUNDLED, torch.float32, x.device)
        wanted = unit(x).float()
        latent = generator.latent
        assert isinstance(latent, int)
        shape = (self.starts, latent)
        with torch.no_grad():
            made = tuple(generator(torch.zeros(1, shape[1], device=x.device)).shape[1:])
            if made != tuple(x.shape[1:]):
                raise ModelError(
                    f"This generator makes inputs of shape {made}; got {tuple(x.shape[1:])}. Train one for such inputs "
                    "(recipes/wgan_gp_fashion.py), or defend with something else."
                )
            if not len(x):
                return x.clone()
            if self.seed is None:
                z = torch.randn(len(x), *shape, device=x.device)
            else:
                z = streams.normal(streams.derive(streams.content_keys(wanted), self.seed), shape)
            z = project(generator, wanted, z / math.sqrt(shape[1]), self.steps, self.rate)
            return generator(z).to(x.dtype)
