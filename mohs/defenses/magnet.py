"""MagNet: detection by what an autoencoder cannot rebuild, and answers on what it rebuilds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, mse_loss
from torch.nn.utils import skip_init

from mohs import streams
from mohs.defenses._agreement import jensen_shannon, unsaturated
from mohs.defenses._base import Defended, Switch
from mohs.defenses._detector import Detector, calibrated, check_mode, held_out
from mohs.defenses._settings import images, number, unit
from mohs.errors import UsageError
from mohs.guide import instead
from mohs.target import classify

BATCH, RATE = 64, 0.03
"""Of the training of an autoencoder; the rate falls to 0 along half a cosine."""
FLOOR = 1e-6
"""Distances below this share of a large clean one count as this: of 0 there is no logarithm."""


class Autoencoder(nn.Module):
    """Images from images [B, C, H, W], in [0, 1], through few channels and, if ``pooled``, half the resolution.

    Its weights are drawn with ``generator``; the global ones are left alone.
    """

    def __init__(self, channels: int, width: int, pooled: bool, generator: torch.Generator) -> None:
        super().__init__()
        hidden = [width] * (4 if pooled else 2)
        pairs = zip([channels, *hidden], [*hidden, channels], strict=True)
        self.layers = nn.ModuleList(skip_init(nn.Conv2d, a, b, 3, padding=1) for a, b in pairs)
        self.pooled = pooled
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The images, rebuilt."""
        size, last = x.shape[-2:], len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if self.pooled and i == 1:
                x = avg_pool2d(x, 2, ceil_mode=True)
            if self.pooled and i == last - 1:
                x = interpolate(x, size=size)
            x = layer(x).sigmoid()
        return x


class MagNetState(Switch):
    """Both autoencoders, what counts as a large distance of each detector, and the threshold."""

    def __init__(self, first: Autoencoder, second: Autoencoder, distances: int, like: Tensor) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("scale", like.new_ones(distances))
        self.register_buffer("threshold", like.new_zeros(()))


