"""k winners take all: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense, Switch
from mohs.defenses._changed import without_relus
from mohs.defenses._settings import number
from mohs.guide import instead


@dataclass(frozen=True)
class KWinners(Defense):
    """A negative control: each ReLU becomes 'keep the k largest activations', which jumps as the input moves.

        a -> a where a is among the k largest of its layer, else 0,   k = ratio * number of activations

    The gradient exists but holds for tiny steps only. Hiding it **adds no robustness**: going back, an honest attacker lets twice
    as many win, so that activations about to win count too. Unlike the other controls it changes answers; what accuracy is left
    under that attack, and under a search without gradients, is the changed net's own.

    Args:
        ratio: share of activations that each layer keeps, above 0 and at most 1.

    Raises:
        UsageError: another ratio.
        ModelError: the model has no ``nn.ReLU`` layer to replace (a call of ``relu`` in a forward cannot be).

    Cost: a selection per layer; a copy of the model, which later training of the original does not reach.

    >>> net = KWinners(0.5)(nn.Sequential(nn.ReLU(), nn.Flatten()))
    >>> net(Tensor([[1.0, 4.0, -2.0, 3.0]])).tolist()
    [[0.0, 4.0, 0.0, 3.0]]

    **Differs from the paper**: the net is not trained with it, so small ratios cost accuracy; activations that tie with the
    smallest winner all win.
    **Source**: C. Xiao, P. Zhong, C. Zheng, "Enhancing adversarial defense by k-winners-take-all", ICLR 2020, section 2,
    equation 1; broken in F. Tramer, N. Carlini, W. Brendel, A. Madry, "On adaptive attacks to adversarial example defenses",
    NeurIPS 2020, section 5.
    """

    ratio: float = 0.2

    def __post_init__(self) -> None:
        number(self.ratio, "ratio", 0, 1, above=True)

    def __call__(self, *models: nn.Module) -> nn.Module:
        """A copy of the model with its ReLU layers replaced."""
        model = self.one(*models)
        return Defended(self, without_relus(model, lambda: _Winners(self.ratio), "KWinners"), instead_of=model)


class _Winners(Switch):
    """The k largest of each row; going back, where it guides, the 2 k largest."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, a: Tensor) -> Tensor:
        value = _largest(a, self.ratio)
        return instead(value, _largest(a, min(1.0, 2 * self.ratio))) if self.guiding and a.requires_grad else value

    def extra_repr(self) -> str:
        return f"ratio={self.ratio:g}"


def _largest(a: Tensor, ratio: float) -> Tensor:
    """The largest of each row, zero elsewhere."""
    flat = a.detach().flatten(1)
    k = max(1, round(ratio * flat.shape[1]))
    least = flat.topk(k, dim=1).values[:, -1:]
    return torch.where((flat >= least).view_as(a), a, 0.0)
