"""numpy's npz archives: arrays x and y, optionally class names; never a pickle."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from mohs.data._common import MAX_BYTES, Raw
from mohs.errors import DataError


def read_npz(path: Path, split: str) -> Raw:
    """Arrays ``x_SPLIT`` and ``y_SPLIT`` where present, else ``x`` and ``y``."""
    if not path.is_file():
        raise DataError(f"npz:{path} is not a file; name the .npz file itself.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if len(set(names)) != len(names):
                raise DataError(f"{path}: holds two arrays of the same name. Save it again with numpy.savez.")
            x_name = f"x_{split}" if f"x_{split}" in names else "x"
            y_name = f"y_{split}" if f"y_{split}" in names else "y"
            if x_name not in names or y_name not in names:
                found = ", ".join(sorted(names)[:8]) or "nothing"
                raise DataError(
                    f"{path}: needs arrays x and y (or x_{split} and y_{split}), found {found}. "
                    "Save it with numpy.savez(FILE, x=..., y=...)."
                )
            x, y = _array(archive, x_name, path), _array(archive, y_name, path)
            classes = _array(archive, "classes", path) if "classes" in names else np.empty(0, "U1")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable npz archive ({error}). Save it again with numpy.savez.") from error
    return Raw(_inputs(x, path), _labels(y, path), _classes(classes, path))


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
    if info.file_size > MAX_BYTES:
        raise DataError(f"{path}: array {name} unpacks to {info.file_size:,} bytes, more than the {MAX_BYTES:,} read.")
    try:
        with archive.open(info) as stream:
            # the header is checked against the real size before numpy sets memory aside for what it claims
            version = npy.read_magic(stream)
            header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = header(stream)
            if dtype.hasobject:
                raise DataError(
                    f"{path}: array {name} holds Python objects, which would need pickle; it is refused. "
                    "Save plain numbers (or text for classes)."
                )
            declared = math.prod(shape) * dtype.itemsize
            if declared + stream.tell() != info.file_size:
                raise DataError(
                    f"{path}: array {name} declares {declared:,} bytes but holds "
                    f"{info.file_size - stream.tell():,}. Save it again with numpy.savez."
                )
        with archive.open(info) as stream:
            return npy.read_array(stream, allow_pickle=False)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: array {name} is damaged ({error}). Save it again with numpy.savez.") from error


def _inputs(x: np.ndarray, path: Path) -> np.ndarray:
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"{path}: x has type {x.dtype}; allowed are uint8 (0 to 255) and floats in [0, 1].")
    if x.ndim not in (2, 4):
        raise DataError(
            f"{path}: x has shape {list(x.shape)}; allowed are [N, C, H, W] and [N, D]. "
            "Grey images without a channel dimension gain it with x[:, None]."
        )
    if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        raise DataError(
            f"{path}: x has shape {list(x.shape)}, which looks like channels last; allowed is [N, C, H, W]. "
            "Save x.transpose(0, 3, 1, 2)."
        )
    return x


def _labels(y: np.ndarray, path: Path) -> np.ndarray:
    if y.dtype.kind not in "iu":
        raise DataError(f"{path}: y has type {y.dtype}; labels must be whole numbers. Save y.astype('int64').")
    if y.ndim != 1:
        raise DataError(
            f"{path}: y has shape {list(y.shape)}; labels must be [N]. One-hot labels: y.argmax(1); a column: y[:, 0]."
        )
    return y


def _classes(names: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(f"{path}: classes must be a list of texts, got {names.dtype} of shape {list(names.shape)}.")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in names.tolist())
