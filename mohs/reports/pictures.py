"""The gallery: clean input, adversarial input and their difference as PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mohs.records import Record
from mohs.reports import words

MOST = 12
MOST_LARGE = 6  # so that a page of large photographs stays a few megabytes
LARGE = 96

RAISED = np.array([0.88, 0.50, 0.26])  # where a value went up; nothing changed is nearly white
LOWERED = np.array([0.22, 0.54, 0.66])


@dataclass(frozen=True)
class Exhibit:
    """One broken example with its three pictures and what the model said."""

    example: int
    attack: str
    label: str
    clean_label: str
    clean_confidence: float
    label_after: str
    confidence_after: float
    size: float
    factor: float
    clean: str
    adversarial: str
    difference: str


def exhibits(record: Record, most: int | None = None) -> tuple[list[Exhibit], str]:
    """Choose broken examples and draw them.

    Each attack that broke something is represented in turn, its most confident wrong answers first.

    Args:
        record: what an evaluation found.
        most: how many; by default fewer when the pictures are large.

    Returns:
        The exhibits, and a sentence instead where there are none.
    """
    shape = tuple(record.header.data.shape)
    if not (record.breaker >= 0).any():
        return [], "No attack broke an example, so there is nothing to show."
    if not _drawable(shape):
        return [], f"Inputs of shape {list(shape)} are not grey or colour images, so they are not drawn."
    most = most or (MOST_LARGE if max(shape[-2:]) > LARGE else MOST)
    chosen = _choose(record, most)
    low, high = words.box_of(record.header)
    shown = []
    for attack, example in chosen:
        before, after = record.inputs([example])[1][0], record.points(attack, [example])[1][0]
        if not (math.isfinite(low) and math.isfinite(high)):
            low, high = float(min(before.min(), after.min())), float(max(before.max(), after.max()))
        rows, k = record.results(attack), int(np.searchsorted(record.results(attack).example, example))
        at = int(np.searchsorted(record.examples.id, example))
        change = (after.astype(np.float64) - before) / ((high - low) or 1.0)
        strongest = float(np.abs(change).max()) or 1.0
        header = record.header
        shown.append(
            Exhibit(
                example=example,
                attack=record.attack_name(attack),
                label=words.class_name(header, int(record.examples.label[at])),
                clean_label=words.class_name(header, int(record.examples.clean_label[at])),
                clean_confidence=float(record.examples.clean_confidence[at]),
                label_after=words.class_name(header, int(rows.label_after[k])),
                confidence_after=float(rows.confidence_after[k]),
                size=float(rows.size[k]),
                factor=1 / strongest,
                clean=_png(_scaled(before, low, high)),
                adversarial=_png(_scaled(after, low, high)),
                difference=_png(_tinted(change / strongest)),
            )
        )
    return shown, ""


def _drawable(shape: tuple[int, ...]) -> bool:
    grey = len(shape) == 2 and min(shape) >= 2
    return grey or (len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 2)


def _choose(record: Record, most: int) -> list[tuple[int, int]]:
    queues = []
    for attack in record.attacks:
        rows = record.results(attack)
        first = record.breaker[np.searchsorted(record.examples.id, rows.example)] == attack
        mine = np.flatnonzero(rows.success & first)
        order = mine[np.argsort(-np.nan_to_num(rows.confidence_after[mine]), kind="stable")]
        queues.append([(attack, int(i)) for i in rows.example[order]])
    chosen: list[tuple[int, int]] = []
    for turn in range(most):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return chosen[:most]


def _scaled(x: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    share = np.clip((x.astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)
    return _last(np.rint(255 * share).astype(np.uint8))


def _tinted(change: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colour a change in [-1, 1]: orange where raised and blue where lowered, or each channel around grey."""
    if change.ndim == 3 and change.shape[0] == 3:
        return _last(np.rint(255 * (0.5 + change / 2)).astype(np.uint8))
    flat = _last(change)[..., None]
    tint = np.where(flat > 0, RAISED, LOWERED)
    return np.rint(255 * (0.97 * (1 - np.abs(flat)) + tint * np.abs(flat))).astype(np.uint8)


def _last(x: NDArray) -> NDArray:
    if x.ndim == 2:
        return x
    return x[0] if x.shape[0] == 1 else np.moveaxis(x, 0, -1)


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
