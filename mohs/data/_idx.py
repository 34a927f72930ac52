"""The idx format of MNIST: a big-endian header (type, dimensions), then the bytes.

**Source**: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from mohs.data._common import MAX_BYTES, Raw
from mohs.errors import DataError

_FOLDERS = (".", "raw", "MNIST/raw", "FashionMNIST/raw")
_STEMS = {"test": ("t10k", "test"), "train": ("train",)}
_UNSIGNED_BYTE = 0x08


def read_idx(folder: Path, split: str) -> Raw:
    """Images and labels of one split; images [N, H, W] gain a channel dimension."""
    if not folder.is_dir():
        raise DataError(f"idx:{folder} is not a directory; name the directory that holds the idx files.")
    x = read_array(_find(folder, split, "images"), (3, 4))
    y = read_array(_find(folder, split, "labels"), (1,))
    return Raw(x[:, None] if x.ndim == 3 else x, y, ())


def _find(folder: Path, split: str, what: str) -> Path:
    dims = "3" if what == "images" else "1"
    names = [f"{stem}-{what}{dot}idx{dims}-ubyte{end}" for stem in _STEMS[split] for dot in "-." for end in ("", ".gz")]
    for place in _FOLDERS:
        for name in names:
            if (folder / place / name).is_file():
                return folder / place / name
    raise DataError(
        f"idx:{folder} has no {what} for split {split!r}; looked for {names[0]} (plain or .gz) "
        f"there and in {', '.join(_FOLDERS[1:])}."
    )


def read_array(path: Path, dims: tuple[int, ...]) -> np.ndarray:
    """One idx file of unsigned bytes, plain or gzip, with exactly as many bytes as it declares."""
    with path.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if packed else plain
        try:
            return _read(stream, path, dims)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: the gzip data is damaged or cut off ({error}). Fetch the file again.") from error


def _read(stream: BinaryIO, path: Path, dims: tuple[int, ...]) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{path}: not an idx file (starts with {magic.hex(' ') or 'nothing'}, idx starts with 00 00). "
            "A failed download often leaves a web page under the name."
        )
    if magic[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path}: idx type 0x{magic[2]:02x}; only unsigned bytes (0x08) are read.")
    if magic[3] not in dims:
        raise DataError(
            f"{path}: {magic[3]} dimensions, expected {' or '.join(map(str, dims))}. Are images and labels swapped?"
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: cut off inside its header. Fetch the file again.")
    shape = struct.unpack(f">{magic[3]}I", header)
    declared = math.prod(shape)
    if declared > MAX_BYTES:
        raise DataError(f"{path}: declares {declared:,} bytes, more than the {MAX_BYTES:,} that are read at once.")
    # one byte beyond the declared size tells a longer file, and no bomb can make us unpack more than that
    data = stream.read(declared + 1)
    if len(data) != declared:
        more = "more" if len(data) > declared else f"{len(data):,}"
        raise DataError(
            f"{path}: declares {declared:,} bytes ({' x '.join(map(str, shape))}) but holds {more}. "
            "The file is damaged or cut off; fetch it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
