"""A small generator of grey images: what a GAN trains, and what Defense-GAN projects onto."""

from __future__ import annotations

from torch import Tensor, nn


class Generator(nn.Module):
    """Images in [0, 1] from latents [B, latent], standard normal: three linear layers.

    Small and without convolutions, because Defense-GAN runs it hundreds of times per image; without batch statistics, so that
    an image does not depend on its neighbours.

    Args:
        latent: numbers in a latent.
        first, second: widths of the hidden layers.

    >>> import torch
    >>> Generator(latent=8, first=16, second=16)(torch.zeros(2, 8)).shape
    torch.Size([2, 1, 28, 28])

    **Source**: how it is trained: I. Gulrajani, F. Ahmed, M. Arjovsky, V. Dumoulin, A. Courville, "Improved training of
    Wasserstein GANs", NeurIPS 2017. The net itself follows no paper.
    """

    def __init__(self, latent: int = 32, first: int = 128, second: int = 144) -> None:
        super().__init__()
        self.latent = latent
        self.net = nn.Sequential(
            nn.Linear(latent, first),
            nn.LeakyReLU(0.2),
            nn.Linear(first, second),
            nn.LeakyReLU(0.2),
            nn.Linear(second, 784),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 28, 28)),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images [B, 1, 28, 28]."""
        return self.net(z)

    def extra_repr(self) -> str:
        """What a record names."""
        return f"latent={self.latent}"
