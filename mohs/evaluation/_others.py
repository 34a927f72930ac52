"""Examples that a model answers otherwise: where attacks that come from outside begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mohs.records import Record

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

MANY = 256
"""Examples among which the nearest is looked for, the first ones."""


def nearest_others(run: Evaluation, rows: Tensor, record: Record) -> Tensor:
    """For each row the nearest example that the model answers otherwise and does not reject, [B, ...]; itself where there is none."""
    answers = torch.from_numpy(record.examples.clean_label).to(run.y)[:MANY]
    points = run.x[: len(answers)]
    able = (answers >= 0) & (answers < run.classes)
    if run.settings.reject is not None:
        able &= answers != run.settings.reject
    chosen = []
    for row in rows.tolist():
        wrong = (able & (answers != run.y[row])).nonzero().squeeze(1)
        if not len(wrong):
            chosen.append(run.x[row])
            continue
        size = run.threat.region.measure(points[wrong], run.x[row : row + 1].expand_as(points[wrong]))
        chosen.append(points[wrong[size.argmin()]])
    return torch.stack(chosen)
