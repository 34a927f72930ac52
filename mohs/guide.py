"""Guide: what gives an attack its gradients where the model's own are missing, wrong or useless."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import Tensor, nn

from mohs.threat import Access


class Guide(nn.Module):
    """A classifier with the answers of ``model`` and other gradients.

    Because the answers are the model's own, what an attack finds with it needs no second look. A stand-in that answers
    otherwise (a surrogate, a student) is a plain module: there, the model is asked about every candidate, as it is where a
    defense inside looks at gradients by itself.

    Subclasses give ``forward``; ``forwards`` and ``backwards`` say how many passes through the model one look with gradients
    and one ``pull`` cost, ``needs`` what the threat must grant for it.
    """

    forwards: int = 1
    backwards: int = 1
    needs: ClassVar[Access] = Access.GRADIENT

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # not train(): that would set the modes of the layers inside


def wraps(guide: nn.Module, model: nn.Module) -> bool:
    """Is ``guide`` the ``model`` itself, or guides around it?"""
    while guide is not model and isinstance(guide, Guide):
        guide = guide.model
    return guide is model


def answers_for(guide: nn.Module, model: nn.Module) -> bool:
    """Are the answers of ``guide`` those of ``model``, whatever stands in going back?

    Not where a defense inside (``looks_at_gradients``) computes gradients for its answer: other backward passes may then
    lead to other answers.

    >>> net = nn.Linear(2, 2)
    >>> answers_for(net, net), answers_for(Guide(net), net), answers_for(nn.Linear(2, 2), net)
    (True, True, False)
    """
    if guide is model:
        return True
    looks = any(getattr(getattr(m, "defense", None), "looks_at_gradients", False) for m in model.modules())
    return wraps(guide, model) and not looks


_PAUSED: ContextVar[bool] = ContextVar("_PAUSED", default=False)


@contextmanager
def unguided() -> Iterator[None]:
    """Inside, no guide replaces a backward pass: for what looks at gradients as a part of its answer."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


def paused() -> bool:
    """Must guides leave backward passes as they are? Only inside ``unguided``."""
    return _PAUSED.get()


class _Instead(torch.autograd.Function):
    """Value of the one, gradient of the other."""

    @staticmethod
    def forward(ctx: object, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def instead(value: Tensor, stand_in: Tensor) -> Tensor:
    """``value`` going forward, bit for bit; the gradient of ``stand_in`` going back. Shapes are equal.

    >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
    >>> instead(x.detach().round(), x).sum().backward()
    >>> x.grad.tolist()
    [1.0, 1.0]
    """
    return _Instead.apply(value.detach(), stand_in)
