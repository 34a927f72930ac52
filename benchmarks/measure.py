"""Timing, counting and scoring, the same for Mohs and for every peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCORING_BATCH = 256
TOLERANCE = 1e-6  # of a distance: what float32 arithmetic of x0 + change costs


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({min(self.seconds):.3f} to {max(self.seconds):.3f})"


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, between: Callable[[], None] = lambda: None
) -> dict[str, Times]:
    """Time each run ``repeats`` times in turn (a, b, a, b, ...), so that a slow spell of the machine falls on all.

    ``between`` is called, untimed, before each run.

    >>> order = []
    >>> times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    >>> "".join(order), len(times["a"].seconds)
    ('abab', 2)
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            between()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def ratios(ours: Times, other: Times) -> Times:
    """Ours over the other, round by round: the two runs of a round are neighbours in time."""
    return Times(tuple(a / b for a, b in zip(ours.seconds, other.seconds, strict=True)))


class Counted(nn.Module):
    """A model that keeps a tape of its passes: [rows, backwards] for each forward, in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tape: list[list[int]] = []
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        entry = [len(x), 0]
        self.tape.append(entry)
        logits = self.model(x)
        if logits.requires_grad:

            def pulled(gradient: Tensor) -> None:
                entry[1] += 1

            logits.register_hook(pulled)
        return logits

    @property
    def forwards(self) -> int:
        """Rows that went forward, padding included."""
        return sum(rows for rows, _ in self.tape)

    @property
    def backwards(self) -> int:
        """Rows that went backward; a row pulled for three classes counts three times."""
        return sum(rows * pulls for rows, pulls in self.tape)


def replay(model: nn.Module, tape: Sequence[Sequence[int]], x: Tensor) -> None:
    """The hand-written loop: exactly the passes of a tape, on rows of ``x``, and nothing else."""
    batches = {rows: x[torch.arange(rows) % len(x)] for rows in {rows for rows, _ in tape}}
    cotangents: dict[int, Tensor] = {}
    for rows, pulls in tape:
        if not pulls:
            with torch.no_grad():
                model(batches[rows])
            continue
        v = batches[rows].detach().requires_grad_(True)
        logits = model(v)
        if rows not in cotangents:
            cotangents[rows] = torch.full_like(logits, 0.1)
        for pull in range(pulls):
            torch.autograd.grad(logits, v, cotangents[rows], retain_graph=pull < pulls - 1)


@dataclass(frozen=True)
class Score:
    """Which rows an attack changed into a success inside region and box, and by how much, [N] each."""

    success: Tensor
    size: Tensor

    def cells(self, common: Tensor) -> list[str]:
        """Success, mean and median size of the successes, and mean size of the ``common`` rows, as table cells."""
        sizes, shared = self.size[self.success], self.size[common]
        values = [
            (sizes, sizes.mean()),
            (sizes, sizes.median() if len(sizes) else sizes.sum()),
            (shared, shared.mean()),
        ]
        found = f"{len(sizes)}/{len(self.success)}"
        return [found, *(f"{float(value):.4f}" if len(of) else "-" for of, value in values)]


def score(model: nn.Module, x0: Tensor, x: Tensor, y: Tensor, norm: float, eps: float) -> Score:
    """Judge what an attack returned, whoever made it: answer differs, box [0, 1], distance at most ``eps``."""
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in x.split(SCORING_BATCH)])
    size = torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), norm, dim=1)
    flat = x.flatten(1)
    valid = (flat >= 0).all(1) & (flat <= 1).all(1) & (size <= eps + TOLERANCE)  # nan is not valid
    return Score((answers != y) & valid, size)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [[1, "x"]]))
    | a | b |
    |---|---|
    | 1 | x |
    """
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
