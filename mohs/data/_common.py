"""What the readers share: the raw result, and the limits that keep a hostile file from filling the memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_BYTES = 2 << 30  # of one unpacked array; ImageNet-sized sets should come in parts
MAX_PIXELS = 1 << 24  # of one image


class Raw(NamedTuple):
    """What a reader found: uint8 or float inputs, integer labels, class names (empty: unknown)."""

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
