"""Write the data set that ships with Mohs: the first 1,000 test images of Fashion-MNIST and their labels.

    python recipes/bundle_fashion_mnist.py DIR    # holds t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz

Source: https://github.com/zalandoresearch/fashion-mnist (data/fashion); Debian's package
dataset-fashion-mnist holds the same files.
Copyright (c) 2017 Zalando SE, MIT licence, see mohs/data/bundled/LICENSE.fashion-mnist.
Result: 1,000 images, 28 x 28 grey, and labels, as gzip-packed idx files of about 440 KB; the bytes depend on
the zlib at hand, the pixels do not (tests/test_data.py knows their hash).
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np

from mohs.data._idx import read_array

COUNT = 1000
TARGET = Path(__file__).resolve().parents[1] / "mohs" / "data" / "bundled" / "fashion-mnist"


def write(array: np.ndarray, path: Path) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), compresslevel=9, mtime=0))


def main(source: Path) -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, dims in (("t10k-images-idx3-ubyte.gz", 3), ("t10k-labels-idx1-ubyte.gz", 1)):
        write(read_array(source / name, (dims,))[:COUNT], TARGET / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
