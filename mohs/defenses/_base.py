"""What every defense at inference time is: a classifier with something around it, and what an honest attacker needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.gradients.bpda import instead_of
from mohs.guide import Guide


@dataclass(frozen=True)
class Defense:
    """A defense: ``defense(model)`` is the defended classifier. Subclasses are frozen dataclasses; fields are the configuration.

    The usual one changes the input: ``transform`` is what is deployed, ``stand_in`` a differentiable function like it
    (default: the identity). One that does more overrides ``answer``.

    ``random``: do two answers to one input differ? ``smooth``: does ``transform`` have a useful gradient of its own?
    """

    random: ClassVar[bool] = False
    smooth: ClassVar[bool] = False

    def __call__(self, model: nn.Module) -> Defended:
        """The defended classifier, in the mode of ``model``."""
        return Defended(self, model)

    def transform(self, x: Tensor) -> Tensor:
        """What the classifier gets to see of inputs [B, ...]."""
        return x

    def stand_in(self, x: Tensor) -> Tensor | None:
        """A differentiable function like ``transform``; None: the identity."""
        return None

    def prepare(self, x: Tensor, guiding: bool) -> Tensor:
        """``transform``, with the gradient of ``stand_in`` where an honest attacker asks."""
        if self.smooth or not guiding or not x.requires_grad:
            return self.transform(x)
        with torch.no_grad():
            value = self.transform(x)
        stand_in = self.stand_in(x)
        return instead_of(x, value, None if stand_in is None else lambda _: stand_in)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logits [B, K] of the defended ``model``; ``guiding``: with the gradients that an honest attacker is to get."""
        return model(self.prepare(x, guiding))


class Defended(nn.Module):
    """A classifier behind a defense. It can be defended again, or stand inside any other module.

    >>> from mohs.defenses import BitDepth
    >>> net = Defended(BitDepth(3), nn.Linear(4, 2)).eval()
    >>> declared(net).random
    False
    """

    def __init__(self, defense: Defense, model: nn.Module) -> None:
        super().__init__()
        self.defense, self.model = defense, model
        self.guiding = False
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.defense.answer(self.model, x, self.guiding)

    def extra_repr(self) -> str:
        """What a record names."""
        return repr(self.defense)


class Honest(Guide):
    """A model whose defenses have the backward passes that they declare; answers are the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""
        layers = [m for m in self.model.modules() if isinstance(m, Defended)]
        try:
            for layer in layers:
                layer.guiding = True
            return self.model(x)
        finally:
            for layer in layers:
                layer.guiding = False


@dataclass(frozen=True)
class Declaration:
    """What the defenses inside a model declare: the guide to attack with (None: the model's own gradients do), randomness."""

    defenses: tuple[Any, ...]
    guide: nn.Module | None
    random: bool


def declared(model: nn.Module) -> Declaration:
    """What the defenses inside ``model`` declare; of a model without any: nothing."""
    defenses = tuple(m.defense for m in model.modules() if isinstance(m, Defended))
    hiding = any(not d.smooth for d in defenses)
    return Declaration(defenses, Honest(model) if hiding else None, any(d.random for d in defenses))
