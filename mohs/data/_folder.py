"""A folder of images with one sub-folder per class, read by Pillow."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np

from mohs.data._common import MAX_BYTES, MAX_PIXELS, Raw
from mohs.errors import DataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_GREY, _COLOUR = ("1", "L"), ("P", "RGB")


def read_folder(folder: Path, split: str) -> Raw:
    """All images, round robin over the classes so that any first part of the set is balanced."""
    if not folder.is_dir():
        raise DataError(f"folder:{folder} is not a directory; name the one that holds a sub-folder per class.")
    if (folder / split).is_dir() and any(p.is_dir() for p in (folder / split).iterdir()):
        folder = folder / split
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"folder:{folder} has no sub-folders; it needs one per class, named like the class.")
    files = [_images(folder / name) for name in classes]
    queue = [
        (path, label) for turn in itertools.zip_longest(*files) for label, path in enumerate(turn) if path is not None
    ]
    size, mode = _survey([path for path, _ in queue])
    channels = 1 if mode == "L" else 3
    total = len(queue) * channels * size[0] * size[1]
    if total > MAX_BYTES:
        raise DataError(f"folder:{folder} unpacks to {total:,} bytes, more than the {MAX_BYTES:,} read. Split it.")
    x = np.empty((len(queue), channels, size[1], size[0]), np.uint8)
    for row, (path, _) in enumerate(queue):
        pixels = _decode(path, mode)
        x[row] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
    return Raw(x, np.array([label for _, label in queue], np.int64), tuple(classes))


def _images(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: no images; allowed endings are {', '.join(sorted(_SUFFIXES))}.")
    return found


def _survey(paths: list[Path]) -> tuple[tuple[int, int], str]:
    """Common size, and RGB if any image has colour; headers only, so that nothing large is decoded yet."""
    first, colour = None, False
    for path in paths:
        size, mode = _header(path)
        first = first or (size, path)
        if size != first[0]:
            raise DataError(
                f"{path} has {size[0]} x {size[1]} pixels, {first[1]} has {first[0][0]} x {first[0][1]}; "
                "all images must have the same size. Resize or crop them first."
            )
        colour = colour or mode in _COLOUR
    if first is None:
        raise DataError("no images were given.")
    return first[0], "RGB" if colour else "L"


def _header(path: Path) -> tuple[tuple[int, int], str]:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                size, mode = image.size, image.mode
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        size, mode = (MAX_PIXELS + 1, 1), "L"
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not an image that can be read ({error}).") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels, which is refused. Scale the image down.")
    if mode not in _GREY + _COLOUR:
        raise DataError(f"{path}: pixel mode {mode}; allowed are 8-bit grey and RGB without transparency. Convert it.")
    return size, mode


def _decode(path: Path, mode: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: the image is damaged or cut off ({error}).") from error
