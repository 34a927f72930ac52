"""A small gated PixelCNN for grey images: the exact probability of an image, pixel after pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mohs.errors import ModelError

LEVELS = 256
"""Grey levels of a pixel: k / 255."""

DILATIONS = (1, 2, 4, 1)
"""How far apart the taps of each layer after the first one are."""

REACH = 3
"""How many rows above, and columns to the left, the first layer sees."""


class PixelCNN(nn.Module):
    """The density of grey images as a product of conditionals, each seeing only what comes before it in reading order.

        p(x) = product over pixels of p(x_ij | rows above, pixels to the left)

    Each conditional is a mixture of logistics, discretised to 256 levels. Two stacks of gated convolutions run side by side:
    the vertical one sees all rows above, the horizontal one the pixels to the left as well, so there is no blind spot. As the
    vertical stack needs finished rows only and the horizontal one is causal, a scan in reading order (``scan``) can keep what
    it has computed, and costs as much arithmetic as one forward pass.

    Args:
        width: channels of each stack.
        mixtures: logistics per pixel.
        size: height and width of the images in pixels.

    >>> net = PixelCNN(width=4, mixtures=2, size=6)
    >>> probabilities = net.conditionals(net(torch.rand(1, 1, 6, 6))).exp()
    >>> probabilities.shape, bool((probabilities.sum(-1) - 1).abs().max() < 1e-4)
    (torch.Size([1, 6, 6, 256]), True)

    **Differs from the paper**: the mixture of logistics is PixelCNN++'s; kernels of 2 x 3 with dilation instead of 5 x 5; the row and
    column of a pixel are inputs; a few layers and tens of channels.
    **Source**: A. van den Oord et al., "Conditional image generation with PixelCNN decoders", NeurIPS 2016, section 2 (gates,
    two stacks); T. Salimans, A. Karpathy, X. Chen, D. Kingma, "PixelCNN++", ICLR 2017, section 2.1 (the mixture);
    P. Ramachandran et al., "Fast generation for convolutional autoregressive models", 2017 (the scan).
    """

    place: Tensor

    def __init__(self, width: int = 32, mixtures: int = 5, size: int = 28) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.above = nn.Conv2d(1, 2 * width, (REACH, 2 * REACH + 1))
        self.left = nn.Conv2d(1, 2 * width, (1, REACH))
        self.where = nn.Conv2d(5, 2 * width, 1)
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.layers = nn.ModuleList(Layer(width, dilation) for dilation in DILATIONS)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, 3 * mixtures, 1))
        side = torch.linspace(-1, 1, size)
        row, column = torch.meshgrid(side, side, indexing="ij")
        place = torch.stack([row, column, row.square(), column.square(), row * column])
        self.register_buffer("place", place.unsqueeze(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What describes each pixel's conditional, [B, 3 * mixtures, H, W], for images [B, 1, H, W] in [0, 1]."""
        x = 2 * check(x, self.size) - 1
        v = self.above(functional.pad(x[:, :, :-1], (REACH, REACH, REACH, 0))) + self.where(self.place)
        h = gate(self.left(functional.pad(x[..., :-1], (REACH, 0))) + self.across(v))
        v = gate(v)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.head(h)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log probability of each image, [B] in nats; values are rounded to the 256 levels."""
        levels = (x * (LEVELS - 1)).round().clamp(0, LEVELS - 1)
        described = self(levels / (LEVELS - 1)).movedim(1, -1)
        return log_mass(described, levels[:, 0].unsqueeze(-1)).flatten(1).sum(1)

    def conditionals(self, described: Tensor) -> Tensor:
        """Log probability of every level of every pixel, [B, H, W, 256], from what ``forward`` answered."""
        return log_mass(described.movedim(1, -1), torch.arange(LEVELS, device=described.device).to(described))


class Layer(nn.Module):
    """Both stacks by one layer: the vertical one sees a row farther up, the horizontal one a pixel farther left."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3), dilation=dilation)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 2), dilation=dilation)
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical and the horizontal stack after it."""
        d = self.dilation
        seen = self.vertical(functional.pad(v, (d, d, d, 0)))
        h = h + self.out(gate(self.horizontal(functional.pad(h, (d, 0))) + self.across(seen)))
        return v + gate(seen), h


def gate(x: Tensor) -> Tensor:
    """One half of the channels, through tanh, times the other, through a sigmoid."""
    value, share = x.chunk(2, dim=1)
    return value.tanh() * share.sigmoid()


def log_mass(described: Tensor, levels: Tensor) -> Tensor:
    """Log probability of ``levels`` [..., n] (0 to 255), [..., n], under the mixtures that ``described`` [..., 3 M] holds.

    With s the sigmoid, the mass between a < b is s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), whose logarithm is exact in the
    tails as well; what lies below level 0 and above level 255 belongs to these two.
    """
    weight, centre, log_scale = described.unsqueeze(-2).chunk(3, dim=-1)
    rate = (-log_scale.clamp_min(-7.0)).exp()  # of a range of [-1, 1], as in PixelCNN++
    levels = levels.unsqueeze(-1)
    half = 1 / (LEVELS - 1)
    middle = levels * (2 * half) - 1 - centre
    upper = functional.logsigmoid((middle + half) * rate)
    lower = functional.logsigmoid(-(middle - half) * rate)
    between = torch.log(-torch.expm1(-2 * half * rate))
    last, first = levels >= LEVELS - 1, levels <= 0
    upper, lower = upper.masked_fill(last, 0.0), lower.masked_fill(first, 0.0)
    mass = upper + lower + torch.where(first | last, 0.0, between)
    return torch.logsumexp(weight.log_softmax(-1) + mass, dim=-1)


def bits_per_dim(log_likelihood: Tensor, pixels: int) -> Tensor:
    """Nats of an image as bits per pixel."""
    return -log_likelihood / (pixels * math.log(2))


def check(x: Tensor, size: int) -> Tensor:
    """``x`` itself, if it is a batch of grey images of that size."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (1, size, size):
        raise ModelError(
            f"This net knows grey images [B, 1, {size}, {size}]; got inputs of shape {tuple(x.shape)}. Train one for such inputs "
            "(recipes/pixelcnn_fashion.py), or defend with something else."
        )
    return x


