"""Does an answer depend on what ran beside it? Batch sizes, order, subsets and shards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import mohs
from mohs.attacks import BIM, FGSM, PGD, Attack, DeepFool, Outcome

from .measure import table
from .subjects import SEED, Options, Subject, subjects

SIZES = (7, 50, 64, 200)
ONE_SIZE = 64
CASES: tuple[tuple[str, Attack, str], ...] = (
    ("FGSM", FGSM(), "linf:0.1"),
    ("BIM(10)", BIM(10), "linf:0.1"),
    ("PGD(40, 0.01)", PGD(40, 0.01), "linf:0.1"),
    ("DeepFool", DeepFool(), "l2:inf"),
    ("DeepFool", DeepFool(), "l2:0.5"),
)
LISTED = 8  # rows named in a cell


def run(options: Options) -> Iterator[str]:
    """Flags between batch sizes may differ by rounding alone; at one batch size every bit is the same."""
    yield "## Batches, order, subsets, shards"
    sizes = ", ".join(map(str, SIZES))
    yield (
        f"Left: rows whose success flag is not the same at batch sizes {sizes}, as row (margins in logits at these sizes). "
        "'Size differs' counts the rows, successful everywhere, whose size of change differs by more than 0.1% between batch "
        f"sizes. Right, at batch size {ONE_SIZE}: are points, flags, margins and sizes bit-identical to those of one plain run?"
    )
    head = [
        "net",
        "attack",
        "threat",
        "rows",
        "success",
        "flags differ",
        "size differs",
        "shuffled",
        "subset",
        "two shards",
    ]
    rows = []
    for subject in subjects(options):
        for name, attack, threat in CASES:
            cells = _across_sizes(subject, attack, threat)
            rows.append([subject.name, name, threat, len(subject.x), *cells, *_at_one_size(subject, attack, threat)])
    yield table(head, rows)


def _attack(subject: Subject, attack: Attack, threat: str, batch: int, rows: Tensor | None = None) -> Outcome:
    x, y = (subject.x, subject.y) if rows is None else (subject.x[rows], subject.y[rows])
    return mohs.attack(attack, subject.net, x, y, threat, batch=batch, seed=SEED)


def _across_sizes(subject: Subject, attack: Attack, threat: str) -> list[object]:
    outcomes = [_attack(subject, attack, threat, batch) for batch in SIZES]
    flags = torch.stack([o.success for o in outcomes])
    margins = torch.stack([o.margin for o in outcomes])
    sizes = torch.stack([o.size for o in outcomes])
    everywhere, anywhere = flags.all(0), flags.any(0)
    differing = (everywhere != anywhere).nonzero().flatten().tolist()
    named = [f"{row} ({', '.join(f'{m:.1e}' for m in margins[:, row].tolist())})" for row in differing[:LISTED]]
    more = f" and {len(differing) - LISTED} more" if len(differing) > LISTED else ""
    spread = (sizes.amax(0) - sizes.amin(0))[everywhere] > 1e-3 * sizes.amin(0)[everywhere]
    counts = f"{len(differing)}" + (f": {'; '.join(named)}{more}" if differing else "")
    successes = "/".join(str(n) for n in dict.fromkeys(flags.sum(1).tolist()))
    return [successes, counts, int(spread.sum())]


def _at_one_size(subject: Subject, attack: Attack, threat: str) -> list[bool]:
    count = len(subject.x)
    every = torch.arange(count)
    plain = _attack(subject, attack, threat, ONE_SIZE)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    shards = every.tensor_split(2)
    return [
        _identical(plain, [(rows, _attack(subject, attack, threat, ONE_SIZE, rows)) for rows in parts])
        for parts in ([shuffled], [every[::3]], shards)
    ]


def _identical(plain: Outcome, parts: list[tuple[Tensor, Outcome]]) -> bool:
    return all(
        torch.equal(getattr(plain, name)[rows], getattr(part, name))
        for rows, part in parts
        for name in ("x", "success", "margin", "size", "restart", "forwards", "backwards", "queries")
    )
