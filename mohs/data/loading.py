"""From a short specification (``idx:DIR``, ``npz:FILE`` ...) to a data set, or to a clear error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mohs.data._cifar import read_cifar10
from mohs.data._common import Raw
from mohs.data._folder import read_folder
from mohs.data._idx import read_idx
from mohs.data._npz import read_npz
from mohs.data.dataset import _MAX_CLASSES, Dataset, _rows
from mohs.errors import DataError

BUNDLED = Path(__file__).parent / "bundled"
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_READERS: dict[str, Callable[[Path, str], Raw]] = {
    "idx": read_idx,
    "cifar10": read_cifar10,
    "npz": read_npz,
    "folder": read_folder,
}
_FORMS: Sequence[tuple[str, str]] = (
    (
        "bundled:fashion-mnist",
        "the first 1,000 test images of Fashion-MNIST, 28 x 28 grey, shipped with Mohs",
    ),
    ("idx:DIR", "MNIST-style idx files (train-* and t10k-*), plain or .gz"),
    ("cifar10:DIR", "the Python batches of CIFAR-10, read without running any pickled code"),
    (
        "npz:FILE",
        "arrays x and y, optionally classes (or x_train, y_train, x_test, y_test); uint8 or floats in [0, 1]",
    ),
    (
        "folder:DIR",
        "one sub-folder of equally large images per class, grey or RGB (or DIR/train and DIR/test)",
    ),
)


def available() -> list[tuple[str, str]]:
    """The forms a data set can be asked for in, each with a line of description.

    >>> available()[0][0]
    'bundled:fashion-mnist'
    """
    return list(_FORMS)


def load(spec: str, *, split: str = "test", n: int | None = None) -> Dataset:
    """Load a data set by its short specification.

    Args:
        spec: ``bundled:fashion-mnist``, ``idx:DIR``, ``cifar10:DIR``, ``npz:FILE`` or ``folder:DIR``.
        split: ``test`` or ``train``, where the source has both; an npz with plain ``x`` and ``y`` or a folder
            without such sub-folders is taken as it is.
        n: Only the first n examples; None means all. Folders are ordered round robin over the classes.

    Returns:
        Inputs in [0, 1] as float32 with their int64 labels.

    Raises:
        DataError: Nothing is there, or what is there is damaged, dangerous or not what the form promises.

    >>> data = load("bundled:fashion-mnist", n=3)
    >>> list(data.x.shape), [data.classes[k] for k in data.y]
    ([3, 1, 28, 28], ['Ankle boot', 'Pullover', 'Trouser'])
    """
    allowed = ", ".join(form for form, _ in _FORMS)
    scheme, colon, place = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not colon or not place or scheme not in ("bundled", *_READERS):
        raise DataError(f"no data set {spec!r}; allowed are {allowed}.")
    if split not in ("train", "test"):
        raise DataError(f"no split {split!r} of {spec}; allowed are 'test' and 'train'.")
    if n is not None and n < 1:
        raise DataError(f"asked for {n} examples of {spec}; ask for at least 1, or leave n out for all.")
    if scheme == "bundled":
        raw = _read_bundled(place, split)
    else:
        path = Path(place).expanduser()
        if not path.exists():
            raise DataError(f"{spec}: there is no {path}. Check the path; relative ones start at {Path.cwd()}.")
        try:
            raw = _READERS[scheme](path, split)
        except OSError as error:
            raise DataError(f"{spec}: cannot be read ({error}). Check the path and its permissions.") from error
    return _finish(raw, spec, n)


def _read_bundled(name: str, split: str) -> Raw:
    if name != "fashion-mnist":
        raise DataError(f"no bundled data set {name!r}; allowed is bundled:fashion-mnist.")
    if split != "test":
        raise DataError(
            "bundled:fashion-mnist holds test images only, so split='train' cannot be had. "
            "Use idx:DIR with a directory that holds the four original files."
        )
    x, y, _ = read_idx(BUNDLED / "fashion-mnist", split)
    return Raw(x, y, FASHION)


def _finish(raw: Raw, spec: str, n: int | None) -> Dataset:
    """Name the classes over the whole source, cut, and only then convert: the float copy stays small."""
    x, y, classes = raw
    if len(x) != len(y):
        raise DataError(f"{spec}: {len(x)} inputs but {len(y)} labels; the files do not belong together.")
    if len(x) == 0 or x.size == 0:
        raise DataError(f"{spec}: holds no examples.")
    if n is not None and n > len(x):
        raise DataError(f"{spec}: asked for {n} examples, it holds {len(x)}. Ask for at most that many.")
    if not classes:
        classes = tuple(str(k) for k in range(int(y.max()) + 1)) if y.max() < _MAX_CLASSES else ()
    x, y = x[:n], y[:n]
    labels = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    if x.dtype == np.uint8:
        inputs = torch.from_numpy(np.array(x)).float().div_(255)
        return Dataset(inputs, labels, classes, spec)
    inputs = torch.from_numpy(np.array(x, dtype=np.float32))
    data = Dataset(inputs, labels, classes, spec)
    outside = ((inputs < 0) | (inputs > 1)).flatten(1).any(1)
    if outside.any():
        raise DataError(
            f"{spec}: float inputs must lie in [0, 1], got {float(inputs.min()):.4g} to "
            f"{float(inputs.max()):.4g} ({_rows(outside)}). Divide by 255 or store uint8; "
            "a normalisation belongs inside the model (mohs.models.normalized)."
        )
    return data
