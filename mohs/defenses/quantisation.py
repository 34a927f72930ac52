"""Weights and activations of few bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense, Switch
from mohs.defenses._changed import LINEAR, linear_layers
from mohs.defenses._detector import BATCH, check_mode
from mohs.defenses._settings import number
from mohs.errors import DataError, UsageError
from mohs.guide import instead
from mohs.target import classify


@dataclass(frozen=True)
class Quantisation(Defense):
    """Rounds the weights of a net to few bits, each output channel with a scale of its own, and activations if it is asked to.

        w -> s round(w / s),   s = max |w| of the channel / (2^(bits - 1) - 1)
        a -> low + t round((min(max(a, low), high) - low) / t),   t = (high - low) / (2^activations - 1)

    ``Quantisation(4)(model)`` rounds the weights; ``Quantisation(4, activations=4).fit(model, x)`` also what comes into each layer but
    the first, over the range [low, high] that clean inputs have there, fixed from then on. The rounding of activations has no gradient,
    which stops an attack that follows it; the identity going back (straight-through) breaks it. Rounded weights hide nothing. An
    evaluation tries the points of the net as it was as well.

    Args:
        bits: of each weight, 2 to 16; the first is the sign.
        activations: bits of each activation, 1 to 16; None: they are left alone.

    Raises:
        UsageError: other numbers of bits; activations without ``fit``, or ``fit`` without activations; a model in training mode.
        ModelError: the model shows no linear or convolution layer.
        DataError: no clean inputs to take the ranges from, or activations of them that are not finite.

    Cost: a rounding per layer, in floating point as everything else: it simulates integer arithmetic and saves no time. A copy of the
    model, which later training of the original does not reach. ``fit``: a pass over the examples.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    >>> _ = net[0].weight.data.copy_(Tensor([[3.0, -0.9], [0.7, 0.1]]))
    >>> Quantisation(3)(net)(Tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()  # multiples of 1, and of 0.7 / 3
    [[3.0, 0.699999988079071], [-1.0, 0.0]]

    **Differs from the paper**: nothing is trained after the rounding, so few bits cost accuracy. Biases, normalisation and the input
    are left alone; whatever multiplies weights other than ``nn.Linear`` and convolutions is, too.
    **Source**: B. Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", CVPR
    2018, the section on the quantisation scheme; the way back: Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating
    gradients through stochastic neurons for conditional computation", 2013; as a defense: J. Lin, C. Gan, S. Han, "Defensive
    quantization: when efficiency meets robustness", ICLR 2019.
    """

    bits: int = 4
    activations: int | None = None

    def __post_init__(self) -> None:
        number(self.bits, "bits of Quantisation, those of each weight,", 2, 16, whole=True)
        if self.activations is not None:
            number(self.activations, "activations of Quantisation, the bits of each,", 1, 16, whole=True)

    def __call__(self, *models: nn.Module) -> nn.Module:
        """A copy of the model with rounded weights."""
        model = self.one(*models)
        if self.activations is not None:
            raise UsageError(
                f"{self!r} learns the range of activations from clean inputs, so it cannot defend a model by itself. Call "
                f"{self!r}.fit(model, x), which returns the defended model, or leave activations out."
            )
        return Defended(self, self._rounded(model), instead_of=model)

    def fit(self, model: nn.Module, x: Tensor) -> Defended:
        """The model with rounded weights and activations.

        Args:
            model: a classifier in eval mode.
            x: clean inputs [N, ...], N at least 1, that the ranges of activations are taken from; not those it is tested on.
        """
        if self.activations is None:
            raise UsageError(f"{self!r} has nothing to learn from data. Call it, {self!r}(model), or give activations.")
        check_mode(model, "Quantisation")
        if not len(x):
            raise DataError("Quantisation takes the range of activations from clean inputs; got none. Give some.")
        changed = nn.Sequential(self._rounded(model))  # so that the model itself has a place, too
        ranges = _ranges(changed, x)
        # one module for each layer, also where a layer stands in several places
        made = {layer: _Rounding(layer, *ends, self.activations) for layer, ends in ranges.items()}
        places = [(m, name, child) for m in changed.modules() for name, child in m._modules.items()]
        for parent, name, child in places:
            if child in made:
                setattr(parent, name, made[child])
        return Defended(self, changed[0], instead_of=model)

    def _rounded(self, model: nn.Module) -> nn.Module:
        changed = copy.deepcopy(model)
        for layer in linear_layers(changed, "Quantisation"):
            w = layer.weight
            assert isinstance(w, nn.Parameter)
            channel = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            others = [d for d in range(w.dim()) if d != channel]
            w.data.copy_(rounded(w.data, w.data.abs().amax(others, keepdim=True), self.bits))
        return changed


def rounded(w: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Multiples of ``largest / (2^(bits - 1) - 1)``; where ``largest`` is 0, the zeros it belongs to.

    >>> rounded(torch.tensor([0.9, -0.4, 0.1]), torch.tensor(0.9), 2).tolist()
    [0.8999999761581421, -0.0, 0.0]
    """
    scale = largest / (2 ** (bits - 1) - 1)
    return torch.where(scale > 0, (w / scale).round() * scale, w)


class _Rounding(Switch):
    """A layer whose inputs are rounded; going back, where it guides, they are as they came."""

    def __init__(self, layer: nn.Module, low: Tensor, high: Tensor, bits: int) -> None:
        super().__init__()
        self.rounding, self.layer = _Levels(low, high, bits), layer
        self.training = self.rounding.training = layer.training

    def forward(self, a: Tensor) -> Tensor:
        value = self.rounding(a)
        return self.layer(instead(value, a) if self.guiding and a.requires_grad else value)


class _Levels(nn.Module):
    """The nearest of 2^bits evenly spaced values from ``low`` to ``high``."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, a: Tensor) -> Tensor:
        step = ((self.high - self.low) / (2**self.bits - 1)).clamp_min(torch.finfo(a.dtype).tiny)
        return self.low + step * ((a.clamp(self.low, self.high) - self.low) / step).round()

    def extra_repr(self) -> str:
        return f"bits={self.bits}, low={float(self.low):g}, high={float(self.high):g}"


def _ranges(model: nn.Module, x: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The smallest and the largest number that comes into each layer but the first, over all inputs."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    first: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not first:
            first.append(layer)
        if layer is not first[0]:
            ends = inputs[0].amin(), inputs[0].amax()
            low, high = seen.get(layer, ends)
            seen[layer] = torch.minimum(low, ends[0]), torch.maximum(high, ends[1])

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, LINEAR)]
    try:
        with torch.no_grad():
            for part in x.split(BATCH):
                classify(model, part)
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(end.isfinite()) for ends in seen.values() for end in ends):
        raise DataError(
            "Quantisation takes the range of activations from clean inputs, and some of theirs are not finite. Does the model answer "
            "with finite logits there?"
        )
    return seen
