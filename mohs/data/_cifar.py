"""CIFAR-10's Python batches, which are pickles, read without letting a pickle run anything.

A pickle is a program: it names functions and calls them. Here each name it may use is bound to a small
stand-in that only stores what it is given, and every other name is refused. numpy itself is never handed to
the pickle.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mohs.data._common import Raw
from mohs.errors import DataError

_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MAX_FILE = 256 << 20
_PIXELS = 3 * 32 * 32


class _DType:
    """Stands in for numpy.dtype: remembers the type code."""

    def __init__(self, code: Any = b"", *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: without meaning for single bytes."""


class _Array:
    """Stands in for numpy.ndarray: remembers shape, type and bytes until they have been checked."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def checked(self) -> np.ndarray:
        """The array, if type, shape and byte count fit together; ValueError otherwise."""
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _DType) or dtype.code != "u1" or not isinstance(data, bytes):
            raise ValueError("not an array of unsigned bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[(f"{_package}.multiarray", "_reconstruct")] = _Array
    _ALLOWED[(f"{_package}.numeric", "_frombuffer")] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(
                f"the pickle asks for {module}.{name}; a CIFAR-10 batch needs only numpy arrays, lists "
                "and bytes, so this file is refused. Take the original from its authors."
            )
        return _ALLOWED[(module, name)]


def read_cifar10(folder: Path, split: str) -> Raw:
    """All images of one split, in file order."""
    if not folder.is_dir():
        raise DataError(f"cifar10:{folder} is not a directory; name the one that holds test_batch.")
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    files = ["test_batch"] if split == "test" else [f"data_batch_{k}" for k in range(1, 6)]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"cifar10:{folder} lacks {', '.join(missing)}. Unpack the Python version of CIFAR-10 there "
            "(the binary and Matlab versions are not read)."
        )
    parts = [_read_batch(folder / name) for name in files]
    return Raw(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), _NAMES)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if path.stat().st_size > _MAX_FILE:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, more than the {_MAX_FILE:,} a batch may have.")
    try:
        with path.open("rb") as stream:
            batch = _Unpickler(stream, encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path}: not a readable batch ({error}). Unpack the archive again.") from error
    # keys are bytes in the originals (Python 2), text in files saved again
    fields = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()} if _is_dict(batch) else {}
    data, labels = fields.get("data"), fields.get("labels")
    if not isinstance(data, _Array) or not isinstance(labels, list):
        raise DataError(f"{path}: not a CIFAR-10 batch; it must hold 'data' (an array) and 'labels' (a list).")
    try:
        x = data.checked()
        if x.ndim != 2 or x.shape[1] != _PIXELS:
            raise ValueError(f"shape {list(x.shape)} instead of [N, {_PIXELS}]")
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: the image array is damaged ({error}).") from error
    if not all(type(label) is int and 0 <= label < len(_NAMES) for label in labels):
        raise DataError(f"{path}: labels must be whole numbers from 0 to {len(_NAMES) - 1}.")
    if len(labels) != len(x):
        raise DataError(f"{path}: {len(x)} images but {len(labels)} labels. Unpack the archive again.")
    return x.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _is_dict(value: Any) -> bool:
    return type(value) is dict