def scan(net: PixelCNN, x: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Replaces pixel after pixel of images [B, 1, H, W] in [0, 1], in reading order, each conditional seeing what was chosen.

    ``choose(described [B, 3 * mixtures], pixel [B])`` answers the new pixels [B]. What ``described`` holds is what ``forward`` of
    the images as far as they are replaced would answer there. The arithmetic is that of one forward pass; in steps as small
    as one pixel, so that several images at a time cost little more than one.
    """
    x = check(x, net.size).clone()
    rows, size, wide = len(x), net.size, net.width
    layers = [_Taps(layer) for layer in net.layers if isinstance(layer, Layer)]
    # with the border that the padded convolutions see; not yet chosen pixels are never looked at
    seen = x.new_zeros(rows, 1, REACH + size, REACH + size + REACH)
    finished = [x.new_zeros(rows, wide, size + tap.step, size) for tap in layers]  # the vertical stack, row by row
    left, first = net.left.weight[:, 0, 0], net.left.bias
    head = [(m.weight[:, :, 0, 0], m.bias) for m in net.head if isinstance(m, nn.Conv2d)]
    where = net.where(net.place)
    for i in range(size):
        v = net.above(seen[:, :, i : i + REACH]) + where[:, :, i : i + 1]
        start, handed = net.across(v)[:, :, 0].movedim(2, 0), []
        v = gate(v)
        for tap, kept in zip(layers, finished, strict=True):
            kept[:, :, tap.step + i] = v[:, :, 0]
            v, across = tap.row(v, kept[:, :, i])
            handed.append(across)
        row = [x.new_zeros(tap.step + size, rows, wide) for tap in layers]  # the horizontal stack, pixel by pixel
        for j in range(size):
            before = seen[:, 0, REACH + i, j : j + REACH]
            h = gate(functional.linear(before, left, first) + start[j])
            for tap, kept, across in zip(layers, row, handed, strict=True):
                kept[tap.step + j] = h
                h = tap.pixel(h, kept[j], across[j])
            for weight, bias in head:
                h = functional.linear(h.relu(), weight, bias)
            x[:, 0, i, j] = choose(h, x[:, 0, i, j])
            seen[:, 0, REACH + i, REACH + j] = 2 * x[:, 0, i, j] - 1
    return x


class _Taps:
    """A layer on one row, and on one pixel."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.step = layer, layer.dilation
        taps = layer.horizontal.weight[:, :, 0]
        self.taps, self.bias = torch.cat([taps[..., 0], taps[..., 1]], 1), layer.horizontal.bias
        self.out, self.shift = layer.out.weight[:, :, 0, 0], layer.out.bias

    def row(self, v: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack [B, C, 1, W] of a row after it, and what the row's pixels get of it [W, B, 2 C]."""
        both = functional.pad(torch.stack([above, v[:, :, 0]], 2), (self.step, self.step))
        vertical = self.layer.vertical
        seen = functional.conv2d(both, vertical.weight, vertical.bias, dilation=(1, self.step))
        return v + gate(seen), self.layer.across(seen)[:, :, 0].movedim(2, 0)

    def pixel(self, h: Tensor, left: Tensor, across: Tensor) -> Tensor:
        """The horizontal stack [B, C] of a pixel after it."""
        both = gate(functional.linear(torch.cat([left, h], 1), self.taps, self.bias) + across)
        return h + functional.linear(both, self.out, self.shift)
