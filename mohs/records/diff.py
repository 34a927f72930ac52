"""Two records example by example: what broke, what became safe, and whether that is more than chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mohs.errors import RecordError
from mohs.records import stats
from mohs.records.header import header_differences
from mohs.records.record import Record


@dataclass(frozen=True)
class Diff:
    """How record b differs from record a on the examples they share.

    Attributes:
        shared: number of examples in both, matched by content hash and label.
        only_a: examples in a alone; likewise `only_b`.
        newly_broken: positions in b of examples that survived in a and not in b.
        newly_safe: positions in b of examples that survived in b and not in a.
        survived_a: survivors among the shared examples in a; likewise `survived_b`.
        p: exact McNemar p-value of the two being equally robust on these examples.
        headers: what the headers disagree on, as (name, in a, in b).
    """

    shared: int
    only_a: int
    only_b: int
    newly_broken: NDArray[np.int64]
    newly_safe: NDArray[np.int64]
    survived_a: int
    survived_b: int
    p: float
    headers: list[tuple[str, str, str]]

    def describe(self) -> str:
        """Say in a sentence what changed."""
        names = ", ".join(name for name, _, _ in self.headers) or "nothing"
        return (
            f"Of {self.shared:,} shared examples {self.survived_a:,} survived before and {self.survived_b:,} "
            f"after: {len(self.newly_broken):,} newly broken, {len(self.newly_safe):,} newly safe "
            f"(exact McNemar p = {self.p:.3g}). The headers differ in {names}."
        )


def diff(a: Record, b: Record) -> Diff:
    """Compare two records on the examples they share.

    Args:
        a: the earlier record.
        b: the later one, under the same threat.

    Returns:
        The differences; an example counts as the same when its input and its label are.

    Raises:
        RecordError: the threats differ, or no example is in both.
    """
    if a.header.threat != b.header.threat:
        raise RecordError(
            f"two records can be compared under one threat only; got {a.header.threat_text} in {a.dir} and "
            f"{b.header.threat_text} in {b.dir}. Evaluate both under the same threat."
        )
    keys_a, keys_b = _keys(a), _keys(b)
    at_a = {key: i for i, key in enumerate(keys_a)}
    pairs = [(at_a[key], j) for j, key in enumerate(keys_b) if key in at_a]
    if not pairs:
        raise RecordError(
            f"{a.dir} and {b.dir} have no example in common ({a.n} and {b.n} examples). Evaluate both on the same data."
        )
    i, j = np.asarray(pairs, dtype=np.int64).T
    before, after = a.survived[i], b.survived[j]
    broken, safe = b.examples.id[j[before & ~after]], b.examples.id[j[after & ~before]]
    return Diff(
        shared=len(pairs),
        only_a=a.n - len(pairs),
        only_b=b.n - len(pairs),
        newly_broken=broken,
        newly_safe=safe,
        survived_a=int(before.sum()),
        survived_b=int(after.sum()),
        p=stats.mcnemar(len(broken), len(safe)),
        headers=header_differences(a.header, b.header),
    )


def _keys(record: Record) -> list[tuple[str, int, int]]:
    # The occurrence number keeps examples apart that appear twice in a data set.
    seen: dict[tuple[str, int], int] = {}
    keys = []
    for content, label in zip(record.examples.hash.tolist(), record.examples.label.tolist()):
        count = seen[content, label] = seen.get((content, label), -1) + 1
        keys.append((content, label, count))
    return keys
