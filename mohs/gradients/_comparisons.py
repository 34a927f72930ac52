"""Comparisons with a slope: each is remembered beside a soft step, until something is computed with its truth values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mohs.guide import instead

SIGN = {"gt": 1, "ge": 1, "greater": 1, "greater_equal": 1, "lt": -1, "le": -1, "less": -1, "less_equal": -1}
"""Comparisons, and the direction in which they become true."""
SHAPES = frozenset({
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose", "movedim", "expand", "expand_as",
    "repeat", "repeat_interleave", "contiguous", "clone", "__getitem__", "view_as", "reshape_as", "narrow", "select",
})  # fmt: skip
"""Functions that only move truth values about."""
NOT = frozenset({"__invert__", "logical_not", "bitwise_not"})
CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})
ARITHMETIC = frozenset(
    {"mul", "multiply", "mul_", "add", "add_", "sub", "subtract", "sub_", "rsub", "__rsub__", "div", "div_"}
)
"""Functions that take truth values for 0 and 1."""
WIDTH = 0.2
"""Of a soft step, in standard deviations of what is compared: the steps of a code overlap, those of a far mask do not matter."""


class Comparisons:
    """The truth values of one call of a model, each with the soft step that stands for it going back.

    A comparison a > b is 1 / (1 + exp(-(a - b) / w)), where w is a fifth of the standard deviation of a - b.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # the first keeps the id from being given anew

    def call(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``func``, with a gradient where truth values that are known become numbers."""
        if name in SIGN:
            return self._compared(SIGN[name], func, args, kwargs)
        if not self.known or not any(self._soft(value) is not None for value in args):
            return func(*args, **kwargs)
        first, soft = args[0], self._soft(args[0])
        if name in SHAPES and soft is not None:
            return self._noted(func(*args, **kwargs), func(soft, *args[1:], **kwargs))
        if name in NOT and soft is not None:
            return self._noted(func(*args, **kwargs), 1 - soft)
        if name == "where" and len(args) == 3 and soft is not None:
            return _between(func(*args, **kwargs), soft, args[1], args[2])
        if name == "masked_fill" and len(args) == 3 and (hidden := self._soft(args[1])) is not None:
            return _between(func(*args, **kwargs), hidden, args[2], first)
        if name in CASTS and soft is not None:
            value = func(*args, **kwargs)
            return instead(value, soft.to(value.dtype)) if _real(value) else value
        if name in ARITHMETIC:
            return func(*(self._number(value) for value in args), **kwargs)
        return func(*args, **kwargs)

    def _compared(self, sign: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = func(*args, **kwargs)
        a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(value, Tensor) or not any(
            isinstance(v, Tensor) and v.is_floating_point() and v.requires_grad for v in (a, b)
        ):
            return value
        gap = sign * (a - b)
        width = WIDTH * float(gap.detach().std(correction=0)) or 1.0
        return self._noted(value, torch.sigmoid(gap / width))

    def _noted(self, value: Tensor, soft: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.shape == soft.shape:
            self.known[id(value)] = (value, soft)
        return value

    def _soft(self, value: Any) -> Tensor | None:
        found = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return None if found is None else found[1]

    def _number(self, value: Any) -> Any:
        soft = self._soft(value)
        return value if soft is None else instead(value.to(soft.dtype), soft)


def _between(value: Any, soft: Tensor, yes: Any, no: Any) -> Any:
    """``value`` with the gradient of what lies between the two alternatives; of infinite ones there is none."""
    if not _real(value) or not all(bool(torch.as_tensor(v).isfinite().all()) for v in (yes, no)):
        return value
    return instead(value, (soft * yes + (1 - soft) * no).expand_as(value).to(value.dtype))


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
