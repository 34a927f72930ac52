"""The one shape in which labelled inputs travel through the program."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mohs.errors import DataError, rows_text

_MAX_CLASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled inputs, where they came from, and what each of them is by content.

    Unpacks as ``x, y = dataset``; ``len(dataset)`` is the number of examples. ``load`` guarantees inputs
    in [0, 1]; a data set made by hand may live in any box, but must be finite.

    Args:
        x: Inputs, float32 or float64, [N, ...], such as [N, C, H, W] or [N, D].
        y: Labels, int64, [N], each from 0 up to one less than the number of classes.
        classes: Class names in label order; left empty they are the label numbers.
        name: The specification that made it, as ``load`` takes it.

    Raises:
        DataError: Wrong types or shapes, no examples, non-finite numbers, or labels outside the classes.

    >>> data = Dataset(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    >>> len(data), data.classes, len(data.take(2))
    (3, ('0', '1'), 2)
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        x, y, name = self.x, self.y, self.name or "the data set"
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            raise DataError(
                f"{name}: inputs must be a float32 or float64 tensor, got {_kind(x)}. Convert with x.float()."
            )
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise DataError(f"{name}: labels must be an int64 tensor, got {_kind(y)}. Convert with y.long().")
        if x.dim() < 2:
            raise DataError(f"{name}: inputs must be [N, ...], at least two-dimensional; got {list(x.shape)}.")
        if y.dim() != 1:
            raise DataError(f"{name}: labels must be [N], got {list(y.shape)}. One-hot labels: use y.argmax(1).")
        if len(x) != len(y):
            raise DataError(f"{name}: {len(x)} inputs but {len(y)} labels; there must be one label per input.")
        if x.numel() == 0:
            raise DataError(f"{name}: no data (inputs have shape {list(x.shape)}); give at least one example.")
        if (y < 0).any():
            raise DataError(
                f"{name}: negative labels in {_rows(y < 0)}; labels count from 0. Subtract the smallest one first."
            )
        if not self.classes:
            if int(y.max()) >= _MAX_CLASSES:
                raise DataError(
                    f"{name}: label {int(y.max())} with no class names given; without names labels must stay "
                    f"below {_MAX_CLASSES:,}. Number the classes from 0 on."
                )
            object.__setattr__(self, "classes", tuple(str(k) for k in range(int(y.max()) + 1)))
        if (y >= len(self.classes)).any():
            raise DataError(
                f"{name}: labels out of range in {_rows(y >= len(self.classes))} (largest {int(y.max())}); "
                f"{len(self.classes)} classes allow 0 to {len(self.classes) - 1}."
            )
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            raise DataError(f"{name}: NaN or infinite inputs in {_rows(bad)}; remove or repair these examples.")

    def __len__(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))

    @cached_property
    def ids(self) -> list[str]:
        """One SHA-256 per example over dtype, shape and bytes of its input; the same on every machine."""
        rows = self.x.detach().cpu().contiguous().numpy()
        head = f"{self.x.dtype} {list(self.x.shape[1:])} ".encode()
        # little-endian on every machine, so that ids can be compared across machines
        return [
            hashlib.sha256(head + row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()
            for row in rows
        ]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all ids and labels in order: the identity of the whole set."""
        digest = hashlib.sha256()
        for id_, label in zip(self.ids, self.y.tolist()):
            digest.update(f"{id_} {label}\n".encode())
        return digest.hexdigest()

    def take(self, n: int | None = None, start: int = 0, indices: Sequence[int] | Tensor | None = None) -> Dataset:
        """A part of the data: ``n`` examples from ``start`` on, or those at ``indices`` in that order.

        Args:
            n: How many examples; None takes all that follow ``start``.
            start: Position of the first one.
            indices: Positions to take instead; then ``n`` and ``start`` stay unset.

        Returns:
            The part, with the same classes and name.

        Raises:
            DataError: More is asked for than there is, a position does not exist, or both ways are mixed.

        >>> data = Dataset(torch.arange(4.0)[:, None], torch.tensor([0, 1, 0, 1]))
        >>> data.take(indices=[3, 0]).x.flatten().tolist()
        [3.0, 0.0]
        """
        size, name = len(self), self.name or "the data set"
        if indices is not None:
            if n is not None or start != 0:
                raise DataError("take() got indices together with n or start; give one or the other.")
            index = torch.as_tensor(indices)
            if index.numel() == 0 or index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
                raise DataError(
                    f"take() needs indices as a non-empty list of whole numbers, got {_kind(index)} of shape "
                    f"{list(index.shape)}. A mask becomes indices with mask.nonzero().flatten()."
                )
            index = index.long()
            outside = (index < 0) | (index >= size)
            if outside.any():
                raise DataError(f"{name} has no {rows_text(index[outside].tolist())}; positions 0 to {size - 1} exist.")
            return Dataset(self.x[index], self.y[index], self.classes, self.name)
        if start < 0 or start >= size:
            raise DataError(f"{name} has {size} examples, so start may be 0 to {size - 1}; got {start}.")
        count = size - start if n is None else n
        if count < 1 or start + count > size:
            raise DataError(
                f"asked {name} for {count} examples from position {start} on; "
                f"it has {size}, so 1 to {size - start} can be had there."
            )
        part = slice(start, start + count)
        return Dataset(self.x[part], self.y[part], self.classes, self.name)


def _rows(mask: Tensor) -> str:
    return rows_text(mask.nonzero().flatten().tolist())


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
