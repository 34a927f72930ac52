"""Activations that are bounded from above."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense, Switch
from mohs.defenses._changed import without_relus
from mohs.defenses._settings import number
from mohs.guide import instead


@dataclass(frozen=True)
class BoundedReLU(Defense):
    """Each ReLU of a net stops at a bound, so that no activation can grow without limit as a change adds up through the layers.

        a -> min(max(a, 0), bound)

    What is saturated has no gradient: going back, an honest attacker lets it pass where a ReLU would. With a small bound it
    costs accuracy unless the net is trained with it: ``train(..., model=BoundedReLU(1.0)(net))``.

    Args:
        bound: of each activation, above 0.

    Raises:
        UsageError: another bound.
        ModelError: the model has no ``nn.ReLU`` layer to replace (a call of ``relu`` in a forward cannot be).

    Cost: none worth naming; a copy of the model, which later training of the original does not reach.

    >>> net = BoundedReLU(2.0)(nn.Sequential(nn.ReLU(), nn.Flatten()))
    >>> net(Tensor([[1.0, 4.0, -2.0, 3.0]])).tolist()
    [[1.0, 2.0, 0.0, 2.0]]

    **Differs from the paper**: it stands in a net that was trained without it, unless it is trained on. The other half of the
    paper's defense is ``mohs.defenses.training.GaussianAugmentation``.
    **Source**: V. Zantedeschi, M.-I. Nicolae, A. Rawat, "Efficient defenses against adversarial attacks", AISec 2017, the
    section on bounded ReLU activations.
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        number(self.bound, "bound of BoundedReLU", 0, above=True)

    def __call__(self, *models: nn.Module) -> nn.Module:
        """A copy of the model with its ReLU layers replaced."""
        model = self.one(*models)
        return Defended(self, without_relus(model, lambda: _Bounded(self.bound), "BoundedReLU"), instead_of=model)


class _Bounded(Switch):
    """min(max(a, 0), bound); going back, where it guides, max(a, 0)."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, a: Tensor) -> Tensor:
        value = a.clamp(0, self.bound)
        return instead(value, a.relu()) if self.guiding and a.requires_grad else value

    def extra_repr(self) -> str:
        return f"bound={self.bound:g}"
