"""How many rows pass through the model at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from mohs.attacks._base import Attack

FIXED = 10
"""On a CPU: what a pass is taken to cost besides its rows, in rows (dispatch, and the scheduler's own work)."""


def usual_batch(x: Tensor, attack: Attack | None = None) -> int:
    """Physical batch size at most, where none is asked for: up to 256 rows, on a CPU 128 where the attack is uneven, because a
    batch pays for its most demanding row; fewer where the inputs [N, ...] are large."""
    on_cpu = x.device.type == "cpu"
    values, most = 1 << (20 if on_cpu else 25), 128 if on_cpu and getattr(attack, "uneven", False) else 256
    rows = values // max(x[0].numel() if len(x) else 1, 1)
    return min(most, max(8, 1 << (max(rows, 1).bit_length() - 1)))


def fitting_batch(rows: int, most: int, shrinking: bool) -> int:
    """Physical batch size for so many rows: batches of equal size with little padding, none larger than ``most``.

    Where rows settle one by one (``shrinking``), half a batch of each step is empty on average, as ranks close by whole
    batches. Smaller ones waste less and cost more passes: on balance best are sqrt(2 * FIXED * rows), and none is cut
    below 32 rows. A size is 1, 2, 4 or a multiple of 8, as matrix products treat the rows of other sizes differently by
    their place.

    >>> [fitting_batch(rows, 256, True) for rows in (1, 3, 20, 256, 842, 10_000)]
    [1, 4, 24, 64, 144, 256]
    >>> [fitting_batch(rows, 256, False) for rows in (1, 3, 20, 256, 842, 10_000)]
    [1, 4, 24, 256, 216, 256]
    """
    rows = max(rows, 1)
    wanted = min(most, max(32.0, math.sqrt(2 * FIXED * rows))) if shrinking else most
    size = math.ceil(rows / max(round(rows / wanted), math.ceil(rows / most)))
    return min(most, 8 * math.ceil(size / 8) if size > 4 else 1 << (size - 1).bit_length())
