"""What the report draws: the objective against the step, and accuracy against the radius."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mohs import records

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Radii of the accuracy curve, in units of the threat's."""
TRACED, TRACE_RESTARTS = 6, 5
"""Loss curves: examples of the control subset, restarts each."""


def _curve_attack(evaluation: Evaluation) -> Any:
    """The first iterative fixed-radius attack of the plan; its restarts are not used."""
    return next((a for _, a in evaluation.steps if a.finite and a.steps > 1), None)


def loss_curves(evaluation: Evaluation) -> None:
    """Madry's figure 1: the objective against the step, several restarts of a few control examples."""
    attack, record = _curve_attack(evaluation), evaluation.run.record()
    chosen = np.flatnonzero(record.examples.control & record.correct)[:TRACED]
    restarts = (
        min(TRACE_RESTARTS, evaluation.threat.queries or TRACE_RESTARTS) if getattr(attack, "random", True) else 1
    )
    # written one by one, so a killed run may hold some of them
    if attack is None or len(record.traces()) == len(chosen) * restarts:
        return
    todo = torch.from_numpy(chosen).to(evaluation.x.device)
    job, todo = evaluation.bookmark.begin(
        "loss curves", todo, lambda todo: evaluation.job(attack, todo, restarts=restarts, trace=True)
    )
    for _ in evaluation.bookmark.through(job, "loss curves", todo):
        pass
    index = next(i for i, (_, a) in enumerate(evaluation.steps) if a is attack)
    values = job.outcome().trace
    if values is not None:
        for i, example in enumerate(chosen.tolist()):
            for restart in range(restarts):
                evaluation.run.ledger.put_trace(index, example, restart, values[i, restart].cpu().numpy())
    evaluation.bookmark.drop()


def radius_curve(evaluation: Evaluation) -> list[records.CurvePoint]:
    """Accuracy against radius on the control subset; radii are rows, and a break holds for every larger radius."""
    attack, record = _curve_attack(evaluation), evaluation.run.record()
    control = np.flatnonzero(record.examples.control)
    right = control[record.correct[control]]
    points = [records.CurvePoint(eps=0.0, survived=len(right), n=len(control), source="control subset")]
    if attack is None or not len(right) or evaluation.threat.region.eps == 0:
        return points
    radii = [r * evaluation.threat.region.eps for r in CURVE]
    if evaluation.threat.region.kind in ("l0", "patch", "words"):  # counts
        radii = sorted({max(1, round(r)) for r in radii})
    todo = torch.from_numpy(right).to(evaluation.x.device)
    evaluation.notify("radii", 0, len(todo), 0)
    eps = torch.tensor(radii, device=evaluation.x.device).repeat_interleave(len(todo))
    rows = todo.repeat(len(radii))
    job, rows = evaluation.bookmark.begin("radii", rows, lambda rows: evaluation.job(attack, rows, eps=eps))
    for _ in evaluation.bookmark.through(job, "radii", rows):
        pass
    found = job.success.view(len(radii), -1)
    broken = found.cummax(0).values
    known = torch.from_numpy(record.breaker[right] >= 0)
    for radius, row, again in zip(radii, broken.cpu(), found.cpu(), strict=True):
        gone = (row | known) if radius >= evaluation.threat.region.eps else row
        points.append(
            records.CurvePoint(
                eps=radius, survived=int((~gone).sum()), n=len(control), source="control subset", lost=int((row & ~again).sum())
            )
        )  # fmt: skip
    evaluation.notify("radii", len(todo), len(todo), 0)
    return points
