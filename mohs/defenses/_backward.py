"""The identity with another way back: what negative controls and guided backpropagation are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.change(g), None


def changed(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` going forward; going back, ``change`` of the gradient that arrives.

    >>> x = torch.ones(2, requires_grad=True)
    >>> changed(x, lambda g: -3 * g).sum().backward()
    >>> x.grad.tolist()
    [-3.0, -3.0]
    """
    return _Changed.apply(x, change)
