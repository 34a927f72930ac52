"""Defenses that change the net itself: what all of them do to a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from mohs.errors import ModelError

LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers with a weight matrix or filters."""


def without_relus(model: nn.Module, make: Callable[[], nn.Module], what: str) -> nn.Module:
    """A copy of the model in which another module, in the mode of the net, stands at every place of an ``nn.ReLU``.

    Raises:
        ModelError: there is none to replace (a call of ``relu`` in a forward cannot be).
    """
    changed = copy.deepcopy(nn.Sequential(model))  # so that the model itself has a place, too
    places = [(m, name) for m in changed.modules() for name, child in m._modules.items() if isinstance(child, nn.ReLU)]
    if not places:
        raise ModelError(
            f"{what} replaces nn.ReLU layers, and this model has none. Write its activations as nn.ReLU modules instead "
            "of calls of relu()."
        )
    for parent, name in places:
        setattr(parent, name, make().train(model.training))
    return changed[0]


def linear_layers(model: nn.Module, what: str) -> list[nn.Module]:
    """The layers with a weight matrix or filters.

    Raises:
        ModelError: there is none.
    """
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, LINEAR)]
    if not found:
        raise ModelError(
            f"{what} changes the weights of nn.Linear and convolution layers, and this model shows none. Give a torch module made "
            "of such layers."
        )
    return found