@dataclass(frozen=True)
class MagNet(Detector):
    """Rejects what autoencoders trained on clean images rebuild badly, and classifies the rest as rebuilt.

        d_1 = mean |x - A(x)|^2,   d_2 = mean |x - B(x)|,   d_T = JS( softmax f(x) / T, softmax f(A(x)) / T )
        score = max_i log(d_i / s_i),   answer = f(A(x))

    s_i is what a share ``fpr`` of clean images exceeds in d_i. What lies far from clean images is to be rejected, and what lies near is
    to be moved back among them. All of it can be differentiated, so an attack simply goes through it.

    Args:
        steps: of the training of each autoencoder, on batches of 64.
        noise: standard deviation of the noise that they learn to remove, in units of the input.
        width: channels inside them.
        temperatures: of the softmax, one detector by divergence for each; an empty tuple: none.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of clean examples held out
            for it.
        reform: classify the rebuilt image; False: the image itself.

    Raises:
        DataError: too few examples for a threshold that holds its rate (76 at 0.05), or scores that are not finite.
        ModelError: inputs that are no images in [0, 1].
        UsageError: called before ``fit``; settings that cannot be; a model in training mode.

    Cost: two passes of the model and one of each autoencoder. ``fit``: half a minute of one CPU core for 28 x 28 grey images.

    >>> import mohs
    >>> from mohs.defenses import MagNet
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=240)
    >>> guarded = MagNet(steps=20).fit(net, data.x)  # too few steps to be of use
    >>> guarded(data.x[:4]).shape  # ten classes, and the rejection
    torch.Size([4, 11])

    **Differs from the paper**: one threshold holds the rate of all detectors together, where each had its own; the score is the largest
    ratio. Detectors by error and by divergence at once (the paper: the former for MNIST, both for CIFAR-10). A higher learning rate
    for fewer steps; the weak penalty on activations is left out.
    **Source**: D. Meng, H. Chen, "MagNet: a two-pronged defense against adversarial examples", CCS 2017; noise, both architectures and
    norms are those of the authors' code for MNIST. How it fell: N. Carlini, D. Wagner, "MagNet and 'Efficient defenses against
    adversarial attacks' are not robust to adversarial examples", 2017.
    """

    steps: int = 1000
    noise: float = 0.1
    width: int = 3
    temperatures: tuple[float, ...] = (10.0, 40.0)
    fpr: float = 0.05
    reform: bool = True
    smooth: ClassVar[bool] = False
    unit: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.steps, "steps of MagNet", 1, whole=True)
        number(self.noise, "noise of MagNet", 0)
        number(self.width, "width of MagNet", 1, whole=True)
        number(self.fpr, "fpr of MagNet", 0, 1, above=True, below=True)
        if not isinstance(self.temperatures, tuple):
            raise UsageError(
                f"temperatures of MagNet must be numbers in a tuple; got {self.temperatures!r}. Give such as (10.0, 40.0), or ()."
            )
        for temperature in self.temperatures:
            number(temperature, "each of the temperatures of MagNet", 0, above=True)

    def fit(self, model: nn.Module, x: Tensor, *, seed: int = 0) -> Defended:
        """The model between autoencoders that were trained on these examples, which must not be those it is tested on.

        Args:
            model: a classifier in eval mode.
            x: clean training images [N, C, H, W] in [0, 1]: three quarters for the autoencoders, one for the threshold.
            seed: of the choice of examples, of weights, noise and batches.
        """
        check_mode(model, "MagNet")
        x = unit(images(x, "MagNet"))
        taught, held = held_out(x, self.fpr, "MagNet", seed)
        first, second = (self._trained(taught, pooled, seed) for pooled in (True, False))
        state = MagNetState(first, second, 2 + len(self.temperatures), x)
        with torch.no_grad():
            usual = torch.cat([self._distances(model, state, part, False)[1] for part in taught.split(BATCH)])
        state.scale = usual.double().quantile(1 - self.fpr, 0).to(usual.dtype).clamp_min(torch.finfo(usual.dtype).tiny)
        state.threshold = calibrated(self._scored(model, state, held), self.fpr, "MagNet")
        return self.fitted(model, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the largest logarithm of a distance over a large clean one [B]."""
        logits, distances = self._distances(classifier, state, x, False)
        value, which = (distances / state.scale).clamp_min(FLOOR).log().max(1)
        if state.guiding:
            _, soft = self._distances(classifier, state, x, True)
            value = instead(value, (soft / state.scale).clamp_min(FLOOR).log().gather(1, which.unsqueeze(1)).squeeze(1))
        return logits, value

    def _distances(self, classifier: nn.Module, state: Any, x: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
        """Logits [B, K], and the distance that each detector looks at [B, 2 + temperatures]."""
        rebuilt = state.first(x)
        plain, reformed = classify(classifier, x), classify(classifier, rebuilt)
        found = [(x - rebuilt).square().flatten(1).mean(1), (x - state.second(x)).abs().flatten(1).mean(1)]
        for temperature in self.temperatures:
            pair = plain / temperature, reformed / temperature
            found.append(jensen_shannon(*(unsaturated(*pair) if soft else pair)))
        return reformed if self.reform else plain, torch.stack(found, 1)

    def _trained(self, x: Tensor, pooled: bool, seed: int) -> Autoencoder:
        """An autoencoder that was trained to find the images again in noisy ones."""
        generator = torch.Generator().manual_seed(2 * seed + pooled)
        net = Autoencoder(x.shape[1], self.width, pooled, generator).to(x)
        keys = streams.derive(streams.content_keys(x), seed, int(pooled))
        noisy = (x + self.noise * streams.normal(keys, tuple(x.shape[1:]), dtype=x.dtype)).clamp(0, 1)
        optimiser = torch.optim.Adam(net.parameters(), RATE)
        with torch.enable_grad():
            for step in range(self.steps):
                for group in optimiser.param_groups:
                    group["lr"] = RATE * (1 + math.cos(math.pi * step / self.steps)) / 2
                at = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
                optimiser.zero_grad()
                mse_loss(net(noisy[at]), x[at]).backward()
                optimiser.step()
        return net.requires_grad_(False)
