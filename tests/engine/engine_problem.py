"""A small real problem for the engine: Fashion-MNIST at 7 x 7, a convolutional net trained for a second, a short plan."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mohs
from mohs import records
from mohs.data import Dataset, load
from mohs.evaluation import Plan, PlanStep

THREAT = "linf:0.05"
N, BATCH = 40, 16


class Head(nn.Module):
    """Answers one number, the score of class 1 over class 0, in one of the two shapes allowed."""

    def __init__(self, net: nn.Module, flat: bool) -> None:
        super().__init__()
        self.net, self.flat = net, flat

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        z = z[:, 1:2] - z[:, :1]
        return z.squeeze(1) if self.flat else z


@cache
def images(classes: int = 10) -> Dataset:
    """All bundled images of the first classes, averaged over blocks of 4 x 4."""
    data = load("bundled:fashion-mnist")
    chosen = (data.y < classes).nonzero().flatten()
    x = torch.nn.functional.avg_pool2d(data.x[chosen], 4)
    return Dataset(x, data.y[chosen], data.classes[:classes], f"small-{classes}")


@cache
def _trained(classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, classes))
        x, y = images(classes)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(25):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def conv(classes: int = 10) -> nn.Module:
    """The trained net; deterministic, shared by all tests, never to be changed."""
    return _trained(classes)


def short_plan(steps: int = 8, restarts: int = 3) -> Plan:
    """FGSM, DeepFool and PGD with restarts: a single step, rows of unequal length, several rows per example."""
    return Plan(
        "short",
        (
            PlanStep.make("FGSM"),
            PlanStep.make("DeepFool", {"steps": 10}),
            PlanStep.make("PGD", {"steps": steps}, restarts=restarts),
        ),
    )


def relay_plan() -> Plan:
    """The short plan and two steps that stand on it: from the best points so far, on the nearest of the survivors."""
    pgd = {"steps": 8, "objective": "margin"}
    further = PlanStep.make("PGD", pgd, start="best"), PlanStep.make("Square", {"steps": 30}, start="best", share=0.5)
    return Plan("relay", (*short_plan().steps, *further))


def evaluate(
    data: Dataset | tuple[Tensor, Tensor] | None = None, model: nn.Module | None = None, **settings: Any
) -> records.Record:
    """An evaluation of the small problem with the attacks of its plan and no others; whatever is not said is usual."""
    usual: dict[str, Any] = {"plan": short_plan(), "batch": BATCH, "adaptive": "off"}
    threat = settings.pop("threat", THREAT)
    return mohs.evaluate(model or conv(), data or images().take(N), threat, **usual | settings)


TIMES = ("created", "finished", "command")


def header_facts(directory: Path | str) -> dict[str, object]:
    """The header without what may differ between two sittings: times and the command."""
    content = records.load_header(directory).model_dump(mode="json")
    for name in TIMES:
        del content[name]
    for summary in content["attacks"]:
        del summary["seconds"]
    return content


def rows_of(record: records.Record) -> dict[str, object]:
    """Every row of a record as plain values and bytes; NaN becomes a text so that equal rows compare equal."""

    def plain(columns: Any) -> list[list[object]]:
        return [["nan" if isinstance(v, float) and np.isnan(v) else v for v in row] for row in columns.as_rows()]

    found: dict[str, object] = {"examples": plain(record.examples)}
    for attack in record.attacks:
        found[f"attack {attack}"] = plain(record.results(attack))
        ids, points = record.points(attack)
        found[f"points {attack}"] = [(int(i), p.tobytes()) for i, p in zip(ids, points)]
    ids, inputs = record.inputs()
    found["inputs"] = [(int(i), p.tobytes()) for i, p in zip(ids, inputs)]
    found["traces"] = [(a, e, r, v.tobytes()) for a, e, r, v in record.traces()]
    for name, rows in record.certificates().items():
        found[f"certificate {name}"] = plain(rows)
    return found


def by_content(runs: Sequence[records.Record]) -> dict[tuple[int, str], str]:
    """Row, point and all of every (attack, content of the example), without its position."""
    found = {}
    for record in runs:
        for attack in record.attacks:
            points = dict(zip(*record.points(attack), strict=True))
            for example, *row in record.results(attack).as_rows():
                point = points[example].tobytes().hex() if example in points else ""
                found[attack, record.examples.hash[example]] = f"{row} {point}"
    return found
