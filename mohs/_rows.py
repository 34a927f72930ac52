"""Dataclasses of tensors whose first dimension is the row: sliced, joined and padded together, so they never disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class Rows:
    """Base of everything that has one entry per row: tensors and nested Rows are sliced, other fields are shared."""

    def take(self, index: Tensor) -> Self:
        """The rows of ``index``, copied (no storage is shared with this one)."""
        return replace(self, **{f.name: _take(getattr(self, f.name), index) for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All rows of all parts, in order; fields that are not tensors come from the first part."""
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], **{f.name: _join([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})

    def __len__(self) -> int:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor | Rows):
                return len(value)
        raise TypeError(f"{type(self).__name__} has no tensor field to count rows by")


def _take(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    return value.take(index) if isinstance(value, Rows) else value


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return type(values[0]).join(values) if isinstance(values[0], Rows) else values[0]
