"""Rows of the ledger as columns, and arrays as bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mohs.errors import RecordError


@dataclass(frozen=True, eq=False)
class Columns:
    """Equally long arrays, one per column; scalars and lists are taken too."""

    @classmethod
    def _dtypes(cls) -> dict[str, type]:
        return {}

    def __post_init__(self) -> None:
        sizes = {}
        for field in fields(self):
            value: NDArray[Any] = np.atleast_1d(np.asarray(getattr(self, field.name), dtype=self._dtypes()[field.name]))
            object.__setattr__(self, field.name, value)
            sizes[field.name] = len(value)
        if len(set(sizes.values())) > 1:
            raise RecordError(f"columns must be equally long; got {sizes}. Give one value per row in each.")

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]]) -> Self:
        """Build the columns from rows as the ledger gives them; it keeps NaN as NULL."""
        columns = list(zip(*rows)) if rows else [()] * len(fields(cls))
        return cls(*([np.nan if v is None else v for v in column] for column in columns))

    def as_rows(self) -> Iterator[tuple[Any, ...]]:
        """Give the rows as plain Python values."""
        return zip(*(getattr(self, field.name).tolist() for field in fields(self)))

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True, eq=False)
class Examples(Columns):
    """The examples of a run, one entry each.

    Args:
        id: position in the data set as given.
        hash: content hash of the input; what `diff` matches examples by.
        label: the true class.
        clean_label: the model's answer on the unchanged input.
        clean_margin: its margin there (true class minus best other; negative when wrong).
        clean_confidence: softmax probability of `clean_label`.
        control: belongs to the control subset that every attack gets.
    """

    id: Any
    hash: Any
    label: Any
    clean_label: Any
    clean_margin: Any
    clean_confidence: Any
    control: Any

    @classmethod
    def _dtypes(cls) -> dict[str, type]:
        return {
            "id": np.int64,
            "hash": object,
            "label": np.int64,
            "clean_label": np.int64,
            "clean_margin": np.float64,
            "clean_confidence": np.float64,
            "control": np.bool_,
        }


@dataclass(frozen=True, eq=False)
class Results(Columns):
    """What one attack found, one entry per example.

    Args:
        example: position of the example.
        success: confirmed by the judge.
        size: size of the change in the threat's units; inf where nothing was found.
        margin: the model's margin at the point reported.
        restart: lowest-numbered successful restart, or the best one.
        label_after: the model's answer there.
        confidence_after: softmax probability of `label_after`.
        forwards: forward passes spent on the example; likewise `backwards` and `queries`.
    """

    example: Any
    success: Any
    size: Any
    margin: Any
    restart: Any
    label_after: Any
    confidence_after: Any
    forwards: Any
    backwards: Any
    queries: Any

    @classmethod
    def _dtypes(cls) -> dict[str, type]:
        return {
            "example": np.int64,
            "success": np.bool_,
            "size": np.float64,
            "margin": np.float64,
            "restart": np.int64,
            "label_after": np.int64,
            "confidence_after": np.float64,
            "forwards": np.int64,
            "backwards": np.int64,
            "queries": np.int64,
        }


@dataclass(frozen=True, eq=False)
class CertificateRows(Columns):
    """What one certificate proved, one entry per example; `radius` is NaN where the method gives none."""

    example: Any
    holds: Any
    radius: Any

    @classmethod
    def _dtypes(cls) -> dict[str, type]:
        return {"example": np.int64, "holds": np.bool_, "radius": np.float64}


@dataclass(frozen=True, eq=False)
class Draws(Columns):
    """Fresh draws of a random model at one point, one entry per example and attack that found it.

    Args:
        attack: the attack whose point was to be confirmed; `SCORE` where its share of wrong answers was counted at the end.
        example: position of the example.
        drawn: how many draws.
        wrong: on how many of them the answer is wrong (and no rejection).
    """

    attack: Any
    example: Any
    drawn: Any
    wrong: Any

    @classmethod
    def _dtypes(cls) -> dict[str, type]:
        return {"attack": np.int64, "example": np.int64, "drawn": np.int64, "wrong": np.int64}


SCORE = -1
"""In the place of an attack: the draws score the strongest point that was found."""


def pack(x: NDArray[Any]) -> tuple[str, str, bytes]:
    """Turn an array into dtype, shape and little-endian bytes."""
    x = np.ascontiguousarray(x)
    x = x.astype(x.dtype.newbyteorder("<"), copy=False)
    return x.dtype.str, ",".join(map(str, x.shape)), x.tobytes()


def unpack(dtype: str, shape: str, blob: bytes) -> NDArray[Any]:
    """Turn back what `pack` made."""
    return np.frombuffer(blob, dtype=dtype).reshape([int(s) for s in shape.split(",") if s]).copy()


def hash_cell(sha: Any, cell: object) -> None:
    """Feed one cell to a hash, with its type and length, so that no two tables feed the same bytes."""
    if cell is None:
        data = b"n"
    elif isinstance(cell, int):
        data = b"i" + struct.pack("<q", cell)
    elif isinstance(cell, float):
        data = b"f" + struct.pack("<d", cell)
    elif isinstance(cell, bytes):
        data = b"b" + cell
    else:
        data = b"s" + str(cell).encode()
    sha.update(struct.pack("<q", len(data)))
    sha.update(data)
