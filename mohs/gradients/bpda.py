"""Backward pass differentiable approximation: a layer keeps its forward pass and borrows a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mohs.errors import ModelError, UsageError
from mohs.guide import Guide, instead, paused

StandIn = Callable[[Tensor], Tensor]
"""A differentiable function from a layer's input to something of the shape of its output."""


def identity(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the shape of ``like``: itself, its channels repeated (a one-hot or thermometer code), or resized.

    >>> identity(torch.ones(1, 2, 4, 4), torch.zeros(1, 6, 8, 8)).shape
    torch.Size([1, 6, 8, 8])

    Raises:
        ModelError: the shapes have nothing to do with each other.
    """
    if x.shape == like.shape:
        return x
    if x.numel() == like.numel() and len(x) == len(like):
        return x.reshape(like.shape)
    if x.dim() == like.dim() >= 2 and len(x) == len(like):
        channels, wanted = x.shape[1], like.shape[1]
        fits = wanted % channels == 0
        if fits and x.shape[2:] != like.shape[2:] and x.dim() == 4:
            x = interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
        if fits and x.shape[2:] == like.shape[2:]:
            return x.repeat_interleave(wanted // channels, dim=1)
    raise ModelError(
        f"The identity cannot stand in for a layer that maps {tuple(x.shape)} to {tuple(like.shape)}. Give a differentiable "
        "function from such inputs to such outputs instead."
    )


def instead_of(x: Tensor, value: Tensor, backward: StandIn | None) -> Tensor:
    """``value`` with the gradient of ``backward(x)``; None: of the identity."""
    if not x.requires_grad:
        return value
    stand_in = identity(x, value) if backward is None else backward(x)
    if stand_in.shape != value.shape:
        raise ModelError(
            f"The stand-in answers {tuple(stand_in.shape)} where the layer answers {tuple(value.shape)}. Give one whose outputs "
            "have the layer's shape."
        )
    return instead(value, stand_in)


class BPDA(nn.Module):
    """A layer with its own forward pass and the backward pass of a stand-in.

        forward(x) = layer(x),   backward: the vector-Jacobian product of ``backward`` at x

    For a layer whose gradient is zero, missing or noise (rounding, a codec, a threshold). The stand-in must be like the layer
    in value, roughly; where it is not, the gradient leads astray, and ``Smooth`` or ``FiniteDifference`` may do better.

    Args:
        layer: module or function, [B, ...] to [B, ...].
        backward: a differentiable function of the same input, with outputs of the same shape; None: the identity (channels
            are repeated, images resized, where the layer changes the shape that way).

    Raises:
        ModelError: at the first call, where the stand-in does not have the layer's shape.

    Cost: a forward of the layer and of the stand-in, and a backward of the stand-in.

    >>> layer = BPDA(torch.round)
    >>> x = torch.tensor([[0.2, 0.9]], requires_grad=True)
    >>> y = layer(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([[0.0, 1.0]], [[1.0, 1.0]])

    **Differs from the paper**: nothing; the identity reshapes where it must.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    section 4.1.
    """

    def __init__(self, layer: nn.Module | StandIn, backward: StandIn | None = None) -> None:
        super().__init__()
        self.layer, self.backward = layer, backward
        if isinstance(layer, nn.Module):
            self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """The layer's outputs, bit for bit."""
        with torch.no_grad():
            value = self.layer(x)
        return instead_of(x, value, self.backward)


class Through(Guide):
    """A model some of whose layers, named as they are, get the backward pass of a stand-in.

    The model is not rebuilt: hooks replace the layers' gradients while it is called, and are gone afterwards.

    Args:
        model: the classifier.
        layers: names as in ``model.named_modules()``, each with its stand-in; None: the identity.

    Raises:
        UsageError: no such layer.

    >>> class Rounds(nn.Module):
    ...     def forward(self, x):
    ...         return x.round()
    >>> net = nn.Sequential(Rounds(), nn.Linear(2, 2)).eval()
    >>> x = torch.rand(1, 2, requires_grad=True)
    >>> float(torch.autograd.grad(net(x).sum(), x)[0].abs().sum())
    0.0
    >>> guide = Through(net, {"0": None})
    >>> bool(torch.autograd.grad(guide(x).sum(), x)[0].abs().sum() > 0), torch.equal(guide(x), net(x))
    (True, True)

    **Differs from the paper**: layers are named, not wrapped.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    section 4.1.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, StandIn | None]) -> None:
        super().__init__(model)
        self.stand_ins = dict(layers)
        self.found = _named(model, self.stand_ins)

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""

        def hook(backward: StandIn | None) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
            def replace(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
                if paused() or not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                    return output
                return instead_of(inputs[0], output, backward)

            return replace

        handles = [m.register_forward_hook(hook(self.stand_ins[name])) for name, m in self.found.items()]
        try:
            return self.model(x)
        finally:
            for handle in handles:
                handle.remove()

    def extra_repr(self) -> str:
        """What a record names."""
        return ", ".join(f"{name}: {backward or 'identity'}" for name, backward in self.stand_ins.items())


class Past(Guide):
    """A model whose gradient at the input of one of its layers counts as the gradient at its own input.

    Whatever lies before that layer (a codec, a purifier, an encoder, functions that are no modules) keeps its forward pass and
    is passed over going back, as if it were the identity. Nothing needs to be known about it but that what it hands on has
    the shape of an input, or that with more channels or another size.

    Args:
        model: the classifier.
        layer: name of the layer before which everything is passed over, as in ``model.named_modules()``.
        backward: a differentiable function from the model's inputs to that layer's, such as ``fit`` makes; None: the identity.

    Raises:
        UsageError: no such layer.
        ModelError: at the first call, where what the layer gets has another shape than the input.

    **Differs from the paper**: the paper wraps a known preprocessor; here the place is enough.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    section 4.1.
    """

    def __init__(self, model: nn.Module, layer: str, backward: StandIn | None = None) -> None:
        super().__init__(model)
        self.layer = layer
        self.stand_in = [backward]  # in a list, so that it is no part of the model
        (self.found,) = _named(model, [layer]).values()

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""

        def replace(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if paused() or not inputs or not isinstance(inputs[0], Tensor) or len(inputs[0]) != len(x):
                return None
            return (instead_of(x, inputs[0], self.stand_in[0]), *inputs[1:])

        handle = self.found.register_forward_pre_hook(replace)
        try:
            return self.model(x)
        finally:
            handle.remove()

    def extra_repr(self) -> str:
        """What a record names."""
        (backward,) = self.stand_in
        return f"layer={self.layer!r}" + ("" if backward is None else f", backward={backward}")


def _named(model: nn.Module, names: Any) -> dict[str, nn.Module]:
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            listed = ", ".join(repr(n) for n in list(known)[1:21])
            raise UsageError(f"There is no layer {name!r} in the model. It has: {listed or 'no layers'}.")
    return {name: known[name] for name in names}
