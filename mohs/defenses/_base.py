"""What every defense at inference time is: a classifier with something around it, and what an honest attacker needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.errors import UsageError
from mohs.gradients.bpda import instead_of
from mohs.guide import Guide, unguided


@dataclass(frozen=True)
class Defense:
    """A defense: ``defense(model)`` is the defended classifier. Subclasses are frozen dataclasses; fields are the configuration.

    The usual one changes the input: ``transform`` is what is deployed, ``stand_in`` a differentiable function like it
    (default: the identity). One that does more overrides ``answer``.

    ``random``: do two answers to one input differ? ``smooth``: does it have a useful gradient of its own? ``unit``: does it
    need inputs in [0, 1]? ``rejects``: is the last logit the rejection of the input? ``looks_at_gradients``: does its answer
    depend on gradients of what it defends? Then the deployed model judges every success that a guide reports.
    """

    random: ClassVar[bool] = False
    smooth: ClassVar[bool] = False
    unit: ClassVar[bool] = False
    rejects: ClassVar[bool] = False
    looks_at_gradients: ClassVar[bool] = False

    def __call__(self, *models: nn.Module) -> nn.Module:
        """The defended classifier, in the mode of the model; only ensembles take more than one."""
        return Defended(self, self.one(*models))

    def one(self, *models: nn.Module) -> nn.Module:
        """The only model.

        Raises:
            UsageError: none, or several.
        """
        if len(models) != 1:
            raise UsageError(
                f"{type(self).__name__} defends one model; got {len(models)}. Call it with one, such as "
                f"{type(self).__name__}(...)(model); several models go into MeanLogits, MeanProbabilities, MajorityVote "
                "or RejectDisagreement."
            )
        return models[0]

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


class Switch(nn.Module):
    """A module that ``Honest`` tells when to give the gradients that an honest attacker is to get."""

    guiding: bool = False


class Defended(Switch):
    """A classifier behind a defense. It can be defended again, or stand inside any other module.

    Args:
        defense: what stands around the model.
        model: what it asks: the classifier, or a changed copy of it.
        instead_of: the classifier as it was, where ``model`` is a changed copy. It is no part of the defended one: its weights
            count neither for its hash nor for its files.

    >>> from mohs.defenses import BitDepth
    >>> net = Defended(BitDepth(3), nn.Linear(4, 2)).eval()
    >>> declared(net).random
    False
    """

    def __init__(self, defense: Defense, model: nn.Module, instead_of: nn.Module | None = None) -> None:
        super().__init__()
        self.defense, self.model = defense, model
        self._before = () if instead_of is None else (instead_of,)  # in a tuple, so that it is no submodule
        self.training = model.training  # not train(), which would change the mode of what is inside

    @property
    def undefended(self) -> nn.Module:
        """The classifier without this defense."""
        return self._before[0] if self._before else self.model

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        return self.defense.answer(self.model, x, self.guiding)

    def extra_repr(self) -> str:
        """What a record names."""
        return repr(self.defense)

    def train(self, mode: bool = True) -> Defended:
        """Set the mode, that of the classifier as it was included."""
        for before in self._before:
            before.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # to another device or precision the classifier as it was goes along, or the two could not be compared there
        for before in self._before:
            before._apply(fn, recurse)
        return super()._apply(fn, recurse)


class Honest(Guide):
    """A model whose defenses have the backward passes that they declare; answers are the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""
        with _switched(self.model, True):
            return self.model(x)


@contextmanager
def as_deployed(model: nn.Module) -> Iterator[None]:
    """Inside, the gradients of ``model`` are those of the deployed one, whatever guide is asking."""
    with unguided(), _switched(model, False):
        yield


@contextmanager
def _switched(model: nn.Module, guiding: bool) -> Iterator[None]:
    """Inside, all switches of ``model`` stand there; afterwards, where they stood."""
    before = [(m, m.guiding) for m in model.modules() if isinstance(m, Switch)]
    try:
        for layer, _ in before:
            layer.guiding = guiding
        yield
    finally:
        for layer, stood in before:
            layer.guiding = stood


@dataclass(frozen=True)
class Declaration:
    """What the defenses inside a model, outermost first, declare.

    Args:
        defenses: each of them.
        guide: what an honest attack gets its gradients from; None: the model's own do.
        random: is any of them random? Then the threat needs ``draws``.
        unit: does any of them need inputs in [0, 1]? Then no threat with another box makes sense.
        rejects: is the last logit of the model the rejection of an input?
    """

    defenses: tuple[Any, ...]
    guide: nn.Module | None
    random: bool
    unit: bool
    rejects: bool


def declared(model: nn.Module) -> Declaration:
    """What the defenses inside ``model`` declare; of a model without any: nothing."""
    defenses = tuple(m.defense for m in model.modules() if isinstance(m, Defended))
    hiding = any(not d.smooth for d in defenses)
    return Declaration(
        defenses,
        Honest(model) if hiding else None,
        random=any(d.random for d in defenses),
        unit=any(d.unit for d in defenses),
        rejects=rejecting(model),
    )


def rejecting(model: nn.Module) -> bool:
    """Is the last logit the rejection, made by the outermost defense or by one directly inside?"""
    return isinstance(model, Defended) and (model.defense.rejects or rejecting(model.model))


@dataclass(frozen=True, init=False)
class Stack(Defense):
    """Several defenses, in the order in which data pass through them; the last one stands next to the classifier.

    >>> from mohs.defenses import BitDepth
    >>> net = Stack(BitDepth(3), BitDepth(1))(nn.Linear(4, 2))
    >>> [d.bits for d in declared(net).defenses]
    [3, 1]
    """

    defenses: tuple[Defense, ...]

    def __init__(self, *defenses: Defense) -> None:
        object.__setattr__(self, "defenses", defenses)

    def __call__(self, *models: nn.Module) -> nn.Module:
        """The classifier behind all of them; of no defense, the classifier itself."""
        if not self.defenses:
            (model,) = models
            return model
        *outer, inner = self.defenses
        model = inner(*models)
        for defense in reversed(outer):
            model = defense(model)
        return model
