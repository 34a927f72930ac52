"""Stochastic activation pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defense
from mohs.defenses._changed import LINEAR
from mohs.defenses._settings import number
from mohs.guide import instead


@dataclass(frozen=True)
class ActivationPruning(Defense):
    """Draws which activations of each layer survive, the larger the likelier, and scales the survivors up.

        draw r indices with p_i = |a_i| / sum |a|;   a_i -> a_i / (1 - (1 - p_i)^r) if i was drawn, else 0

    The net need not be trained with it. An attack that averages over draws, with the identity going back in place of the
    scaling, breaks it.

    Args:
        share: draws per layer, as a multiple of the number of its activations, above 0.

    Raises:
        UsageError: share is no number above 0.

    Cost: share * n draws for a layer of n activations.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> x = torch.rand(3, 4)
    >>> torch.equal(ActivationPruning(1.0)(net)(x), net(x))
    False

    **Differs from the paper**: what is pruned is the input of every convolution and linear layer but the first, that is, the
    activations after nonlinearity and pooling, in any net.
    **Source**: G. Dhillon et al., "Stochastic activation pruning for robust adversarial defense", ICLR 2018, section 3,
    algorithm 1; the way back: G. Dhillon, N. Carlini, "Erratum concerning the obfuscated gradients attack on stochastic
    activation pruning", 2020.
    """

    share: float = 1.0
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.share, "share", 0, 100, above=True)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logits [B, K] of the model with its activations pruned while it is called."""
        first: list[nn.Module] = []

        def prune(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if not first:
                first.append(layer)
            return None if layer is first[0] else (self._pruned(inputs[0], guiding), *inputs[1:])

        handles = [m.register_forward_pre_hook(prune) for m in model.modules() if isinstance(m, LINEAR)]
        try:
            return model(x)
        finally:
            for handle in handles:
                handle.remove()

    def _pruned(self, a: Tensor, guiding: bool) -> Tensor:
        flat = a.flatten(1)
        if not len(flat):  # no index can be drawn
            return a
        size = flat.abs()
        total = size.sum(1, keepdim=True)
        p = torch.where(total > 0, size / total.clamp_min(torch.finfo(a.dtype).tiny), 1 / flat.shape[1])
        draws = max(1, round(self.share * flat.shape[1]))
        drawn = torch.multinomial(p.detach(), draws, replacement=True)
        kept = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
        likely = -torch.expm1(draws * torch.log1p(-p.clamp_max(1 - torch.finfo(a.dtype).eps)))
        value = torch.where(kept > 0, flat / likely.clamp_min(torch.finfo(a.dtype).tiny), 0.0).view_as(a)
        return instead(value, a) if guiding and a.requires_grad else value
