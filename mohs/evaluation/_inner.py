"""What a model is without its defense: the net that a declared one stands around or was made from, or the model with suspicious layers
left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mohs.defenses import Defended
from mohs.errors import FAILURES
from mohs.evaluation import _layers
from mohs.target import classify

WORTH = 0.5
"""Of the model's right answers on the sample, the share that the rest must keep: what is left after more is lost is no classifier."""


class Without(nn.Module):
    """A model some of whose layers hand their input on. The answers are others than the model's.

    Args:
        model: the classifier.
        layers: names as in ``model.named_modules()``.

    >>> net = nn.Sequential(nn.Sigmoid(), nn.Flatten()).eval()
    >>> Without(net, ["0"])(torch.full((1, 2), 3.0)).tolist()
    [[3.0, 3.0]]
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, tuple(layers)
        self.training = model.training  # not train(), which would set the modes of the layers inside

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of what is left."""

        def passed(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            came = inputs[0] if inputs else None
            return (
                came
                if isinstance(came, Tensor) and isinstance(output, Tensor) and came.shape == output.shape
                else output
            )

        handles = [self.model.get_submodule(name).register_forward_hook(passed) for name in self.layers]
        try:
            return self.model(x)
        finally:
            for handle in handles:
                handle.remove()


def undefended(model: nn.Module, x: Tensor, y: Tensor, believe: bool) -> tuple[nn.Module, str] | None:
    """The model without its defense, and in words what was left out; None where nothing can be told apart, or where what is left
    no longer classifies. A pass over the sample x [n, ...], y [n] for each of both."""
    inner, names = model, []
    while believe and isinstance(inner, Defended):
        names.append(repr(inner.defense))
        inner = inner.undefended
    if not names:
        try:
            layers = list(dict.fromkeys([*_layers.losing(model, x), *_layers.bare(model, x)]))
        except FAILURES:
            return None
        if not layers:
            return None
        inner, names = Without(model, layers), [f"layer {name}" for name in layers]
    try:
        with torch.no_grad():
            whole, rest = (int((classify(m, x).argmax(1) == y).sum()) for m in (model, inner))
    except FAILURES:
        return None
    return (inner, ", ".join(names)) if rest >= WORTH * whole else None
