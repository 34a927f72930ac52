"""The forms in which labelled inputs are taken."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mohs.data import Dataset
from mohs.errors import DataError


def pair(data: object) -> tuple[Any, Any]:
    """Inputs and labels of a ``Dataset`` or of a pair, not looked at any closer.

    Raises:
        DataError: it is neither.
    """
    if isinstance(data, Dataset):
        return data.x, data.y
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1]
    what = f"a tensor of shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
    raise DataError(
        f"Labelled inputs were asked for; got {what}. Allowed: a pair of tensors (x, y), or what mohs.data.load(...) "
        "returns, such as mohs.data.load('bundled:fashion-mnist')."
    )


def dataset(data: object) -> Dataset:
    """A ``Dataset`` as it is, or one made of a pair."""
    if isinstance(data, Dataset):
        return data
    x, y = pair(data)
    return Dataset(x, y, name="tensors")  # it says what is wrong with them
