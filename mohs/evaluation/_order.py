"""Who is tried next: the survivors in the order in which a step of a plan takes them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from mohs import records, streams
from mohs.data import Dataset

LEAST = 1 / 64
"""Share of all examples below which no step of a plan cuts the survivors: on so few, any step costs little beside the first."""
WORTH = 0.1
"""A portion of whose farther half a step breaks at least so many is followed by the next one: the order was no guide to who is
near, or all are. Where it breaks fewer there, those behind, who were farther away still, promise less."""


def shuffled(data: Dataset, seed: int) -> list[int]:
    """The positions of all examples in an order that is random, but fixed by contents and seed."""
    times: Counter[str] = Counter()
    keys = []
    for id_ in data.ids:  # equal examples must not stand together
        keys.append(streams.text_key(f"{seed} order {id_} {times[id_]}"))
        times[id_] += 1
    return sorted(range(len(data)), key=lambda i: (keys[i], i))


def portions(record: records.Record, index: int, share: float, block: range) -> list[tuple[np.ndarray, np.ndarray]]:
    """Survivors of the attacks before ``index`` in a block of examples, those nearest to breaking first, cut into portions, and
    of each portion the farther half.

    The first portion also holds whom no attack has tried yet, and the control subset. It depends on the rows of earlier attacks
    alone, so that a resumed run cuts as an uninterrupted one does.
    """
    tried = np.zeros(record.n, dtype=bool)
    best = -record.examples.clean_margin
    for attack in record.attacks:
        if attack < index:
            rows = record.results(attack)
            tried[rows.example] = True
            best[rows.example] = np.fmax(best[rows.example], rows.margin)
    within = np.zeros(record.n, dtype=bool)
    within[block.start : block.stop] = True
    alive = survivors(record, index) & within
    order = np.lexsort((np.arange(record.n), -np.nan_to_num(best, nan=-np.inf)))
    order = order[alive[order]]
    size = max(math.ceil(share * len(order)), math.ceil(len(block) * LEAST), 1)
    head, tail = order[:size], order[size:]
    control = np.flatnonzero(record.correct & record.examples.control & within)
    forced = np.concatenate([tail[~tried[tail]], np.setdiff1d(control, order[:size])])
    first = np.concatenate([head, forced[np.sort(np.unique(forced, return_index=True)[1])]]).astype(np.int64)
    rest = np.setdiff1d(tail, first, assume_unique=True)
    rest = tail[np.isin(tail, rest)]
    later = [rest[at : at + size] for at in range(0, len(rest), size)]
    return [(first, head[len(head) // 2 :]), *((part, part[len(part) // 2 :]) for part in later)]


def survivors(record: records.Record, index: int) -> np.ndarray:
    """Examples that are right and that no attack before ``index`` has broken, [N] bool."""
    return record.correct & ~((record.breaker >= 0) & (record.breaker < index))
