"""Weights pruned by magnitude."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.utils import prune

from mohs.defenses._base import Defended, Defense
from mohs.defenses._changed import linear_layers
from mohs.defenses._settings import number


@dataclass(frozen=True)
class WeightPruning(Defense):
    """Sets the smallest weights of a net to zero, a share of all its layers together (global magnitude pruning).

        w -> 0 for the share of all weights whose |w| is smallest

    A compressed net is another function than the one it was made from, and points that were found on that one do not all fool it;
    that is what it was proposed for as a defense. It has gradients of its own, which break it as they break any net: nothing is
    hidden and nothing need be declared. An evaluation tries the points of the net as it was as well.

    Args:
        share: of the weights to set to zero, from 0 to below 1. Biases and normalisation are left alone.

    Raises:
        UsageError: another share.
        ModelError: the model shows no linear or convolution layer.

    Cost: none; a copy of the model, which later training of the original does not reach. The zeros are stored and multiplied as any
    number.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -0.1], [0.5, -2.0]]))
    >>> WeightPruning(0.5)(net)(torch.ones(1, 2)).tolist()
    [[3.0, -2.0]]

    **Differs from the paper**: the net is not trained on afterwards, so large shares cost accuracy; one threshold for all layers.
    **Source**: S. Han, J. Pool, J. Tran, W. Dally, "Learning both weights and connections for efficient neural networks", NeurIPS
    2015 (pruning by magnitude); as a defense, and how points transfer: Y. Zhao, I. Shumailov, R. Mullins, R. Anderson, "To compress or
    not to compress: understanding the interactions between adversarial attacks and neural network compression", MLSys 2019.
    """

    share: float = 0.8
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.share, "share of WeightPruning", 0, 1, below=True)

    def __call__(self, *models: nn.Module) -> nn.Module:
        """A copy of the model with the smallest weights at zero."""
        model = self.one(*models)
        pruned = copy.deepcopy(model)
        layers = [(layer, "weight") for layer in linear_layers(pruned, "WeightPruning")]
        prune.global_unstructured(layers, prune.L1Unstructured, amount=float(self.share))
        for layer, name in layers:
            prune.remove(layer, name)
        return Defended(self, pruned, instead_of=model)
