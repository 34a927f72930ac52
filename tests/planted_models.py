"""Modules that hide a net, its layers or its gradients from those who look for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mohs.defenses._backward import changed


class Layer(nn.Module):
    """A layer without weights of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Wrapped(nn.Module):
    """A function of net and input that is no layer."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], net: nn.Module) -> None:
        super().__init__()
        self.function, self.net = function, net

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net, x)


class Hidden(nn.Module):
    """A model that shows no layers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["net"] = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def coarse(x: Tensor) -> Tensor:
    """Rounds to eight levels."""
    return (x * 7).round() / 7


def dead(x: Tensor) -> Tensor:
    """The identity, with a gradient of zero."""
    return changed(x, torch.zeros_like)
